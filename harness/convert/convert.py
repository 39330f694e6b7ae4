"""Converts checkpoints to plain weights, and weights to another file format, streamed.

Without torch: a plan lists which bytes go where (`plan`), and threads copy them (`copy`). Only
files of other structures than flat tensors are loaded and saved, by `harness.io`.
"""

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.convert import plan as planning
from harness.convert.copy import OnProgress, check_copy, copy, default_workers
from harness.convert.plan import ConversionPlan, PlannedTensor
from harness.convert.resolve_source import LATEST, read_file, resolve_source
from harness.convert.verify import check_masters, check_sources
from harness.errors import FormatError, HarnessError, counted, first_few
from harness.files import staging_path, sync_directory, write_atomically
from harness.formats import (
    dtypes,
    pt_writer,
    safetensors,
    shard_index,
    suffixes,
    tensor_file,
    tied_weights,
)
from harness.formats.tensor_writer import TensorWriter
from harness.remote_path import THREADS, is_remote
from harness.zero.reader import SavedEngine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "keep": "keep"}

PrintLine = Callable[[str], object]


@dataclass(frozen=True)
class Options:
    """The options of `harness convert`; see its --help."""

    what: str = "weights"
    dtype: str | None = None
    """A key of DTYPES; None: fp32 for a checkpoint, "keep" for a file."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    engine: str | None = None
    shard_size: int | None = None
    """Bytes."""
    dry_run: bool = False
    verify: bool = False
    to_zero: int | None = None
    """Write a DeepSpeed checkpoint of this ZeRO stage instead of weights."""
    ranks: int | None = None
    """Number of ranks that will load it; None: 1."""
    round_robin: bool | None = None
    """round_robin_gradients of the engine that will load it; None: false."""
    workers: int = 0
    """Threads; 0: as many as processors, at most 4, or as a store is asked at a time."""
    key: str | None = None
    """The part of a `.pt` that holds the weights, its keys joined with dots."""


def convert(src: Path, dst: Path, options: Options, print_line: PrintLine) -> None:
    """Converts `src` (see `resolve_source`) to `dst`: `.sft`, `.pt`, or a directory of shards.

    `print_line` is called with each line for the user. Raises HarnessError if the conversion is not
    possible, OSError if files cannot be read or written; `dst` is then unchanged.
    """
    _check_destination(dst, options)
    if not options.workers:
        workers = THREADS if is_remote([src]) else default_workers()
        options = replace(options, workers=workers)
    source = resolve_source(src, options.engine, on_note=lambda text: print_line(f"note: {text}"))
    if options.to_zero is not None:
        _write_zero_checkpoint(source, dst, options, print_line)
        return
    plan = _make_plan(source, options)
    if plan is None:
        assert isinstance(source, Path)
        _convert_structure(source, dst, options, print_line)
        return
    if not plan.tensors:
        raise HarnessError(f"{src} has no tensors")
    planning.select(plan, options.include, options.exclude)
    planning.rename(plan, options.rename)
    metadata = planning.output_metadata(plan)
    planning.deduplicate(plan)
    if metadata and dst.suffix in suffixes.PT:
        plan.notes.append(f"a {dst.suffix} cannot store metadata: dropped {', '.join(metadata)}")
    for note in plan.notes:
        print_line(f"note: {note}")
    if options.dry_run:
        planning.print_plan(plan, print_line)
        return
    started = time.perf_counter()
    with (
        _verifying(source, plan, options) as verified,
        _progress_bar(plan.nbytes, "converting") as progress,
    ):
        overflows = _write(plan, metadata, dst, options, progress, verified)
    seconds = time.perf_counter() - started
    if overflows:
        print_line(
            f"warning: values of {len(overflows)} tensor{'s' * (len(overflows) != 1)} are too "
            f"large for {options.dtype}, and became infinite: "
            f"{first_few([repr(name) for name in sorted(overflows)])}"
        )
    print_line(
        f"{dst}: {plan.count}, {plan.nbytes / 1e6:,.1f} MB in {seconds:.1f} s, "
        f"{plan.nbytes / 1e9 / seconds:.2f} GB/s{', verified' if options.verify else ''}"
    )


def _check_destination(dst: Path, options: Options) -> None:
    zero_options = (options.ranks, options.round_robin)
    if options.to_zero is None and any(value is not None for value in zero_options):
        raise HarnessError("--ranks and --round-robin need --to-zero")
    if options.to_zero is not None:
        _check_new_directory(dst, "a checkpoint")
    elif options.shard_size is not None:
        if options.shard_size <= 0:
            raise HarnessError("--shard-size must be > 0")
        if dst.suffix in suffixes.KNOWN:
            raise HarnessError(f"{dst}: with --shard-size DST must be a directory")
        _check_new_directory(dst, "shards")
    elif dst.suffix not in suffixes.KNOWN:
        raise HarnessError(
            f"{dst}: expected one of {suffixes.listed()}, or a directory with --shard-size"
        )
    elif dst.is_dir():
        raise HarnessError(f"{dst}: a directory, expected the path of a file to write")
    if is_remote([dst]):
        raise HarnessError(f"{dst}: a conversion writes to a disk, not to a store")
    if not dst.absolute().parent.is_dir():
        raise HarnessError(f"{dst.parent}: no such directory")


def _check_new_directory(dst: Path, content: str) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise HarnessError(f"{dst} already exists: {content} must be written to a new directory")


def _make_plan(source: SavedEngine | Path, options: Options) -> ConversionPlan | None:
    """None for a file of another structure than flat tensors."""
    if isinstance(source, SavedEngine):
        if options.key is not None:
            raise HarnessError(f"{source.directory}: --key needs a .pt file, not a checkpoint")
        return planning.plan_engine(source, options.what, DTYPES[options.dtype or "fp32"])
    if options.what != "weights" or options.engine is not None:
        raise HarnessError(f"{source}: --what and --engine need a checkpoint")
    content = read_file(source, options.key)
    if content is None:
        return None
    return planning.plan_file(content, DTYPES[options.dtype or "keep"])


@contextmanager
def _verifying(
    source: SavedEngine | Path, plan: ConversionPlan, options: Options
) -> Iterator[Callable[[], object]]:
    """With `--verify` the sources are checked beside what happens in the context, which waits for
    the disk most of the time. Yields a function that waits for the end of the check, and raises
    what it has found."""
    if not options.verify:
        yield lambda: None
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        check = pool.submit(_verify_source, source, plan, stop)
        try:
            yield check.result
        finally:
            stop.set()


def _verify_source(source: SavedEngine | Path, plan: ConversionPlan, stop: threading.Event) -> None:
    if isinstance(source, SavedEngine):
        check_masters(source, stop)
    total = sum({range_: range_.size for range_ in plan.ranges()}.values())
    with _progress_bar(total, "checking") as progress:
        check_sources(plan.ranges(), progress, stop)


def _convert_structure(src: Path, dst: Path, options: Options, print_line: PrintLine) -> None:
    """Converts a file of another structure than flat tensors, through `harness.io`."""
    unsupported = (options.dtype, options.include, options.exclude, options.rename, options.dry_run)
    keys = first_few([f"--key {key!r}" for key in tensor_file.parts(src)])
    part = f"; for a part of it, use {keys}" if keys else ""
    if is_remote([src]):
        raise HarnessError(f"{src} is not a flat dict of tensors: download it first{part}")
    if any(unsupported) or options.verify:
        raise HarnessError(
            f"{src} is not a flat dict of tensors: --dtype, --include, --exclude, --rename, "
            f"--dry-run and --verify are not supported{part}"
        )
    if keys:
        print_line(f"note: the complete structure; for a part of it, use {keys}")
    from harness import io  # late: imports torch

    skipped: list[str] = []
    io.save(io.load(src, lazy=True, skipped=skipped), dst, options.shard_size)
    for text in skipped:
        print_line(f"note: skipped {text}")
    print_line(f"{dst}: {dst.stat().st_size / 1e9:.3f} GB" if dst.is_file() else str(dst))


def _write_zero_checkpoint(
    source: SavedEngine | Path, dst: Path, options: Options, print_line: PrintLine
) -> None:
    """Writes a plain DeepSpeed checkpoint, resharded for another ZeRO stage and number of ranks."""
    unsupported = (
        options.dtype,
        options.include,
        options.exclude,
        options.rename,
        options.shard_size,
    )
    if any(unsupported) or options.what != "weights" or options.dry_run or options.verify:
        raise HarnessError(
            "--to-zero can only be combined with --ranks, --round-robin and --engine"
        )
    if not isinstance(source, SavedEngine):
        raise HarnessError(f"{source}: --to-zero needs a checkpoint with optimizer state")
    ranks = 1 if options.ranks is None else options.ranks
    if ranks < 1:
        raise HarnessError(f"--ranks {ranks}: expected an integer >= 1")
    from harness.zero.writer import ZeroWriter  # late: imports torch

    assert options.to_zero is not None
    writer = ZeroWriter(source, options.to_zero, ranks, options.round_robin)
    tag = f"global_step{source.global_steps}"
    needed = sum(path.stat().st_size for path in source.directory.iterdir())
    with _staged_directory(dst, needed) as staged:
        (staged / tag).mkdir()
        writer.write(staged / tag)
        write_atomically(staged / LATEST, lambda path: path.write_text(tag))
    print_line(f"{dst}: {tag} for {counted(ranks, 'rank')} at ZeRO {options.to_zero}")
    for note in writer.notes:
        print_line(f"note: {note}")


def _write(
    plan: ConversionPlan,
    metadata: dict[str, str],
    dst: Path,
    options: Options,
    progress: OnProgress,
    verified: Callable[[], object],
) -> set[str]:
    """The names of tensors of which a finite number has become infinite."""
    how = (options, progress, verified)
    if options.shard_size is None:
        return _write_file(plan.tensors, dst, plan.aliases, metadata, *how)
    overflows: set[str] = set()
    sizes = {name: planned.nbytes for name, planned in plan.tensors.items()}
    shards = shard_index.split(sizes, options.shard_size)
    with _staged_directory(dst, plan.nbytes) as staged:
        for number, names in enumerate(shards):
            path = staged / shard_index.shard_name(number, len(shards))
            tensors = {name: plan.tensors[name] for name in names}
            overflows |= _write_file(tensors, path, {}, metadata, *how)
        structure = tied_weights.to_metadata(plan.tensors, plan.aliases)
        total: dict[str, Any] = {"total_size": plan.nbytes}
        shard_index.write_index(staged, shards, total | metadata | structure)
    return overflows


def _write_file(
    tensors: Mapping[str, PlannedTensor],
    path: Path,
    aliases: Mapping[str, str],
    metadata: dict[str, str],
    options: Options,
    progress: OnProgress,
    verified: Callable[[], object],
) -> set[str]:
    overflows: set[str] = set()
    is_pt = path.suffix in suffixes.PT

    def fill(writer: TensorWriter) -> None:
        target = writer.fileno()
        written = copy(
            *(tensors, writer.tensors, target, options.workers, progress),
            with_crc=is_pt,
            by_tensor=is_pt,
            overflows=overflows,
        )
        if is_pt:
            writer.crcs |= {part.name: part.crc for part in written}
        if options.verify:
            os.fsync(target)
            check_copy(tensors, writer.tensors, target, options.workers, path)
            verified()

    described = {name: (planned.dtype, planned.shape) for name, planned in tensors.items()}
    if is_pt:
        pt_writer.write(path, described, fill, aliases)
        return overflows
    entries = {name: _safetensors_entry(name, *entry) for name, entry in described.items()}
    structure = tied_weights.to_metadata(tensors, aliases)
    safetensors.write(path, entries, fill, {"format": "pt"} | metadata | structure)
    return overflows


@contextmanager
def _staged_directory(dst: Path, needed: int) -> Iterator[Path]:
    """A new directory, renamed to `dst` if the context ends without an error."""
    free = shutil.disk_usage(dst.absolute().parent).free
    if needed > free:
        raise HarnessError(
            f"{dst}: needs {needed / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free"
        )
    staged = staging_path(dst)
    staged.mkdir()
    try:
        yield staged
        staged.replace(dst)  # also if it is an empty directory
        sync_directory(dst.absolute().parent)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise HarnessError(f"{dst}: another process has written it meanwhile") from None
        if error.filename is not None:  # a path that the user does not know
            error.filename = str(error.filename).replace(str(staged), str(dst), 1)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _safetensors_entry(name: str, dtype: str, shape: Sequence[int]) -> tuple[str, Sequence[int]]:
    try:
        return dtypes.to_safetensors(dtype, shape)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}: convert to .pt") from None


@contextmanager
def _progress_bar(total: int, label: str) -> Iterator[OnProgress]:
    """A progress bar with the data rate, only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm  # late: not needed without a terminal

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update

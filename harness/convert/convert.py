"""Checkpoints into plain weights, and weights from one kind of file into another, streamed.

Without torch: a plan says which bytes go where (`plan`), and threads copy them (`copy`). Only
structures that are more than flat tensors are loaded and saved as a whole, by `harness.io`.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.convert import plan as planning
from harness.convert.copy import Progress, Written, copy
from harness.convert.plan import ConversionPlan, PlannedTensor
from harness.convert.resolve_source import LATEST, locate
from harness.convert.verify import check_layout, check_output, check_sources
from harness.errors import FormatError, HarnessError
from harness.files import sync_directory, write_atomically
from harness.formats import pt_writer, safetensors, sft_index, tensor_file, tied_weights
from harness.formats.dtypes import SFT
from harness.zero.reader import SavedEngine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "keep": "keep"}

Put = Callable[[str], object]


@dataclass(frozen=True)
class Options:
    """What `harness convert` may be asked for; see its --help."""

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
    """ZeRO stage of the native files that are written instead of weights."""
    ranks: int | None = None
    """Ranks that they are for; None: 1."""
    round_robin: bool | None = None
    """What round_robin_gradients is there; None: false."""
    workers: int = 0
    """Threads; 0: as many as there are processors, at most 4."""


def convert(src: Path, dst: Path, options: Options, put: Put) -> None:
    """Converts `src` (see `locate`) to `dst`: `.sft`, `.pt`, or a directory of shards.

    `put` gets lines for the user. Raises HarnessError if it cannot be done, OSError if the disk
    does not play along; then there is nothing at `dst`, or what was there before.
    """
    _check_target(dst, options)
    found = locate(src, options.engine)
    if options.to_zero is not None:
        _native(found, dst, options, put)
        return
    plan = _plan(found, options)
    if plan is None:
        assert isinstance(found, Path)
        _whole(found, dst, options, put)
        return
    planning.select(plan, options.include, options.exclude)
    planning.rename(plan, options.rename)
    metadata = planning.metadata(plan)
    planning.tie(plan)
    if metadata and dst.suffix in pt_writer.SUFFIXES:
        plan.notes.append(f"a {dst.suffix} has no place for the metadata: {', '.join(metadata)}")
    for note in plan.notes:
        put(f"note: {note}")
    if options.dry_run:
        planning.table(plan, put)
        return
    if options.verify:
        if isinstance(found, SavedEngine):
            check_layout(found)
        with _bar(sum({s: s.size for s in plan.ranges()}.values()), "checking") as progress:
            check_sources(plan.ranges(), progress)
    started = time.perf_counter()
    with _bar(plan.nbytes, "converting") as progress:
        _write(plan, metadata, dst, options, progress)
    seconds = time.perf_counter() - started
    put(
        f"{dst}: {len(plan.tensors)} tensors, {plan.nbytes / 1e6:,.1f} MB in {seconds:.1f} s, "
        f"{plan.nbytes / 1e9 / seconds:.2f} GB/s{', verified' if options.verify else ''}"
    )


def _check_target(dst: Path, options: Options) -> None:
    for_zero = (options.ranks, options.round_robin)
    if options.to_zero is None and any(given is not None for given in for_zero):
        raise HarnessError("--ranks and --round-robin are for --to-zero")
    if options.to_zero is not None:
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise HarnessError(f"{dst} is there already: a checkpoint goes into a new directory")
    elif options.shard_size is not None:
        if options.shard_size <= 0:
            raise HarnessError("--shard-size must be above 0")
        if dst.suffix in pt_writer.SUFFIXES | safetensors.SUFFIXES:
            raise HarnessError(f"{dst}: with --shard-size it must be a directory")
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise HarnessError(f"{dst} is there already: shards go into a new directory")
    elif dst.suffix not in pt_writer.SUFFIXES | safetensors.SUFFIXES:
        known = ", ".join(sorted(pt_writer.SUFFIXES | safetensors.SUFFIXES))
        raise HarnessError(f"{dst}: expected one of {known}, or --shard-size with a directory")
    if not dst.absolute().parent.is_dir():
        raise HarnessError(f"{dst.parent}: no such directory")


def _plan(found: SavedEngine | Path, options: Options) -> ConversionPlan | None:
    """None for a file that holds more than flat tensors."""
    if isinstance(found, SavedEngine):
        return planning.of_engine(found, options.what, DTYPES[options.dtype or "fp32"])
    if options.what != "weights" or options.engine is not None:
        raise HarnessError(f"{found}: --what and --engine are for checkpoints")
    content = tensor_file.read(found)
    if content is None:
        return None
    return planning.of_file(content, DTYPES[options.dtype or "keep"])


def _whole(src: Path, dst: Path, options: Options, put: Put) -> None:
    """A structure of more than flat tensors, through `harness.io`."""
    asked = (options.dtype, options.include, options.exclude, options.rename, options.dry_run)
    if any(asked) or options.verify:
        raise HarnessError(
            f"{src}: more than flat tensors: --dtype, --include, --exclude, --rename, --dry-run "
            "and --verify do not apply"
        )
    from harness import io  # late: it needs torch

    io.save(io.load(src, lazy=True), dst, options.shard_size)
    put(f"{dst}: {dst.stat().st_size / 1e9:.3f} GB" if dst.is_file() else str(dst))


def _native(found: SavedEngine | Path, dst: Path, options: Options, put: Put) -> None:
    """A checkpoint of plain DeepSpeed's, laid out for another ZeRO stage and number of ranks."""
    given = (options.dtype, options.include, options.exclude, options.rename, options.shard_size)
    if any(given) or options.what != "weights" or options.dry_run or options.verify:
        raise HarnessError("--to-zero takes no option but --ranks, --round-robin and --engine")
    if not isinstance(found, SavedEngine):
        raise HarnessError(f"{found}: --to-zero needs a checkpoint: there is no optimizer's state")
    ranks = 1 if options.ranks is None else options.ranks
    if ranks < 1:
        raise HarnessError(f"--ranks {ranks}: expected 1 or more")
    from harness.zero.writer import Native  # late: it needs torch

    assert options.to_zero is not None
    native = Native(found, options.to_zero, ranks, options.round_robin)
    tag = f"global_step{found.model['global_steps']}"
    needed = sum(path.stat().st_size for path in found.directory.iterdir())
    with _staged(dst, needed) as staged:
        (staged / tag).mkdir()
        native.write(staged / tag)
        write_atomically(staged / LATEST, lambda path: path.write_text(tag))
    put(f"{dst}: {tag} for {ranks} ranks at ZeRO {options.to_zero}")
    for note in native.notes:
        put(f"note: {note}")


def _write(
    plan: ConversionPlan, metadata: dict[str, str], dst: Path, options: Options, progress: Progress
) -> None:
    workers = options.workers or min(4, os.cpu_count() or 1)

    def copied(names: Mapping[str, PlannedTensor], path: Path, aliases: Mapping[str, str]) -> None:
        written: list[Written] = []
        is_pt = path.suffix in pt_writer.SUFFIXES

        def fill(writer: safetensors.Writer | pt_writer.Writer) -> None:
            with_crc = is_pt or options.verify
            written[:] = copy(
                names, writer.tensors, writer.fileno(), workers, progress, with_crc, whole=is_pt
            )
            if isinstance(writer, pt_writer.Writer):
                writer.crcs |= {part.name: part.crc for part in written}
            if options.verify:
                os.fsync(writer.fileno())
                check_output(Path(f"/proc/self/fd/{writer.fileno()}"), written, lambda _: None)

        described = {name: (planned.dtype, planned.shape) for name, planned in names.items()}
        if is_pt:
            pt_writer.write(path, described, fill, aliases)
        else:
            short = {
                name: (_short(name, dtype), shape) for name, (dtype, shape) in described.items()
            }
            safetensors.write(
                path,
                short,
                fill,
                {"format": "pt"} | metadata | tied_weights.described(names, aliases),
            )

    if options.shard_size is None:
        copied(plan.tensors, dst, plan.aliases)
        return
    parts = sft_index.split({n: p.nbytes for n, p in plan.tensors.items()}, options.shard_size)
    with _staged(dst, plan.nbytes) as staged:
        for number, part in enumerate(parts):
            path = staged / sft_index.shard_name(number, len(parts))
            copied({name: plan.tensors[name] for name in part}, path, {})
        described = tied_weights.described(plan.tensors, plan.aliases)
        total: dict[str, Any] = {"total_size": plan.nbytes}
        sft_index.write_index(staged, parts, total | metadata | described)


@contextmanager
def _staged(dst: Path, needed: int) -> Iterator[Path]:
    """A new directory that becomes `dst` when the context ends well."""
    free = shutil.disk_usage(dst.absolute().parent).free
    if needed > free:
        raise HarnessError(f"{dst}: {needed / 1e9:.3f} GB do not fit: {free / 1e9:.3f} GB are free")
    staged = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    staged.mkdir()
    try:
        yield staged
        staged.replace(dst)  # also if it is there, and empty
        sync_directory(dst.absolute().parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _short(name: str, dtype: str) -> str:
    if dtype not in SFT or dtype == "float4_e2m1fn_x2":
        raise FormatError(f"tensor {name!r}: safetensors files have no {dtype}; convert to .pt")
    return SFT[dtype]


@contextmanager
def _bar(total: int, doing: str) -> Iterator[Progress]:
    """A progress bar in GB/s where somebody looks."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm  # late: nobody waits for it who does not look

    with tqdm(total=total, desc=doing, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update

"""Describes a checkpoint, an `.sft` or a `.pt`: no weights are loaded, no pickled code is run."""

import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.checkpoint.files import bytes_text, reading, verify_file
from harness.checkpoint.manifest import Manifest, is_safe, read_manifest
from harness.convert.dropped_saves import FILE, Dropped
from harness.convert.run_checkpoints import BEST, MANIFEST, linked_in, may_hold_manifest, steps_in
from harness.errors import CheckpointError, UnreadableCheckpoint, counted, missing_files
from harness.health import goodput
from harness.remote_path import as_path


def describe(what: str, verify: bool = False) -> Iterator[str]:
    """`describe_path`, or of a URL `describe_url`."""
    if "://" not in what:
        return describe_path(Path(what), verify)
    if verify:
        raise CheckpointError(f"{what}: --verify reads files of a disk: download the checkpoint")
    return describe_url(what)


def describe_path(path: Path, verify: bool = False) -> Iterator[str]:
    """Lines that describe a run directory with its ledger, a checkpoint, a file of weights, or what
    `resolve_source` takes of another directory.

    `verify` reads the files of a checkpoint of a run and checks every CRC; otherwise their sizes
    are checked. Raises CheckpointError or FormatError for any other path, and for what is damaged
    or incomplete; for a run directory, after all its checkpoints have been described.
    """
    found = (steps_in(parent) for parent in (path, path / "checkpoints"))
    steps = next((paths for paths in found if any(map(may_hold_manifest, paths))), None)
    if (path / MANIFEST).is_file():
        dropped, failure = _read_dropped(path.absolute().parent)
        yield from _describe_checkpoint(path, read_manifest(path), verify, dropped)
        if failure is not None:
            raise failure
    elif steps:
        yield from goodput.table(path / goodput.FILE)
        yield from _describe_run(path, steps, verify)
    else:
        from harness.checkpoint.describe_weights import describe_weights  # a run has no need of it

        yield from describe_weights(path)


def _describe_run(path: Path, directories: list[Path], verify: bool) -> Iterator[str]:
    failures: dict[str, CheckpointError] = {}
    dropped, failure = _read_dropped(directories[0].parent)
    if failure is not None:
        yield str(failure)
        failures[FILE] = failure
    for directory in directories:
        try:
            yield from _describe_checkpoint(directory, read_manifest(directory), verify, dropped)
        except CheckpointError as error:
            yield f"  {error}"
            failures[directory.name] = error
    unreadable = [n for n, e in failures.items() if isinstance(e, UnreadableCheckpoint)]
    broken = [name for name in failures if name not in unreadable]
    found = {"damaged or incomplete on this host": broken, "cannot be judged": unreadable}
    if reports := [f"{what}: {', '.join(names)}" for what, names in found.items() if names]:
        raise CheckpointError(f"{path}: {'; '.join(reports)}")


def _read_dropped(parent: Path) -> tuple[Dropped, CheckpointError | None]:
    """What rollbacks have dropped, or none and why that is not known."""
    try:
        with reading(parent / FILE):
            return Dropped.read(parent), None
    except CheckpointError as error:
        return Dropped(), error


def describe_url(url: str) -> Iterator[str]:
    """Lines that describe the checkpoints below a URL, or the one at it. Of each file the size is
    looked at, and nothing else is read. Or those of a file of weights, or of an engine's files.
    Raises CheckpointError as `describe_path`."""
    from harness.checkpoint.remote_store import Store, split_url  # imports fsspec
    from harness.zero.reader import is_engine  # late: a run's directory needs no reader of files

    base, wanted = split_url(url)
    store, broken = Store(base), []
    path = as_path(url)
    if path.is_file() or is_engine(path):
        from harness.checkpoint.describe_weights import describe_weights

        yield from describe_weights(path)
        return
    found, best = store.checkpoints(), linked_in(as_path(base))
    if not found or (wanted and wanted not in found):
        there = ", ".join(found) or "none"
        raise CheckpointError(f"{url}: expected a checkpoint, or a run's; found there: {there}")
    for name in [wanted] if wanted else found:
        manifest = found[name]
        is_best = best is not None and name == best.name
        yield from _describe_manifest(f"{store.url}/{name}", manifest, is_best)
        files = manifest.files.items()
        missing = [file for file, entry in files if not store.has(name, file, entry.size)]
        for file, entry in files:
            note = "  missing, or of another size" if file in missing else ""
            yield f"  {bytes_text(entry.size)}  {file}{note}"
        total = bytes_text(sum(entry.size for _, entry in files))
        yield f"  {total}  in total, sizes checked{': complete' if not missing else ''}"
        broken += [name] if missing else []
    if broken:
        raise CheckpointError(f"{url}: damaged or incomplete in the store: {', '.join(broken)}")


def _describe_manifest(
    path: Path | str, manifest: Manifest, is_best: bool = False, marks: Iterable[str] = ()
) -> Iterator[str]:
    saved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at))
    pinned = f", pinned as {manifest.pinned}" if manifest.pinned else ""
    best = ", the best" if is_best else ""
    ranks = counted(manifest.world_size, "rank")
    yield f"{path}: step {manifest.step}, {ranks}, saved {saved_at}{pinned}{best}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    for name, engine in manifest.engines.items():
        kind = f"{engine.dtype}, optimizer {engine.optimizer}"
        yield f"  engine {name}: ZeRO stage {engine.zero_stage}, {kind}"
    for text in filter(None, (manifest.fault, manifest.note, *marks)):
        yield f"  {text}"
    for name, value in manifest.metrics.items():
        yield f"  {name} {value:.6g}"


def _marks(path: Path, manifest: Manifest, dropped: Dropped) -> Iterator[str]:
    if is_safe(path, manifest):
        yield "safe: every file is on two nodes"
    if dropped.has(manifest.saved_at):
        yield 'dropped by a rollback: "latest" does not mean it'


def _describe_checkpoint(
    path: Path, manifest: Manifest, verify: bool, dropped: Dropped
) -> Iterator[str]:
    best = linked_in(path.parent)
    is_best = best is not None and path.name in (BEST, best.name)
    yield from _describe_manifest(path, manifest, is_best, _marks(path, manifest, dropped))
    files = {name: path / name for name in manifest.files}
    missing = {n: manifest.writer(n) for n, file in files.items() if not file.is_file()}
    for name, entry in manifest.files.items():
        note = f"  missing, written by {missing[name]}" if name in missing else ""
        yield f"  {bytes_text(entry.size)}  {name}{note}"
    for name, entry in manifest.files.items():
        if name not in missing:
            verify_file(files[name], entry, read=verify)
    if missing:
        raise CheckpointError(missing_files(path, missing, [socket.gethostname()]))
    total = sum(entry.size for entry in manifest.files.values())
    checks = "every CRC checked" if verify else "sizes checked"
    yield f"  {bytes_text(total)}  in total, {checks}: complete"

"""Downloads: a checkpoint of a store onto the disks that a run resumes from (`checkpoint.remote`).

A node that is lost takes its disk along: what is missing on the remaining disks comes from the
store. Each rank downloads its share: the files that it wrote itself, if the number of ranks is the
same. What several ranks read is then sent between them, as in any resume.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from itertools import chain, takewhile
from pathlib import Path

from harness import distributed
from harness.checkpoint.commit import commit, create_staging
from harness.checkpoint.completeness import Verify, complete_saves, verify_checkpoint
from harness.checkpoint.disks import Disks
from harness.checkpoint.files import FileEntry, verify_file
from harness.checkpoint.manifest import Manifest, read_manifest
from harness.checkpoint.memory import Memory
from harness.checkpoint.remote_store import PARALLEL_FILES, Store, local_name, split_url
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import MANIFEST
from harness.errors import CheckpointError, UnreadableCheckpoint
from harness.files import is_present, sync_directory

log = logging.getLogger(__name__)
log_info = distributed.global_leader_only(log.info)
log_warning = distributed.global_leader_only(log.warning)


def download_requested(
    url: str, parent: Path, disks: Disks, own: Store | None, dropped: Dropped
) -> str:
    """Downloads the checkpoint at a URL, or the newest good one below it. Returns its path.

    `parent`: where the run's checkpoints are. `own`: its store, below whose URL what rollbacks have
    `dropped` is not the newest. Collective. Raises CheckpointError on all ranks.
    """
    base, last = split_url(url)
    with distributed.raise_on_all_ranks(f"run.resume = {url!r}"):
        store = Store(base)
        known = store.checkpoints(not last) if distributed.is_global_leader() else {}
        passed_over = dropped if own is not None and store.url == own.url else Dropped()
        good = _good(known, passed_over)
        name = (last or next(iter(good), "")) if distributed.is_global_leader() else ""
        if distributed.is_global_leader() and name not in known:
            if known and not last:
                raise CheckpointError(_none_is_good(store, known))
            there = ", ".join(known) or "none"
            raise CheckpointError(f"{url}: expected a checkpoint, or a run's; found there: {there}")
    name, manifest = distributed.broadcast((name, known.get(name)))
    assert manifest is not None
    return str(_download(store, name, manifest, parent, disks))


def _good(known: dict[str, Manifest], dropped: Dropped) -> list[str]:
    """Those that "latest" may mean, as on a disk."""
    return [
        name
        for name, manifest in known.items()
        if manifest.finite is not False and not dropped.has(manifest.saved_at)
    ]


def _none_is_good(store: Store, known: Iterable[str]) -> str:
    return (
        f"{store.url}: none of its checkpoints has finite weights, or rollbacks have dropped them: "
        f"set run.resume to the URL of one of them ({', '.join(known)})"
    )


def download_newest(
    store: Store,
    parent: Path,
    disks: Disks,
    dropped: Dropped,
    verify: Verify,
    memory: Memory | None = None,
) -> None:
    """Downloads the newest good checkpoint of a run's own `store`, unless the disks together, or
    the `memory`, hold it or a newer one undamaged, or a rollback has `dropped` it; what is damaged
    of it as well. `verify`: checks a file. Collective. Raises CheckpointError on all ranks."""
    known: dict[str, Manifest] = {}
    failure = ""
    if distributed.is_global_leader():
        try:
            known = store.checkpoints(all_readable=True)
        except CheckpointError as error:
            failure = str(error)
    name = next(iter(_good(known, dropped)), "")
    name, manifest, failure = distributed.broadcast((name, known.get(name), failure))
    places = [complete_saves(parent, disks, dropped)]
    if memory is not None:
        places.append(complete_saves(memory.directory, memory.disks, dropped))
    held = merge(*places, key=lambda found: found[1].saved_at, reverse=True)
    newest = next(held, None)
    with distributed.raise_on_all_ranks("checkpoint.remote"):
        if failure and newest is None:
            raise CheckpointError(
                f"{failure}: whether this run has checkpoints there is not known: set "
                "run.resume = 'none' to start it anew"
            )
        if known and manifest is None and newest is None:
            raise CheckpointError(
                f"{_none_is_good(store, known)}, or to 'none' to start the run anew"
            )
    if failure:
        log_warning("%s: resuming without it", failure)
        return
    held = chain(filter(None, [newest]), held)
    if manifest is not None and not _has(held, manifest, verify):
        _download(store, name, manifest, parent, disks, verify)


def _has(held: Iterable[tuple[Path, Manifest]], stored: Manifest, verify: Verify) -> bool:
    """Whether what is held, the newest first, has the newest one of the store undamaged, or a newer
    one. Collective."""
    for directory, manifest in takewhile(lambda found: found[1].saved_at >= stored.saved_at, held):
        try:
            verify_checkpoint(directory, verify)
        except UnreadableCheckpoint:  # told by `choose_checkpoint`
            return True
        except CheckpointError as error:
            if manifest.saved_at == stored.saved_at:  # else told there as well
                log_warning("%s", error)
        else:
            return True
    return False


def _download(
    store: Store,
    name: str,
    manifest: Manifest,
    parent: Path,
    disks: Disks,
    verify: Verify = verify_file,
) -> Path:
    """Downloads what is missing or damaged of a checkpoint, and commits it on all disks."""
    target = parent / local_name(name)
    doing = f"cannot download {store.url}/{name}"
    with checkpoint_error_on_all_ranks(doing):
        has_parts = _is_of_save(target, manifest)
    directory = target if has_parts else target.with_name(f"{target.name}.tmp")
    replaces = not has_parts and target.exists()  # which must be another save that is whole
    missing = [
        file
        for file in _share(manifest)
        if not (has_parts and _is_whole(target / file, manifest.files[file], verify))
    ]
    needed = disks.sum(sum(manifest.files[file].size for file in missing))
    log_info("downloading %s/%s", store.url, name)
    with checkpoint_error_on_all_ranks(doing):
        if disks.is_leader and not has_parts:
            create_staging(directory, needed)

    def fetch(file: str) -> None:
        path = directory / file
        path.parent.mkdir(exist_ok=True)
        store.download(name, file, path)
        # What is in it, too, when it is resumed from; or now, if another save goes for it.
        verify_file(path, manifest.files[file], read=replaces)
        sync_directory(path.parent)

    with (
        checkpoint_error_on_all_ranks(doing),
        ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as pool,
    ):
        list(pool.map(fetch, missing))
    commit(manifest, directory, target, disks.is_leader and not has_parts)
    return target


def _is_whole(path: Path, entry: FileEntry, verify: Verify) -> bool:
    try:
        verify(path, entry)
    except CheckpointError:
        return False
    return True


def _share(manifest: Manifest) -> list[str]:
    rank, world_size = distributed.global_rank(), distributed.world_size()
    if manifest.world_size != world_size:
        return list(manifest.files)[rank::world_size]
    return [name for name, entry in manifest.files.items() if entry.rank == rank]


def _is_of_save(directory: Path, manifest: Manifest) -> bool:
    """Whether this disk has a part of the same save."""
    try:
        return is_present(directory / MANIFEST) and (
            read_manifest(directory).saved_at == manifest.saved_at
        )
    except CheckpointError:
        return False

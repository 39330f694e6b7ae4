"""Uploading a checkpoint to a real S3 server on this machine (moto), and what training waits for.

    python -m bench.upload [--ranks 2] [--width 4600] [--rounds 3] [--directory DIR]

Prints the seconds in which the ranks upload a checkpoint (`checkpoint.remote`), in which one
process does, and in which s3fs puts the same files; then how much longer steps take beside an
upload and beside a save in the background, and the longest of them. Medians of interleaved rounds.
The server takes its share of the same cores, at a lower priority: on a machine of its own it would
be faster, and so would steps beside an upload. Needs moto[s3] and s3fs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bench import resume
from bench.rows import Row, tell, tell_pair
from harness.config import Config
from harness.config.sections import merge
from harness.testing.pool import RankPool

BUCKET = "bench"


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with a bucket; the environment has the credentials for it."""
    command = ["nice", "-n", "10", sys.executable, "-m", "moto.server", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if "Running on http://" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # it logs each request
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
        os.environ["AWS_ENDPOINT_URL"] = address
        try:
            yield address
        finally:
            server.kill()


def measure(config: Config, rounds: int) -> dict[str, list[float]]:
    """Seconds and ratios of every way on this rank; and the bytes of a checkpoint."""
    import s3fs

    from harness import distributed
    from harness.callbacks.moments import Callbacks
    from harness.checkpoint.copies import Copies
    from harness.checkpoint.disks import find_disks
    from harness.checkpoint.remote_store import PARALLEL_FILES, Store
    from harness.checkpoint.save import Saver
    from harness.checkpoint.uploads import Uploads
    from harness.control.live import LiveConfig
    from harness.data.step_batches import StepBatches
    from harness.data.train_batches import train_batches
    from harness.engine.build import build_engines
    from harness.task import load_task
    from harness.utils import to_device

    task = load_task(config)
    rank, world_size = distributed.global_rank(), distributed.world_size()
    batches = train_batches(task.train_data, config.data, task.collate, 0, rank, world_size)
    engines, position = build_engines(task, config), StepBatches(batches)
    batch = to_device(next(batches), distributed.device())
    engines.step(batch)
    server = s3fs.S3FileSystem()
    if rank == 0:
        server.mkdir(BUCKET)
    distributed.barrier()
    store = Store(f"s3://{BUCKET}/run")
    copies = Copies(Uploads(store, lambda: config.checkpoint))
    disks, live = find_disks(config.run_dir), LiveConfig(config)
    background = Config.model_validate(
        merge(config.model_dump(), {"checkpoint": {"background": True}})
    )
    saver = Saver(engines, position, live, disks, Callbacks([]), [copies])
    behind = Saver(engines, position, LiveConfig(background), disks, Callbacks([]))
    saver.save({})
    copies.finish(lambda: False)
    behind.save({})  # the first one allocates
    behind.wait()
    (directory,) = saver.directory.glob("step-*")
    files = [path for path in directory.rglob("*") if path.is_file()]

    def step() -> float:
        started = time.perf_counter()
        engines.step(batch)
        saver.poll()
        behind.poll()
        return time.perf_counter() - started

    def beside_an_upload() -> list[float]:
        saver.save({})
        took = []
        while copies.needs:
            took.append(step())
        return took

    def beside_a_save() -> list[float]:
        behind.save({})
        took = []
        while behind.is_writing:
            took.append(step())
        return took

    def all_ranks() -> None:
        copies.finish(lambda: False)

    def put(path: Path) -> None:
        store.upload(path, "one", path.name, lambda: False)

    def one_process() -> None:
        if rank == 0:
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                list(pool.map(put, files))

    def by_s3fs() -> None:
        if rank == 0:
            server.put(str(directory), f"{BUCKET}/theirs", recursive=True)

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "upload by all ranks": (lambda: saver.save({}), all_ranks),
        "upload by one process": (lambda: None, one_process),
        "s3fs": (lambda: None, by_s3fs),
    }
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (prepare, way) in ways.items():
            prepare()
            os.sync()
            distributed.barrier()
            started = time.perf_counter()
            way()
            distributed.barrier()
            found.setdefault(name, []).append(time.perf_counter() - started)
        alone = statistics.median(step() for _ in range(10))
        for name, beside in (("upload", beside_an_upload), ("save", beside_a_save)):
            took = beside()
            for what, seconds in (("a step", statistics.median(took)), ("the longest", max(took))):
                found.setdefault(f"{what} beside the {name}", []).append(seconds / alone)
    found["bytes"] = [float(sum(path.stat().st_size for path in files))]
    saver.close()
    behind.close()
    engines.close()
    return found


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=4600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-upload-", dir=args.directory))
    try:
        with s3_server(), RankPool(args.ranks, timeout_s=1200) as pool:
            config = resume.config_of(directory, 1, args.width)
            found = pool.run(measure, config, args.rounds)[0]
    finally:
        shutil.rmtree(directory)
    size = found.pop("bytes")[0]
    sys.stdout.write(f"{size / 1e9:.2f} GB, {args.ranks} ranks, medians of {args.rounds}\n")
    theirs = found["s3fs"]
    for name, values in found.items():
        median, spread = statistics.median(values), f"{min(values):.2f} .. {max(values):.2f}"
        if "beside" in name:
            sys.stdout.write(f"{name:<30} {median:6.2f} x a step alone  ({spread})\n")
        else:
            ratio = median / statistics.median(theirs)
            sys.stdout.write(f"{name:<30} {median:6.2f} s  {ratio:5.2f} x s3fs  ({spread})\n")
    claim = f"an upload of {size / 1e9:.2f} GB"
    tell_pair(claim, "s", found["upload by all ranks"], "s3fs put", theirs)
    tell_pair(f"{claim}, one process", "s", found["upload by one process"], "s3fs put", theirs)
    ours, other = (found[f"a step beside the {name}"] for name in ("upload", "save"))
    medians = statistics.median(ours), statistics.median(other)
    tell(Row("a step beside an upload", medians[0], "x alone", "beside a save", medians[1]))


if __name__ == "__main__":
    main()

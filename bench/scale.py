"""What the small messages of harness cost against the number of ranks: measured, and by a model.

    python -m bench.scale [--ranks 2 4 8 16 32 64] [--rounds 5] [--hop-us 50] [--plot FILE.svg]
    python -m bench.scale --check RANKS
    python -m bench.scale --files RANKS [--checkpoints 5]

The first runs so many ranks on this machine (`light_ranks`): the time of an agreement along the
tree, and of gloo's all-reduce, a ring, best of the rounds; beside what the model says for this
machine's cores, with the latency and the CPU time of a message as 2 ranks have them. Then the model
for 10 to 100,000 ranks, `--hop-us` from one to the other: as it is, and with that CPU time on cores
of their own. `--check`: fails
if the connections of a rank, or the messages that it sends, are not those of the model. `--files`:
reading, listing and pruning checkpoints with the entries of so many ranks.
"""

import argparse
import heapq
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench import light_ranks
from harness import distributed
from harness.distributed import tree


def write(text: str) -> None:
    """Writes a line."""
    sys.stdout.write(f"{text}\n")


SIZES = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]


class Network(NamedTuple):
    """What a message costs, in seconds."""

    latency: float
    """From the end of its sending to the beginning of its receiving."""
    work: float
    """CPU time of a rank to send it, and again to receive it."""
    cores: int | None = None
    """That all ranks share; None: each has its own."""


def connections_of(rank: int, ranks: int) -> int:
    """To how many others a rank is connected: its parent, and a child for each number of zeros that
    its number ends with."""
    steps = [2**bit for bit in range(ranks.bit_length())]
    children = [step for step in steps if rank % (2 * step) == 0 and rank + step < ranks]
    return len(children) + (rank > 0)


def tree_s(ranks: int, network: Network) -> float:
    """How long an agreement takes along the tree, simulated message by message."""
    pending = [connections_of(rank, ranks) - (rank > 0) for rank in range(ranks)]
    children: list[list[int]] = [[] for _ in range(ranks)]
    for rank in range(1, ranks):
        children[rank & (rank - 1)].append(rank)
    free, cores = [0.0] * ranks, [0.0] * (network.cores or 0)
    # When it can begin, the first that is ready first; which rank does what, and for which child.
    events: list[tuple[float, int, int, str, int]] = []
    order = itertools.count()

    def add(ready: float, rank: int, what: str, child: int = 0) -> None:
        heapq.heappush(events, (ready, next(order), rank, what, child))

    for rank in (rank for rank in range(ranks) if not pending[rank]):
        add(0.0, rank, "up")
    while events:
        ready, _, rank, what, child = heapq.heappop(events)
        start = max(ready, free[rank], heapq.heappop(cores) if cores else 0.0)
        free[rank] = end = start + network.work
        if network.cores:
            heapq.heappush(cores, end)
        if what == "up":
            add(end + network.latency, rank & (rank - 1), "from below")
        elif what == "down":
            add(end + network.latency, child, "from above")
        else:
            pending[rank] -= what == "from below"
            if what == "from below" and not pending[rank] and rank:
                add(end, rank, "up")
            elif not pending[rank]:
                for child in reversed(children[rank]):
                    add(end, rank, "down", child)
    return max(free)


def ring_s(ranks: int, network: Network) -> float:
    """How long gloo's all-reduce takes: 2 (ranks - 1) rounds, in each of which every rank sends and
    receives a message."""
    shared = 2 * network.work * ranks / network.cores if network.cores else 0.0
    return 2 * (ranks - 1) * max(network.latency + 2 * network.work, shared)


def measure(rounds: int, repeats: int) -> dict[str, float]:
    """On a rank: seconds of an agreement and of gloo's all-reduce, and CPU seconds of the first."""
    vector = torch.zeros(4, dtype=torch.int64)
    options = dist.AllreduceOptions()
    ways: dict[str, Any] = {
        "tree": lambda: distributed.all_reduce_max([0, 0, 0, 0]),
        "ring": lambda: distributed.control_group().allreduce([vector], options).wait(),
    }
    found: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first connects the ring
        for name, way in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                way()
            seconds = (time.perf_counter() - started) / repeats
            found[name] = min(seconds, found.get(name, seconds))
            seconds = (time.process_time() - cpu) / repeats
            found[f"{name} cpu"] = min(seconds, found.get(f"{name} cpu", seconds))
    return found


class _Counting:
    """The control group, which counts what is sent through it."""

    def __init__(self, group: Any, sent: Counter[int]):
        self._group, self._sent, self.recv = group, sent, group.recv

    def send(self, tensors: Any, rank: int, tag: int) -> Any:
        self._sent[rank] += 1
        return self._group.send(tensors, rank, tag)


def count() -> tuple[int, dict[str, int]]:
    """On a rank: its connections after exchanges of all kinds, and the messages sent in each."""
    kinds: dict[str, Any] = {
        "agreement": lambda: distributed.all_reduce_max([1]),
        "broadcast": lambda: distributed.broadcast("value"),
        "gather": lambda: distributed.gather(distributed.global_rank()),
        "agreement on a value": lambda: distributed.all_reduce({1}, lambda a, b: a | b),
    }
    sent: dict[str, int] = {}
    for name, exchange in kinds.items():
        counter: Counter[int] = Counter()
        group = _Counting(distributed.control_group(), counter)
        tree.control_group = lambda group=group: group  # type: ignore[assignment]
        exchange()
        sent[name] = counter.total()
    time.sleep(1)  # until what connects has connected
    return light_ranks.connections(), sent


def check(ranks: int) -> None:
    """Compares with the model. A value is two messages: its size goes first."""
    for rank, (connections, sent) in enumerate(light_ranks.run(ranks, count)):
        expected = connections_of(rank, ranks)
        up, down = int(rank > 0), expected - (rank > 0)
        model = {
            "agreement": up + down,
            "broadcast": 2 * down,
            "gather": 2 * up,
            "agreement on a value": 2 * up + 2 * down,
        }
        assert (connections, sent) == (expected, model), f"rank {rank}: {connections}, {sent}"
    write(f"{ranks} ranks: at most {connections_of(0, ranks)} connections, as by the model")


def compare(sizes: Sequence[int], rounds: int, hop_s: float) -> dict[str, list[tuple[int, float]]]:
    """Prints the tables. Returns the points of the plot in ms, by line."""
    cores = len(os.sched_getaffinity(0))
    lines: dict[str, list[tuple[int, float]]] = {"tree, measured": [], "ring, measured": []}
    network = Network(0, 0)
    write("  ranks  tree ms  model  ratio   ring ms  ring/tree")
    for ranks in sizes:
        per_rank = light_ranks.run(ranks, measure, rounds, max(5, 400 // ranks))
        found = {name: max(each[name] for each in per_rank) for name in ("tree", "ring")}
        if ranks == 2:  # 2 hops, each of which is sent and received
            work = sum(each["tree cpu"] for each in per_rank) / 4
            network = Network(max(0.0, found["tree"] / 2 - 2 * work), work, cores)
        model = tree_s(ranks, network)
        write(
            f"{ranks:7} {1e3 * found['tree']:8.2f} {1e3 * model:6.2f} {found['tree'] / model:6.2f} "
            f"{1e3 * found['ring']:9.2f} {found['ring'] / found['tree']:10.1f}"
        )
        for name, seconds in found.items():
            lines[f"{name}, measured"].append((ranks, 1e3 * seconds))
    write(f"a message here: {1e6 * network.latency:.0f} us, and twice {1e6 * network.work:.0f} us")
    hop, name = Network(hop_s, 0), f"{1e6 * hop_s:.0f} us a hop"
    models = {
        f"tree, {name}": lambda ranks: tree_s(ranks, hop),
        f"tree, {name} + CPU": lambda ranks: tree_s(ranks, Network(hop_s, network.work)),
        f"ring, {name}": lambda ranks: ring_s(ranks, hop),
    }
    lines |= {what: [(n, 1e3 * of(n)) for n in SIZES] for what, of in models.items()}
    write(f"\nmodel, in ms:\n{'ranks':>8}" + "".join(f"{what:>24}" for what in models))
    for points in zip(*(lines[what] for what in models), strict=True):
        write(f"{points[0][0]:8}" + "".join(f"{ms:24.2f}" for _, ms in points))
    return lines


def plot(lines: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Ranks and ms, both logarithmic."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same picture for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in lines.items():
        kind, _, how = name.partition(", ")
        style = "o" if how == "measured" else "--" if "CPU" in how else "-"
        axes.loglog(*zip(*points, strict=True), style, label=name, color=_COLORS[kind], ms=4)
    axes.axhline(5, color="gray", lw=0.8, ls=":")
    axes.set(xlabel="ranks", ylabel="ms", title="An agreement of all ranks")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


_COLORS = {"tree": "tab:blue", "ring": "tab:red"}


def files(ranks: int, checkpoints: int) -> None:
    """Times what the leader of a disk does with the checkpoints of so many ranks."""
    from harness.checkpoint import inspect
    from harness.checkpoint.manifest import EngineManifest, Manifest, read_manifest, step_directory
    from harness.checkpoint.retention import prune
    from harness.checkpoint.written import write_file
    from harness.config.sections import CheckpointConfig
    from harness.convert.run_checkpoints import checkpoints_in

    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary) / "checkpoints"
        parent.mkdir()
        entry = write_file({"x": torch.zeros(4)}, parent / "file.pt")
        content = (parent / "file.pt").read_bytes()
        kinds = ("model_states", "optim_states")
        names = {f"rank-{rank:05d}.pt": rank for rank in range(ranks)}
        for kind in kinds:
            names |= {f"net/zero_pp_rank_{r}_mp_rank_00_{kind}.pt": r for r in range(ranks)}
        manifest = Manifest(
            step=0,
            world_size=ranks,
            engines={
                "net": EngineManifest(
                    zero_stage=3, dtype="torch.bfloat16", optimizer="torch.optim:AdamW", layout=""
                )
            },
            files={name: replace(entry, rank=rank) for name, rank in names.items()},
            hosts=[f"node{rank // 8:04d}.cluster.example" for rank in range(ranks)],
            config_digest="",
        )
        newest = parent
        for step in range(1, checkpoints + 1):
            newest = step_directory(parent, step)
            (newest / "net").mkdir(parents=True)
            manifest.step, manifest.saved_at = step, float(step)
            _timed("writing a manifest", lambda at=newest: manifest.write(at))
        for name in names:
            (newest / name).write_bytes(content)
        write(f"{ranks} ranks, {len(names)} files")
        _timed("reading a manifest", lambda: read_manifest(newest))
        _timed(f"listing {checkpoints} checkpoints", lambda: checkpoints_in(parent))
        _timed("listing them again", lambda: checkpoints_in(parent))
        _timed("inspecting one", lambda: list(inspect.describe_path(newest)))
        settings = CheckpointConfig(keep_last=checkpoints - 1)
        _timed("pruning one of them", lambda: prune(parent, settings, delete=lambda _: None))
        _timed("pruning none", lambda: prune(parent, settings, delete=lambda _: None))


def _timed(what: str, do: Any) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    do()
    seconds = time.perf_counter() - started
    write(f"  {what:28} {seconds:7.3f} s, CPU {time.process_time() - cpu:7.3f} s")


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hop-us", type=float, default=50)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--check", type=int)
    parser.add_argument("--files", type=int)
    parser.add_argument("--checkpoints", type=int, default=5)
    options = parser.parse_args()
    if options.check:
        check(options.check)
    elif options.files:
        files(options.files, options.checkpoints)
    else:
        lines = compare(options.ranks, options.rounds, options.hop_us / 1e6)
        if options.plot:
            plot(lines, options.plot)


if __name__ == "__main__":
    sys.exit(main())

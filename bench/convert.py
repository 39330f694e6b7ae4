"""Weights of a ZeRO checkpoint: `cp` of the bytes, DeepSpeed's zero_to_fp32, and `harness convert`.

    python -m bench.convert [--gigabytes 2] [--ranks 2 4] [--stages 2 3] [--rounds 3]
                            [--directory DIR]

Prints medians of interleaved rounds with a warm cache, each also as a ratio to `cp` of the same
bytes, and the peak memory: resident, and the anonymous part of it. The checkpoints are synthetic: a
decoder of the usual shapes in DeepSpeed's layout. "synced" ends with fsync, as "harness" does, and
always does outside of a benchmark; the others leave the writing to the system.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.rows import Row, tell, tell_pair

ROOT = Path(__file__).parent.parent


def shapes_of(parameters: float) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder with about that many parameters."""
    width, inner, words = 1024, 2816, 32000
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (words, width)}
    layer = 4 * width * width + 3 * width * inner + 2 * width
    for number in range(max(1, round((parameters - words * width) / layer))):
        block = f"layers.{number}"
        for name in "qkvo":
            shapes[f"{block}.{name}.weight"] = (width, width)
        shapes[f"{block}.up.weight"] = shapes[f"{block}.gate.weight"] = (inner, width)
        shapes[f"{block}.down.weight"] = (width, inner)
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (width,)
    return shapes


def write_checkpoint(directory: Path, stage: int, world: int, parameters: float) -> int:
    """A bf16 checkpoint of masters without moments. Returns the bytes of the masters."""
    return write_checkpoint_of(shapes_of(parameters), directory, stage, world)


def write_checkpoint_of(
    sizes: Mapping[str, tuple[int, ...]], directory: Path, stage: int, world: int
) -> int:
    """`write_checkpoint` of parameters of these shapes."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    shapes = OrderedDict((name, torch.Size(size)) for name, size in sizes.items())
    count = sum(shape.numel() for shape in shapes.values())
    tag = directory / "tag"
    tag.mkdir(parents=True)
    (directory / "latest").write_text("tag")
    model: dict[str, Any] = dict.fromkeys(("optimizer", "lr_scheduler", "frozen_param_shapes"))
    model |= {"buffer_names": [], "param_shapes": [shapes], "shared_params": {}}
    model |= {"dp_world_size": world, "global_steps": 1, "ds_version": "0", "ds_config": {}}
    model["frozen_param_fragments"] = None
    per_rank = math.ceil(count / (2 * world)) * 2
    masters = torch.randn(0 if stage == 3 else per_rank * world)
    flat = masters[:count].bfloat16()
    parts = flat.split([0 if stage == 3 else shape.numel() for shape in shapes.values()])
    model["module"] = {
        name: part if stage == 3 else part.view(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    prefix = "bf16_zero_pp_rank_"
    for rank in range(world):
        if stage == 3:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            size = sum(math.ceil(shape.numel() / world) for shape in shapes.values())
        else:
            torch.save(model, tag / "mp_rank_00_model_states.pt")
            size = per_rank
        flat = torch.randn(size) if stage == 3 else masters[rank * size : (rank + 1) * size]
        padding = max(0, (rank + 1) * size - count) if stage < 3 else 0
        base = {"state": {0: {}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        if stage == 3:
            optimizer = {"optimizer_state_dict": base, "fp32_flat_groups": [flat]}
        else:
            lean_flat = flat[: size - padding].clone()
            optimizer = {
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": [lean_flat],
                "group_paddings": [padding],
                "param_alignment_paddings": [[0] * len(shapes)],
            }
        counts = world if stage == 3 else [world]
        optimizer |= {"zero_stage": ZeroStageEnum(stage), "partition_count": counts}
        state = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0"}
        torch.save(state, tag / f"{prefix}{rank}_mp_rank_00_optim_states.pt")
    return 4 * count


ZERO_TO_FP32 = (
    "import sys; from deepspeed.utils.zero_to_fp32 import *; "
    "convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], max_shard_size=None, "
    "safe_serialization={safe})"
)
LAZY = (
    "import sys, torch; from deepspeed.utils.zero_to_fp32 import *; "
    "from safetensors.torch import save_file; "
    "found = get_fp32_state_dict_from_zero_checkpoint(sys.argv[1], lazy_mode=True); "
    "save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[2])"
)
HARNESS = "from harness.cli import main; main()"
NOT_SYNCED = "import os; os.fsync = lambda file: None; " + HARNESS
WARM_UP = (
    "import deepspeed.utils.zero_to_fp32, safetensors.torch, harness.cli, harness.convert.command"
)
"""Reads what all of them import into the cache; a checkpoint is there since it was written."""


def ways(source: Path, target: Path) -> dict[str, list[str]]:
    """The commands by name; each writes below `target`."""
    python = [sys.executable, "-c"]
    rank_files = sorted(map(str, (source / "tag").glob("*optim_states.pt")))
    copies = " && ".join(f"cp '{file}' '{target}'" for file in rank_files)
    output = str(target / "x.sft")
    convert = ["convert", str(source), output]
    return {
        "cp": ["sh", "-c", copies],
        "cp, synced": ["sh", "-c", f"{copies} && sync '{target}'/*"],
        "zero_to_fp32": [*python, ZERO_TO_FP32.format(safe=False), str(source), str(target)],
        "zero_to_fp32, safe": [*python, ZERO_TO_FP32.format(safe=True), str(source), str(target)],
        "zero_to_fp32, lazy": [*python, LAZY, str(source), output],
        "harness, not synced": [*python, NOT_SYNCED, *convert],
        "harness": [*python, HARNESS, *convert],
        "harness to bf16": [*python, NOT_SYNCED, *convert, "--dtype", "bf16"],
    }


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds, and peak MiB: resident, and anonymous, sampled every 10 ms."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count())}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    resident = anonymous = 0
    status = Path(f"/proc/{process.pid}/status")
    while True:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if process.poll() is not None:
            break
        resident = max(resident, int(fields.get("VmHWM", "0").split()[0]))
        anonymous = max(anonymous, int(fields.get("RssAnon", "0").split()[0]))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"{command}: {process.stderr.read().decode()}")
    return seconds, resident / 1024, anonymous / 1024


def compare(directory: Path, stage: int, world: int, gigabytes: float, rounds: int) -> None:
    """Prints the table of one layout."""
    source, target = directory / "source", directory / "target"
    size = write_checkpoint(source, stage, world, gigabytes * 1e9 / 4)
    results: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for name, command in ways(source, target).items():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            os.sync()
            results.setdefault(name, []).append(measure(command))
    shutil.rmtree(source)
    shutil.rmtree(target)
    sys.stdout.write(f"ZeRO-{stage}, {world} ranks, {size / 1e9:.2f} GB, medians of {rounds}\n")
    seconds = {name: statistics.median(run[0] for run in runs) for name, runs in results.items()}
    for name, runs in results.items():
        resident, anonymous = (max(run[column] for run in runs) for column in (1, 2))
        ratio = seconds[name] / seconds["cp"]
        synced = (
            ""
            if name not in ("harness", "cp, synced")
            else "(synced: {:.2f} x)".format(seconds[name] / seconds["cp, synced"])
        )
        sys.stdout.write(
            f"  {name:<20} {seconds[name]:7.2f} s {ratio:7.2f} x cp   "
            f"{resident:7.0f} MiB [{anonymous:.0f}]  {synced}\n"
        )
    sys.stdout.flush()
    for ours, other in (
        ("harness", "cp, synced"),
        ("harness, not synced", "zero_to_fp32"),
        ("harness, not synced", "zero_to_fp32, safe"),
    ):
        each = [[run[0] for run in results[name]] for name in (ours, other)]
        claim = f"convert, ZeRO {stage}, {world} ranks, {size / 1e9:.1f} GB"
        tell_pair(claim + ours.removeprefix("harness"), "s", each[0], other, each[1])
    peak = [max(run[1] for run in results[name]) for name in ("harness", "zero_to_fp32")]
    claim = f"peak memory of convert, ZeRO {stage}, {world} ranks"
    tell(Row(claim, peak[0], "MiB", "zero_to_fp32", peak[1]))


def main() -> None:
    """Compares at every stage and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of fp32 masters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.directory))
    try:
        measure([sys.executable, "-c", WARM_UP])
        for stage in args.stages:
            for world in args.ranks:
                compare(directory, stage, world, args.gigabytes, args.rounds)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

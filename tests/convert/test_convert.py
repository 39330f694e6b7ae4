"""`harness convert` of checkpoints that plain DeepSpeed wrote, and of files."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from harness import io
from harness.convert.convert import Options, convert
from harness.errors import HarnessError
from harness.formats import pt_reader
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.zero.layout import base_state
from harness.zero.reader import SavedEngine
from tests.support.helpers import Pools, assert_equal, flip_bit, small_disk, tiny_config
from tests.support.plain_deepspeed import layouts, write_all

Checkpoints = Callable[[int], Path]
QUICK = {
    1: {"zero1 bf16"},
    2: set(layouts(2)),
    3: {"zero2 bf16 odd groups", "zero3 fp32 groups"},
    4: {"zero2 bf16 experts", "zero3 bf16 many"},
}
"""By world size, the layouts that are not slow: all of them once, and what ranks change."""
CASES = [
    pytest.param(world, name, marks=[] if name in QUICK[world] else pytest.mark.slow)
    for world in (1, 2, 3, 4)
    for name in layouts(world)
]


@pytest.fixture(scope="module")
def checkpoints(
    pools: Pools, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Checkpoints:
    """Where the checkpoints of all layouts are that so many ranks wrote; the slow ones if asked."""
    is_slow = request.config.getoption("--slow")

    @cache
    def of(world: int) -> Path:
        directory = tmp_path_factory.mktemp(f"world{world}")
        names = [name for name in layouts(world) if is_slow or name in QUICK[world]]
        pools(world).run(write_all, directory, names)
        return directory

    return of


def converted(src: Path, dst: Path, **options: Any) -> dict[str, torch.Tensor]:
    lines: list[str] = []
    convert(src, dst, Options(**options), lines.append)
    assert str(dst) in lines[-1]
    return io.load(dst)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_weights_equal_those_of_zero_to_fp32_and_of_the_engine(
    checkpoints: Checkpoints, tmp_path: Path, world: int, name: str
) -> None:
    directory = checkpoints(world) / name
    live = torch.load(directory / "live.pt")
    found = converted(directory, tmp_path / "fp32.sft", verify=True)
    assert found.keys() == live.keys()
    if (directory / "fp32.pt").exists():
        expected = torch.load(directory / "fp32.pt")
        for missed in live.keys() - expected.keys():  # by zero_to_fp32, at stage 1
            assert missed.startswith("fixed."), missed
        frozen = {key: live[key] for key in live if key.startswith("fixed.")}
        assert_equal(
            found,
            {key: as_fp32(value) for key, value in (live | expected | frozen).items()},
        )
    assert_equal(converted(directory, tmp_path / "keep.sft", dtype="keep"), live)


def as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(
    ("world", "name"), [case for case in CASES if "zero0" not in str(case.values[1])]
)
def test_masters_and_moments_equal_those_of_the_engine(
    checkpoints: Checkpoints, tmp_path: Path, world: int, name: str
) -> None:
    directory = checkpoints(world) / name
    found = converted(directory, tmp_path / "state.sft", what="optimizer")
    expected = torch.load(directory / "state.pt")
    steps = {key: value for key, value in found.items() if key.startswith("optimizer.step.")}
    assert steps and all(value == 2 for value in steps.values())
    if expected:
        assert_equal({key: found[key] for key in found.keys() - steps.keys()}, expected)
    saved = SavedEngine(directory / "here")
    for key in saved.shapes:  # without another reference: at least they match each other
        rounded = found[f"optimizer.master.{key}"].to(torch.load(directory / "live.pt")[key].dtype)
        assert torch.equal(rounded, torch.load(directory / "live.pt")[key])
        moments = (found[f"optimizer.{k}.{key}"] for k in ("exp_avg", "exp_avg_sq"))
        assert all(moment.shape == saved.shapes[key] for moment in moments)


def test_both_formats_and_shards_hold_the_same(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = checkpoints(2) / "zero3 bf16 many"
    expected = converted(directory, tmp_path / "single.sft")
    assert expected["head.weight"].data_ptr() == expected["words.weight"].data_ptr()
    assert_equal(converted(directory, tmp_path / "weights.pt", verify=True), expected)
    assert_equal(torch.load(tmp_path / "weights.pt", mmap=True), expected)
    assert_equal(converted(directory, tmp_path / "shards", shard_size=400), expected)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_equal(converted(tmp_path / "shards", tmp_path / "again.pt"), expected)
    assert_equal(converted(tmp_path / "weights.pt", tmp_path / "again.sft"), expected)
    assert (tmp_path / "again.sft").read_bytes() == (tmp_path / "single.sft").read_bytes()
    with safe_open(tmp_path / "single.sft", "pt") as file:
        assert set(file.keys()) == expected.keys() - {"head.weight"}
    rounded = {key: as_fp32(value).bfloat16() for key, value in expected.items() if key != "seen"}
    found = converted(directory, tmp_path / "bf16.sft", dtype="bf16", exclude=("^seen$",))
    assert_equal(found, rounded)


def test_include_exclude_and_rename(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = checkpoints(2) / "zero2 bf16 odd groups"
    found = converted(
        directory,
        tmp_path / "x.sft",
        include=("weight$", "tilt"),
        exclude=("^fixed",),
        rename=("^(inner|outer)=layers.\\1", "weight$=w"),
    )
    assert set(found) == {"words.w", "head.w", "layers.inner.w", "layers.outer.w", "tilt"}


def test_the_settings_of_the_optimizer_use_the_names_of_its_tensors(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory = checkpoints(2) / "zero2 bf16 odd groups"
    chosen = {"what": "all", "exclude": ("inner", "fixed"), "rename": ("^tilt$=slope", "^=m.")}
    found = converted(directory, tmp_path / "x.sft", **chosen)
    with safe_open(tmp_path / "x.sft", "pt") as file:
        settings = json.loads(file.metadata()["optimizer"])
    groups = [group["params"] for group in settings["param_groups"]]
    assert groups == [["m.words.weight", "m.outer.weight"], ["m.slope"]]
    for name in ("m.words.weight", "m.outer.weight", "m.slope"):
        assert f"optimizer.exp_avg.{name}" in found and name in found
    lines: list[str] = []
    convert(directory, tmp_path / "x.pt", Options(what="optimizer"), lines.append)
    assert lines[1] == "note: a .pt cannot store metadata: dropped optimizer"


def test_metadata_of_other_programs_is_kept(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path / "a.sft", {"author": "somebody"})
    converted(tmp_path / "a.sft", tmp_path / "shards", shard_size=10)
    converted(tmp_path / "shards", tmp_path / "b.sft", dtype="bf16")
    with safe_open(tmp_path / "b.sft", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "somebody"}


def test_a_weight_named_like_state_of_the_optimizer_is_refused(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(write_clash, tmp_path / "clash")
    with pytest.raises(
        HarnessError, match=r"'optimizer.master.w' is both a weight and optimizer state"
    ):
        converted(tmp_path / "clash", tmp_path / "x.sft", what="all")
    assert set(converted(tmp_path / "clash", tmp_path / "x.sft")) == {"optimizer.master.w", "w"}


class Clash(nn.Module):
    """Its buffer has the name that the master of its parameter gets."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.optimizer = nn.Module()
        self.optimizer.master = nn.Module()
        self.optimizer.master.register_buffer("w", torch.zeros(2))


def write_clash(directory: Path) -> None:
    """Collective."""
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    model = Clash()
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,  # type: ignore[arg-type]
        config=config | {"zero_allow_untested_optimizer": True},
    )
    engine.save_checkpoint(str(directory), tag="here")
    engine.destroy()


def test_strided_tensors_become_row_major(tmp_path: Path) -> None:
    """Also one whose few elements are read many times, without memory for all of it."""
    data = {
        "turned": torch.arange(600_000.0).view(600, 1000).t(),
        "wide": torch.arange(9.0)[:, None].expand(9, 4_000_000),
        "some": torch.arange(90)[10:80:7],
    }
    torch.save(data, tmp_path / "a.pt")
    code = (
        "import numpy, psutil, resource\n"
        "from harness.cli import main\n"
        "most = psutil.Process().memory_info().data + (100 << 20)\n"  # less than `wide` takes
        "resource.setrlimit(resource.RLIMIT_DATA, (most, most))\n"
        "main()"
    )
    args = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.sft")]
    subprocess.run([sys.executable, "-c", code, *args], check=True)
    assert_equal(io.load(tmp_path / "b.sft"), data)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_missing_expert_is_noticed(checkpoints: Checkpoints, tmp_path: Path, stage: int) -> None:
    shutil.copytree(checkpoints(2) / f"zero{stage} bf16 experts", tmp_path / "damaged")
    only(tmp_path / "damaged/here", "layer_1_expert_2_*").unlink()
    with pytest.raises(HarnessError, match=r"layer_1_expert_N.* are missing for N = 2: .* has 4 "):
        converted(tmp_path / "damaged", tmp_path / "x.sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("wrods",)}, "no tensor name matches 'wrods'"),
        ({"include": ("(",)}, "not a regular expression"),
        ({"exclude": (".",)}, "leave no tensor to write"),
        ({"rename": ("inner",)}, "expected OLD=NEW"),
        ({"rename": ("weight|bias=x",)}, "two tensors would be named 'fixed.x'"),
        ({"rename": ("nothing=x",)}, "no tensor name matches 'nothing'"),
        ({"rename": ("^tilt$=",)}, "the new name of 'tilt' is empty"),
        ({"ranks": 2}, "--ranks and --round-robin need --to-zero"),
        ({"round_robin": False}, "--ranks and --round-robin need --to-zero"),
        ({"shard_size": 9}, "must be a directory"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    checkpoints: Checkpoints, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(HarnessError, match=message):
        converted(checkpoints(2) / "zero1 bf16", tmp_path / "x.sft", **options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    lines: list[str] = []
    directory = checkpoints(4) / "zero3 bf16 many"
    convert(directory, tmp_path / "x.sft", Options(dtype="bf16", dry_run=True), lines.append)
    fields = [line.split() for line in lines]
    assert ["words.weight", "float32", "->", "bfloat16", "[11,", "7]", "154"] in [
        line[:7] for line in fields
    ]
    assert ["head.weight", "=", "words.weight"] in fields
    assert not list(tmp_path.iterdir())


def test_the_masters_of_zero_0_are_not_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    lines: list[str] = []
    directory = checkpoints(2) / "zero0 bf16"
    convert(directory, tmp_path / "x.sft", Options(), lines.append)
    assert "note: at ZeRO 0 DeepSpeed does not record the names of the fp32 masters" in lines[1]
    with pytest.raises(HarnessError, match="does not record which parameter"):
        convert(directory, tmp_path / "y.sft", Options(what="optimizer"), lines.append)


Damage = Callable[[Path], object]


def in_a_master(path: Path) -> int:
    """A byte of the first fp32 master in a file of optim_states."""
    optimizer = pt_reader.read(path)["optimizer_state_dict"]
    key = "single_partition_of_fp32_groups"
    (first, *_) = optimizer[key] if key in optimizer else optimizer["fp32_flat_groups"]
    return first.start + 1


def changed(path: Path, act: Callable[[torch.Tensor], object], key: str = "step") -> None:
    """Rewrites a rank's file with the first optimizer state of this key (or the master) changed."""
    tree = torch.load(path, weights_only=False)
    optimizer = tree["optimizer_state_dict"]
    if key == "master":
        act(optimizer["single_partition_of_fp32_groups"][0].detach())
    else:
        act(base_state(optimizer)["state"][0][key])
    torch.save(tree, path)


def only(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def hostile(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00false\x85R.")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(10**7))


RANK_2 = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
RANK_1 = "*zero_pp_rank_1_*optim_states.pt"
DAMAGED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda d, _: only(d, RANK_1).unlink(), "optim_states.pt of ranks 1 are missing"),
    "all missing": (
        lambda d, _: [path.unlink() for path in d.glob("*optim_states.pt")],
        "optim_states.pt of ranks 0, 1 are missing",
    ),
    "model missing": (
        lambda d, _: [path.unlink() for path in d.glob("*mp_rank_00_model_states.pt")],
        "not a checkpoint or weights: expected",
    ),
    "truncated": (
        lambda d, _: os.truncate(only(d, RANK_1), only(d, RANK_1).stat().st_size - 99),
        "truncated or damaged: .* copy or download the file again",
    ),
    "code": (
        lambda d, _: hostile(only(d, RANK_1)),
        r"it holds (a|the global) os.system",
    ),
    "bomb": (lambda d, _: bomb(only(d, RANK_1)), "is compressed"),
    "flipped": (
        lambda d, _: flip_bit(only(d, RANK_1), in_a_master(only(d, RANK_1))),
        "wrong CRC of",
    ),
    "more ranks": (
        lambda d, other: shutil.copy(only(other, RANK_1), d / RANK_2),
        "optim_states.pt of ranks 2 are from another save: this one is of 2 ranks",
    ),
    "another layout": (
        lambda d, other: shutil.copy(only(other, RANK_1), only(d, RANK_1)),
        "rank 1 are from another run|do not match its tensors|the sub-group of",
    ),
    "another step": (
        lambda d, _: changed(only(d, RANK_1), lambda step: step.add_(1)),
        "the files of rank 1 are from another run or step than those of rank 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["zero2 bf16 odd groups", "zero3 bf16 many"])
def test_damaged_rank_files_are_refused(
    checkpoints: Checkpoints, tmp_path: Path, name: str, damage: str
) -> None:
    directory = shutil.copytree(checkpoints(2) / name, tmp_path / "damaged") / "here"
    other = checkpoints(2) / ("zero1 bf16" if "zero2" in name else "zero3 bf16 offloaded") / "here"
    act, message = DAMAGED[damage]
    act(directory, other)
    with pytest.raises(HarnessError, match=message) as caught:
        converted(directory, tmp_path / "x.sft", verify=True)
    assert str(directory) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_weights_that_are_not_the_rounded_masters_are_noticed(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A rank's file of another run may match in everything else."""
    directory = shutil.copytree(checkpoints(2) / "zero1 bf16", tmp_path / "mixed") / "here"
    changed(only(directory, RANK_1), lambda master: master.add_(1), "master")
    converted(directory, tmp_path / "x.sft")
    with pytest.raises(HarnessError, match="are not its rounded master weights"):
        converted(directory, tmp_path / "x.sft", verify=True)


@pytest.mark.parametrize("tag", ["../here", "", "/etc", "nowhere", "x\0y", "."])
def test_a_hostile_latest_is_refused(checkpoints: Checkpoints, tmp_path: Path, tag: str) -> None:
    directory = shutil.copytree(checkpoints(2) / "zero0 fp32", tmp_path / "damaged")
    (directory / "latest").write_text(tag)
    with pytest.raises(HarnessError, match="latest"):
        converted(directory, tmp_path / "x.sft")


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "harness.cli", "convert", *map(str, args)]


def test_neither_torch_nor_deepspeed_is_imported(checkpoints: Checkpoints, tmp_path: Path) -> None:
    script = (
        "import sys; from harness.cli import main; main(); "
        "print(sorted({'torch', 'deepspeed', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    src = checkpoints(2) / "zero2 fp32 offloaded"
    for options, heavy in (([], []), (["--what", "all"], []), (["--dtype", "bf16"], ["numpy"])):
        args = ["convert", src, tmp_path / "x.sft", *options]
        found = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines()[-1] == str(heavy)


def test_the_command_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    done = subprocess.run(
        command(checkpoints(2) / "zero3 fp32 groups", tmp_path / "x.sft", "--verify"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("verified\n"), done
    failed = subprocess.run(
        command(tmp_path / "nothing", tmp_path / "y.sft"), capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path / 'nothing'}: no such file or directory\n"


def test_a_full_disk_is_one_message(checkpoints: Checkpoints, tmp_path: Path) -> None:
    limited = (
        f"ulimit -f 1; {shlex.join(command(checkpoints(2) / 'zero1 bf16', tmp_path / 'x.sft'))}"
    )
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.sft", "x.pt", "shards"])
def test_a_disk_without_room_is_one_message(tmp_path: Path, name: str) -> None:
    torch.save({f"w{n}": torch.zeros(1 << 20) for n in range(3)}, tmp_path / "src.pt")
    args = command(tmp_path / "src.pt", tmp_path / "disk" / name)
    with small_disk(tmp_path / "disk", "8m"):
        args += ["--shard-size", "4MB"] if name == "shards" else []
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done
        assert str(tmp_path / "disk" / name) in done.stderr
        assert re.search("No space left on device: 12583|0.008 GB are free", done.stderr)
        assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("option", [{"shard_size": 60_000}, {"to_zero": 3}])
def test_a_failed_write_into_a_new_directory_names_it(
    checkpoints: Checkpoints, tmp_path: Path, option: dict[str, Any]
) -> None:
    src = checkpoints(2) / "zero1 bf16"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            convert(src, tmp_path / "x", Options(**option), lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename.startswith(f"{tmp_path / 'x'}/")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_another_process_writes_meanwhile_is_kept(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    other = tmp_path / "shards/model-00001-of-00001.safetensors"

    def write_other(_: str) -> None:
        other.parent.mkdir(exist_ok=True)
        other.write_text("theirs")

    with pytest.raises(HarnessError, match="shards: another process has written it meanwhile"):
        convert(tmp_path, tmp_path / "shards", Options(shard_size=100), write_other)
    assert other.read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "model.safetensors"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_no_file(tmp_path: Path, number: signal.Signals) -> None:
    torch.save({f"w{n}": torch.zeros(1 << 20) for n in range(64)}, tmp_path / "src.pt")
    # Each write waits, so that the signal arrives during the conversion.
    slow = (
        "import os, time; write = os.pwrite\n"
        "os.pwrite = lambda *args: (time.sleep(0.02), write(*args))[1]\n"
        "from harness.cli import main; main()"
    )
    args = ["convert", str(tmp_path / "src.pt"), str(tmp_path / "dst.sft")]
    process = subprocess.Popen([sys.executable, "-c", slow, *args], stderr=subprocess.PIPE)
    for _ in range(1000):
        if list(tmp_path.glob(".dst.sft.*.tmp")):
            break
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    expected = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert process.returncode == expected[number], stderr
    left = {path.name for path in tmp_path.iterdir()} - {"src.pt"}
    assert "dst.sft" not in left
    if number != signal.SIGKILL:
        assert not left and b"Traceback" not in stderr, stderr


def test_tied_masters_at_zero_0_stay_tied(two_ranks: RankPool, tmp_path: Path) -> None:
    bf16 = {"net": {"ds_overrides": {"bf16": {"enabled": True}}}}
    config = tiny_config(tmp_path, 0, run={"steps": 2}, engines=bf16)
    two_ranks.run(run_in_world, config)
    found = converted(config.run_dir, tmp_path / "x.sft")
    assert not torch.equal(found["middle.weight"], found["middle.weight"].bfloat16().float())
    assert found["again.weight"].data_ptr() == found["middle.weight"].data_ptr()


def test_a_run_of_harness_is_converted(two_ranks: RankPool, tmp_path: Path) -> None:
    """Its newest checkpoint, which is what its last export holds."""
    config = tiny_config(tmp_path, 2, run={"steps": 4}, trainer={"save_every": 2})
    two_ranks.run(run_in_world, config)
    exported = io.load(config.run_dir / "exports/step-00000004/net.sft")
    checkpoints = config.run_dir / "checkpoints"
    for src in (config.run_dir, checkpoints, checkpoints / "step-00000004"):
        assert_equal(converted(src, tmp_path / "x.sft", verify=True), exported)
    assert_equal(converted(checkpoints / "step-00000004/net", tmp_path / "x.sft"), exported)
    with pytest.raises(HarnessError, match=r"no engine 'nte'.*did you mean 'net'"):
        converted(config.run_dir, tmp_path / "y.sft", engine="nte")
    old, new = (only(checkpoints / f"step-0000000{n}/net", RANK_1) for n in (2, 4))
    shutil.copy(old, new)
    with pytest.raises(HarnessError, match="is not the file that was saved"):
        converted(checkpoints / "step-00000004", tmp_path / "y.sft")
    lines: list[str] = []
    convert(config.run_dir, tmp_path / "y.sft", Options(), lines.append)
    assert re.match("note: passed over: .*is not the file that was saved", lines[0])
    assert lines[1] == "note: from checkpoints/step-00000002/net"
    old.write_bytes(b"")
    with pytest.raises(HarnessError, match="no checkpoint is complete on this host"):
        converted(config.run_dir, tmp_path / "z.sft")

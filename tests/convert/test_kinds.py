"""Files and directories that are something else, or could be several things: each is named."""

import gzip
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint.inspect import describe_path
from harness.convert.convert import Options, convert
from harness.errors import HarnessError
from harness.io import load, save

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234567\n"


def numpy_archive(path: Path, save: Callable[..., None] = np.savez) -> None:
    with path.open("wb") as file:
        save(file, a=np.ones(3))


def script(path: Path) -> None:
    """An archive with the records of TorchScript."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"script/{name}", b"\x80\x02N.")


def exported(path: Path) -> None:
    """An archive with the records of torch.export."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("models/model.json", "archive_format", "byteorder"):
            archive.writestr(f"prog/{name}", b"pt2")


def recompressed(path: Path) -> None:
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def archive(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, arcname="model.pt")


def half(path: Path) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:600])


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "lfs": (lambda path: path.write_text(POINTER), "a git-lfs pointer to one: run `git lfs pull`"),
    "page": (lambda path: path.write_text("\n<!doctype html><html>"), "an HTML page"),
    "denied": (lambda path: path.write_text("<?xml version='1.0'?><Error>"), "an XML page"),
    "json": (lambda path: path.write_text('{"error": "Unauthorized"}'), "JSON text"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(90)), "a GGUF file"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch" * 9), "an ONNX model"),
    "h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "an HDF5 file"),
    "npz": (numpy_archive, r"arrays of numpy \(\.npz\)"),
    "npz packed": (lambda path: numpy_archive(path, np.savez_compressed), "arrays of numpy"),
    "script": (script, "a TorchScript archive"),
    "pt2": (exported, "a program of torch.export"),
    "tar": (archive, "a tar archive: extract it first"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a plain pickle"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "compressed file: decompress"),
    "empty": (lambda path: path.write_bytes(b""), "but empty"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "begins with zeros"),
    "recompressed": (recompressed, "archive is compressed, .* save it again"),
    "half": (half, "truncated or damaged: .* copy or download the file again"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    write, message = KINDS[kind]
    path = tmp_path / f"x{suffix}"
    write(path)
    acts: list[Callable[[], object]] = [
        lambda: convert(path, tmp_path / "o.sft", Options(), print),
        lambda: load(path),
        lambda: list(describe_path(path)),
    ]
    for act in acts:
        with pytest.raises(HarnessError, match=f"(?s){path}: .*{message}"):
            act()
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("x.onnx", "an ONNX model: use the weights it was made from"),
        ("x.msgpack", "a msgpack file of Flax: export the weights as .pt or .safetensors"),
        ("x.h5", "an HDF5 file, as of Keras: export the weights"),
    ],
)
def test_a_kind_without_a_mark_is_known_by_its_suffix(tmp_path: Path, name: str, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x0a\x83\xa6params")
    for act in (taken, load, lambda path: list(describe_path(path))):
        with pytest.raises(HarnessError, match=f"{path}: not a file of weights, but {what}"):
            act(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")  # reading it would block for ever
    (tmp_path / "link.pt").symlink_to("nowhere")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "directory.pt").mkdir()
    (tmp_path / "unreadable.pt").symlink_to("/proc/self/mem")
    torch.save(WEIGHTS, tmp_path / "x.pt")
    for name, message in {
        "pipe.pt": "not a regular file",
        "link.pt": "a link to a path that does not exist",
        "loop.pt": "a link to a path that does not exist",
        "unreadable.pt": "Input/output error",
        "directory.pt": "not a checkpoint or weights",
        "x.pt/y": "no such file or directory",
    }.items():
        with pytest.raises(HarnessError, match=f"{name}: {message}"):
            convert(tmp_path / name, tmp_path / "o.sft", Options(), print)
    with pytest.raises(HarnessError, match=r"directory\.pt: a directory, expected the path of a f"):
        convert(tmp_path / "x.pt", tmp_path / "directory.pt", Options(), print)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_says_so(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for eighth in range(1, 8):
        path.write_bytes(content[: len(content) * eighth // 8])
        with pytest.raises(HarnessError, match=r"x\.pt: .*truncated"):
            taken(path)
    assert [found.name for found in tmp_path.iterdir()] == ["x.pt"]


def test_the_source_may_be_replaced(tmp_path: Path) -> None:
    for name in ("x.pt", "x.sft"):
        save(WEIGHTS, tmp_path / name)
        convert(tmp_path / name, tmp_path / name, Options(dtype="bf16"), print)
        assert load(tmp_path / name)["a.bias"].dtype == torch.bfloat16
    with_weights("model.safetensors")(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "hub/shards", Options(shard_size=20), print)
    convert(tmp_path / "hub", tmp_path / "hub/model.safetensors", Options(dtype="fp16"), print)
    assert load(tmp_path / "hub/model.safetensors")["a.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin", "x.ckpt", "x"])
@pytest.mark.parametrize("is_pt", [True, False])
def test_the_content_decides_whatever_the_suffix(tmp_path: Path, name: str, is_pt: bool) -> None:
    path = tmp_path / name
    torch.save(WEIGHTS, path) if is_pt else save_file(WEIGHTS, path)
    convert(path, tmp_path / "o.sft", Options(verify=True), lambda _: None)
    for found in (load(path), load(tmp_path / "o.sft")):
        assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    assert any("a.weight" in line for line in describe_path(path))


def shards(directory: Path, is_pt: bool) -> Path:
    directory.mkdir()
    kind = "pytorch_model.bin" if is_pt else "model.safetensors"
    stem, _, suffix = kind.partition(".")
    files = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        file = f"{stem}-{number}.{suffix}"
        (torch.save if is_pt else save_file)({name: tensor}, directory / file)
        files[name] = file
    (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def test_shards_of_torch_are_read(tmp_path: Path) -> None:
    directory = shards(tmp_path / "model", is_pt=True)
    lines: list[str] = []
    convert(directory, tmp_path / "o.sft", Options(verify=True), lines.append)
    for found in (load(directory), load(tmp_path / "o.sft"), load(directory, lazy=True)):
        assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    assert lines[0] == "note: from pytorch_model.bin.index.json"
    assert any("a.weight" in line for line in describe_path(directory))


def taken(src: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    lines: list[str] = []
    convert(src, src.parent / "out.sft", Options(**options), lines.append)
    return load(src.parent / "out.sft"), lines


NESTED: dict[str, tuple[Any, str | None, str]] = {
    "model": ({"model": WEIGHTS, "epoch": 3}, None, "key 'model'; left out: 'epoch'"),
    "tensors beside": (
        {"net": {"layer": WEIGHTS, "b": torch.ones(1)}, "net.x": 1, 3: 2},
        None,
        "key 'net.layer'; left out: 'net.b', 'net.x', '3'",
    ),
    "a dot in the key": (
        {"net": 5, "net.layer": WEIGHTS},
        None,
        "key 'net.layer'; left out: 'net'",
    ),
    "lightning": (
        {
            "state_dict": WEIGHTS,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "epoch": 1,
        },
        None,
        "key 'state_dict'; left out: 'optimizer_states', 'epoch'",
    ),
    "dotted": ({"a": {"m.x": WEIGHTS}, "ema": {"y": torch.ones(2)}}, "a.m.x", "key 'a.m.x'"),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_part_is_taken_by_its_key(tmp_path: Path, case: str) -> None:
    tree, key, note = NESTED[case]
    torch.save(tree, tmp_path / "last.ckpt")
    found, lines = taken(tmp_path / "last.ckpt", key=key, dtype="bf16")
    assert found.keys() == WEIGHTS.keys()
    assert lines[0].startswith(f"note: the weights of {note}")


def test_of_several_parts_none_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": WEIGHTS, "ema": WEIGHTS, "epoch": 1}, path)
    found, lines = taken(path)
    assert found.keys() == {"model", "ema", "epoch"}
    assert "for a part of it, use --key 'model', --key 'ema'" in lines[0]
    for key, message in (
        ("modle", r"--key 'modle' \(did you mean 'model'\?\): choose one of --key 'model' \(2"),
        ("epoch", "choose one of"),
    ):
        with pytest.raises(HarnessError, match=message):
            taken(path, key=key)
    with pytest.raises(HarnessError, match="not supported; for a part of it, use --key 'model'"):
        taken(path, dtype="bf16")
    save_file(WEIGHTS, tmp_path / "x.sft")
    with pytest.raises(HarnessError, match=r"only a \.pt has parts"):
        taken(tmp_path / "x.sft", key="model")


def test_one_ranks_file_of_zero_3_is_refused(tmp_path: Path) -> None:
    model = {
        "module": {"w": torch.empty(0), "buffer": torch.ones(2)},
        "param_shapes": [{"w": torch.Size([3, 4])}],
        "frozen_param_shapes": {"f": torch.Size([2])},
        "frozen_param_fragments": {"f": torch.ones(1)},
        "dp_world_size": 2,
    }
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "renamed.pt"):
        torch.save(model, tmp_path / name)
        with pytest.raises(HarnessError, match=r"of one rank of a ZeRO 3 .*give the directory"):
            taken(tmp_path / name)


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "renamed.pt"])
def test_one_ranks_optimizer_state_is_named(tmp_path: Path, name: str) -> None:
    state = {"partition_count": [2], "single_partition_of_fp32_groups": [torch.ones(3)]}
    torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, tmp_path / name)
    message = rf"{name}: the optimizer's state of one rank .* directory .* like {tmp_path}$"
    for key in (None, "optimizer_state_dict"):
        with pytest.raises(HarnessError, match=message if key is None else "choose|no key"):
            taken(tmp_path / name, key=key)


def tag(directory: Path, step: int, fill: float = 0.0) -> None:
    """A tag of plain DeepSpeed at ZeRO 0, which names no optimizer."""
    directory.mkdir(parents=True)
    model = {
        "module": {name: tensor + fill for name, tensor in WEIGHTS.items()},
        "dp_world_size": 1,
        "global_steps": step,
        "param_shapes": None,
        "optimizer": None,
        "buffer_names": [],
        "frozen_param_fragments": None,
    }
    torch.save(model, directory / "mp_rank_00_model_states.pt")


def trainer(directory: Path, *steps: int) -> None:
    """What the HF Trainer writes with DeepSpeed: tag, rounded weights and its state."""
    for step in steps:
        checkpoint = directory / f"checkpoint-{step}"
        tag(checkpoint / f"global_step{step}", step, step)
        (checkpoint / "latest").write_text(f"global_step{step}")
        save_file(WEIGHTS, checkpoint / "model.safetensors")
        (checkpoint / "trainer_state.json").write_text("{}")


def accelerate(directory: Path, models: int) -> None:
    for number in range(models):
        tag(directory / ("pytorch_model" + f"_{number}" * (number > 0)), 7, number)
        (directory / "latest").write_text("pytorch_model" + f"_{number}" * (number > 0))


def plain(directory: Path) -> None:
    tag(directory / "global_step2", 2)
    tag(directory / "global_step4", 4, 4)
    (directory / "latest").write_text("global_step4")


def test_what_was_taken_is_printed(tmp_path: Path) -> None:
    trainer(tmp_path / "trainer", 2, 10)
    accelerate(tmp_path / "accelerate/checkpoints/checkpoint_2", 1)
    accelerate(tmp_path / "accelerate/checkpoints/checkpoint_10", 1)
    plain(tmp_path / "plain")
    plain(tmp_path / "inside/checkpoints")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "hub").mkdir()
    shutil.move(tmp_path / "model.safetensors", tmp_path / "hub")
    for name, note in {
        "trainer": "checkpoint-10/global_step10, step 10",
        "trainer/checkpoint-2": "global_step2, step 2",
        "accelerate": "checkpoints/checkpoint_10/pytorch_model, step 7",
        "accelerate/checkpoints": "checkpoint_10/pytorch_model, step 7",
        "plain": "global_step4, step 4",
        "inside": "checkpoints/global_step4, step 4",
        "hub": "model.safetensors",
    }.items():
        assert taken(tmp_path / name)[1][0] == f"note: from {note}"
        assert next(iter(describe_path(tmp_path / name))) == f"from {note}"
    assert taken(tmp_path / "plain/latest")[0]["a.bias"].tolist() == [5, 5, 5]
    (tmp_path / "trainer/checkpoint-10/latest").unlink()
    (tmp_path / "trainer/checkpoint-10/model.safetensors").unlink()
    assert "checkpoint-2/" in taken(tmp_path / "trainer")[1][0]


def with_weights(name: str, *others: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        for file in (name, *others):
            save_file(WEIGHTS, directory / file)

    return write


def both(*writes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda directory: [write(directory) for write in writes]


AMBIGUOUS: dict[str, tuple[Callable[[Path], object], str]] = {
    "best of the trainer": (
        both(lambda d: trainer(d, 2, 4), with_weights("model.safetensors")),
        "checkpoint-4, model.safetensors: give",
    ),
    "adapter of the trainer": (
        both(lambda d: trainer(d, 2), with_weights("adapter_model.safetensors")),
        "checkpoint-2, adapter_model.safetensors: give",
    ),
    "two models": (lambda d: accelerate(d, 2), "pytorch_model, pytorch_model_1: give"),
    "two models in files": (
        with_weights("model.safetensors", "model_1.safetensors"),
        "model.safetensors, model_1.safetensors: give",
    ),
    "index of another format": (
        both(lambda d: shards(d, is_pt=True), with_weights("model.safetensors")),
        "pytorch_model.bin.index.json, model.safetensors: give",
    ),
    "a file of torch": (
        with_weights("model.safetensors", "pytorch_model.bin"),
        "model.safetensors, pytorch_model.bin: give",
    ),
    "checkpoints beside": (
        both(lambda d: plain(d / "checkpoints"), with_weights("model.safetensors")),
        "model.safetensors, checkpoints: give",
    ),
    "weights beside a tag": (
        both(plain, with_weights("pytorch_model.bin")),
        "global_step4, pytorch_model.bin: give",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_between_several_nothing_is_guessed(tmp_path: Path, case: str) -> None:
    write, message = AMBIGUOUS[case]
    write(tmp_path / "x")
    for act in (taken, lambda path: list(describe_path(path))):
        with pytest.raises(HarnessError, match=f"x holds several .*: {message} the path of one"):
            act(tmp_path / "x")


def files(*names: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(b"x")

    return write


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "DCP": (files(".metadata", "__0_0.distcp"), "format_utils dcp_to_torch .*x FILE.pt"),
    "FSDP": (
        files("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
        "format_utils dcp_to_torch .*x/pytorch_model_fsdp_0 FILE.pt",
    ),
    "universal": (files("zero/w/fp32.pt", "mp_rank_00_model_states.pt"), "universal checkpoint"),
    "universal alone": (files("zero/w/fp32.pt"), "universal checkpoint"),
    "pipeline": (
        files("layer_00-model_states.pt", "mp_rank_00_model_states.pt"),
        "pipeline parallelism",
    ),
    "pipeline alone": (files("layer_01-model_states.pt"), "pipeline parallelism"),
    "DCP in safetensors": (
        files("shard-00002-model-00001-of-00001.safetensors"),
        "each rank's pieces of the tensors",
    ),
    "no index": (
        files("model-00002-of-00002.safetensors"),
        "without the index of their tensors, model.safetensors.index.json: .* of model-00002-of",
    ),
    "no latest": (
        both(lambda d: tag(d / "global_step2", 2), lambda d: tag(d / "global_step4", 4)),
        "no `latest`.*: global_step2, global_step4",
    ),
    "unknown names": (files("net.sft", "old.pt"), "give the path of one of net.sft, old.pt"),
    "nothing": (files("notes.txt"), "not a checkpoint or weights"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_kind_of_directory_is_named(tmp_path: Path, case: str) -> None:
    write, message = FOREIGN[case]
    write(tmp_path / "x")
    for act in (taken, lambda path: list(describe_path(path))):
        with pytest.raises(HarnessError, match=f"{tmp_path / 'x'}: .*{message}"):
            act(tmp_path / "x")


def test_an_adapter_is_named_and_converted(tmp_path: Path) -> None:
    note = "the tensors of an adapter, without its base model"
    files("x/adapter_config.json")(tmp_path)
    with_weights("adapter_model.safetensors")(tmp_path / "x")
    for src in (tmp_path / "x", tmp_path / "x/adapter_model.safetensors"):
        found, lines = taken(src)
        assert found.keys() == WEIGHTS.keys()
        assert f"note: {note}" in lines
    torch.save(WEIGHTS, tmp_path / "x/adapter_model.bin")
    assert taken(tmp_path / "x/adapter_model.bin")[1][0] == f"note: {note}"


def test_a_part_of_a_model_is_named(tmp_path: Path) -> None:
    with_weights("model-00001-of-00002.safetensors", "model-00001-of-00001.safetensors")(tmp_path)
    note = "note: one shard of 2: for all tensors give their index or directory"
    assert taken(tmp_path / "model-00001-of-00002.safetensors")[1][0] == note
    assert len(taken(tmp_path / "model-00001-of-00001.safetensors")[1]) == 1
    save_file(WEIGHTS, tmp_path / "x.safetensors", {"DCP_SHARDING_INFO": "{}", "DCP_VERSION": "1"})
    with pytest.raises(
        HarnessError, match=r"x\.safetensors: a sharded checkpoint of torch \(DCP\)"
    ):
        taken(tmp_path / "x.safetensors")


@pytest.mark.parametrize("second", [WEIGHTS, {"longer": torch.ones(999)}], ids=["same", "other"])
def test_one_of_several_archives_in_a_file_is_not_taken_for_all(
    tmp_path: Path, second: dict[str, torch.Tensor]
) -> None:
    """Of archives of the same size, the last one's directory seems to be the first one's."""
    with (tmp_path / "__0_0.distcp").open("wb") as file:
        torch.save(WEIGHTS, file)
        torch.save(second, file)
    with pytest.raises(HarnessError, match=r"several archives .* \.distcp .* give the directory"):
        taken(tmp_path / "__0_0.distcp")


def test_floats_that_are_not_cast_are_named(tmp_path: Path) -> None:
    weights = {"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.ones(2)}
    save(weights, tmp_path / "x.sft")
    found, lines = taken(tmp_path / "x.sft", dtype="bf16")
    assert lines[0] == "note: not cast: tensors of float8_e4m3fn"
    assert found["a"].dtype == torch.float8_e4m3fn and found["b"].dtype == torch.bfloat16
    assert len(taken(tmp_path / "x.sft")[1]) == 1


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(HarnessError, match=r"x\.pt has no tensors"):
        taken(tmp_path / "x.pt")


def test_a_name_that_is_not_unicode_stays_in_a_pt(tmp_path: Path) -> None:
    torch.save({"\ud800": torch.ones(2)}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "y.pt", Options(), lambda _: None)
    assert list(torch.load(tmp_path / "y.pt")) == ["\ud800"]
    with pytest.raises(HarnessError, match="surrogates not allowed"):
        taken(tmp_path / "x.pt")


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    name = "a\x1b[31m\nb\u202e"
    save({name: torch.full((2,), 7e4), "model": torch.ones(1)}, tmp_path / "x.sft")
    _, lines = taken(tmp_path / "x.sft", dtype="fp16")
    convert(tmp_path / "x.sft", tmp_path / "y.sft", Options(dry_run=True), lines.append)
    lines += describe_path(tmp_path / "x.sft")
    for key, value in ({"exclude": ("nothing",)}, {"rename": (".=",)}, {"key": "z"})[0].items():
        with pytest.raises(HarnessError) as caught:
            taken(tmp_path / "x.sft", **{key: value})
        lines.append(str(caught.value))
    assert sum(r"a\x1b[31m\nb\u202e" in line for line in lines) == 3
    assert all(line.isprintable() for line in lines)


def test_what_overflows_is_named(tmp_path: Path) -> None:
    large = {"a": torch.tensor([7e4, 1.0]), "b": torch.tensor([-65520.0]), "c": torch.ones(2)}
    known = {"inf": torch.tensor([torch.inf]), "nan": torch.tensor([torch.nan])}
    save(large | known, tmp_path / "x.sft")
    found, lines = taken(tmp_path / "x.sft", dtype="fp16")
    assert found["a"].tolist() == [torch.inf, 1] and found["b"].tolist() == [-torch.inf]
    warning = "warning: values of 2 tensors are too large for fp16, and became infinite: 'a', 'b'"
    assert [line for line in lines if "warning" in line] == [warning]
    save({"m": torch.tensor([torch.finfo(torch.float32).min]), **known}, tmp_path / "x.sft")
    _, lines = taken(tmp_path / "x.sft", dtype="bf16")
    assert any("1 tensor are too large for bf16" in line for line in lines)
    save({"d": torch.tensor([1e39], dtype=torch.float64), **large}, tmp_path / "x.sft")
    for dtype in ("fp32", "bf16"):
        _, lines = taken(tmp_path / "x.sft", dtype=dtype)
        assert any(f"too large for {dtype}, and became infinite: 'd'" in line for line in lines)


@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("o.sft", {}), ("o.pt", {}), ("o.sft", {"dtype": "bf16"}), ("o", {"shard_size": 80_000})],
)
def test_a_byte_that_reads_back_differently_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], where: str
) -> None:
    """With --verify, in any of the threads' parts; nothing is left behind."""
    save_file({f"w{n}": torch.randn(100, 100 + n) for n in range(3)}, tmp_path / "x.safetensors")
    sync = os.fsync

    def damage(file: int) -> None:
        sync(file)
        with Path(f"/proc/self/fd/{file}").open("r+b", buffering=0) as opened:
            size = opened.seek(0, os.SEEK_END)
            at = opened.seek(size // 2 if where == "begin" else size - 2000)
            byte = opened.read(1)[0]
            os.pwrite(opened.fileno(), bytes([byte ^ 1]), at)

    with monkeypatch.context() as patch:
        patch.setattr("harness.convert.convert.os.fsync", damage)
        with pytest.raises(HarnessError, match=r"'w[0-2]' read back differs from what was written"):
            convert(
                tmp_path / "x.safetensors", tmp_path / name, Options(verify=True, **options), print
            )
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    convert(tmp_path / "x.safetensors", tmp_path / name, Options(verify=True, **options), print)

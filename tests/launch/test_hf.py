"""The task on models of Hugging Face, from a folder to a folder, at every stage (extra: hf)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import Callback
from harness.config import Config
from harness.config.sections import merge
from harness.data.token_files import TokenWriter
from harness.errors import ConfigError
from harness.run import run_in_world
from harness.task import load_task
from tests.support import hf_folders
from tests.support.helpers import ROOT, Pools, exports, losses, tiny_config
from tests.support.quick import quick

pytest.importorskip("transformers", reason="needs the extra: hf")

STAGES = [0, 1, 2, 3]
FORMS = {"t5": "completion"}
"""Rows by model; the others learn texts."""
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def config_of(
    directory: Path,
    stage: int,
    folder: Path,
    rows: Path,
    args: dict[str, Any] | None = None,
    **overrides: Any,
) -> Config:
    """A run of the task with one engine, "lm"."""
    own = {"model": str(folder), "train": str(rows), "seq_len": 32, "shard_size": "10KB"}
    tables: dict[str, Any] = {
        "run": {"steps": 3},
        "task": {"path": str(ROOT / "launch/tasks/hf.py"), "args": own | (args or {})},
        "data": {"micro_batch_size": 2, "sampler": "ordered"},
    }
    config = tiny_config(directory, stage, **merge(tables, overrides)).model_dump()
    engine = config["engines"].pop("net")
    engine["ds_overrides"] = merge(SHARDED if stage == 3 else {}, engine["ds_overrides"])
    return Config.model_validate(config | {"engines": {"lm": engine}})


def inputs(name: str) -> dict[str, Tensor]:
    tokens = torch.arange(5, 17)[None]
    more = {"t5": {"labels": tokens}}
    if name == "clip":
        generator = torch.Generator().manual_seed(0)
        more["clip"] = {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    return {"input_ids": tokens} | more.get(name, {})


def logits(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs(name))
    return output.logits_per_image if name == "clip" else output.logits


def loaded(name: str, folder: Path) -> Any:
    """A model as from_pretrained loads it, every weight from the folder."""
    import transformers as hf

    kinds = {"t5": hf.AutoModelForSeq2SeqLM, "bert": hf.AutoModelForMaskedLM, "clip": hf.AutoModel}
    kind: Any = kinds.get(name, hf.AutoModelForCausalLM)
    model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model


def run_and_ask(config: Config, name: str) -> tuple[Tensor, Tensor]:
    """Runs, and returns what the model says at the start and at the end of it. Collective."""

    said: list[Tensor] = []

    class Ask(Callback):
        def on_start(self, run: Any) -> None:
            self.ask(run)

        def on_export(self, run: Any, path: Path) -> None:
            self.ask(run)

        def ask(self, run: Any) -> None:
            (engine,) = run.engines
            with run.engines.lend(engine) as model:
                said.append(logits(name, model))

    def build(given: Config) -> Any:
        task = load_task(given)
        task.callbacks = [*task.callbacks, Ask()]  # type: ignore[misc]
        return task

    assert run_in_world(config, build=build) == 0
    first, last = said
    return first, last


@pytest.mark.parametrize(
    ("name", "stage"),
    quick(
        [(name, stage) for name in ("llama", "gpt2", "t5", "bert") for stage in STAGES],
        ("llama", 3),
        ("bert", 2),
    ),
)
def test_from_a_folder_to_a_folder_with_equal_logits(
    pools: Pools, tmp_path: Path, name: str, stage: int
) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", name)
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl", FORMS.get(name, "text"))
    config = config_of(tmp_path, stage, folder, rows)
    (first, last), _ = pools(2).run(run_and_ask, config, name)
    torch.testing.assert_close(first, logits(name, loaded(name, folder)))
    written = exports(config) / "lm"
    assert torch.equal(logits(name, loaded(name, written)), last)
    assert not torch.allclose(first, last, atol=1e-4)
    assert (written / "model.safetensors.index.json").is_file()
    assert len({file.stat().st_mode for file in written.iterdir()}) == 1
    assert (written / "tokenizer.json").is_file() and (written / "chat_template.jinja").is_file()
    assert (written / "generation_config.json").is_file() == (name != "bert")


@pytest.mark.parametrize("stage", quick(STAGES, 1))
def test_clip_with_its_own_loss(pools: Pools, tmp_path: Path, stage: int) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "clip")
    config = config_of(tmp_path, stage, folder, folder).model_dump()
    task = {"path": str(ROOT / "tests/tasks/clip_task.py"), "args": {"model": str(folder)}}
    config |= {"engines": {"clip": config["engines"]["lm"]}, "task": task}
    checked = Config.model_validate(config)
    (first, last), _ = pools(2).run(run_and_ask, checked, "clip")
    torch.testing.assert_close(first, logits("clip", loaded("clip", folder)))
    torch.testing.assert_close(logits("clip", loaded("clip", exports(checked) / "clip")), last)
    assert not torch.allclose(first, last, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "targets", "stage"),
    quick(
        [
            (name, targets, stage)
            for name, targets in {
                "llama": r".*\.(q_proj|v_proj)",
                "gpt2": r".*\.c_attn",
                "bert": r".*\.(query|value)",
                "t5": r".*\.(q|v)",
            }.items()
            for stage in STAGES
        ],
        ("gpt2", r".*\.c_attn", 3),
    ),
)
def test_adapters_reload_in_peft(
    pools: Pools, tmp_path: Path, name: str, targets: str, stage: int
) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: lora")
    folder = hf_folders.write_folder(tmp_path / "folder", name)
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl", FORMS.get(name, "text"))
    config = config_of(tmp_path, stage, folder, rows).model_dump()
    config["engines"]["lm"] |= {"lora": {"targets": targets, "rank": 2, "alpha": 64}}
    checked = Config.model_validate(config)
    (first, last), _ = pools(2).run(run_and_ask, checked, name)
    assert not torch.allclose(first, last, atol=1e-4)
    adapters = exports(checked) / "lm.lora"
    adapted = peft.PeftModel.from_pretrained(loaded(name, folder), adapters)
    torch.testing.assert_close(logits(name, adapted), last)
    torch.testing.assert_close(logits(name, loaded(name, exports(checked) / "lm")), last)
    if name == "gpt2":
        found = peft.AutoPeftModel.from_pretrained(adapters)
        torch.testing.assert_close(logits(name, found), last)


def test_chats_are_packed_and_weighed_alike_on_any_number_of_ranks(
    pools: Pools, tmp_path: Path
) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "llama", weights=False)
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl", "messages")
    args = {"packing": "greedy", "seq_len": 64, "eval": str(rows)}
    found = {}
    for ranks, size in ((1, 2), (2, 1)):
        data = {"micro_batch_size": size}
        config = config_of(tmp_path / str(ranks), 3, folder, rows, args, data=data)
        pools(ranks).run(run_in_world, config)
        found[ranks] = losses(config)
    assert found[2] == pytest.approx(found[1], abs=1e-5)
    assert found[2][-1] < found[2][0]


def test_a_larger_vocabulary_is_trained_and_exported(pools: Pools, tmp_path: Path) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "llama", tokens=300)
    tokenizer = hf_folders.tokenizer()
    tokenizer.add_tokens(["<more>", "<tokens>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl")
    args = {"tokenizer": str(tmp_path / "tokenizer")}
    config = config_of(tmp_path, 3, folder, rows, args)
    (first, last), _ = pools(2).run(run_and_ask, config, "llama")
    torch.testing.assert_close(first[..., :300], logits("llama", loaded("llama", folder)))
    assert first.shape[-1] == 302
    assert torch.equal(logits("llama", loaded("llama", exports(config) / "lm")), last)
    lora = {"lora": {"targets": ".*q_proj", "rank": 2, "alpha": 4}}
    refused = config_of(tmp_path / "lora", 0, folder, rows, args).model_dump()
    refused["engines"]["lm"] |= lora
    text = "the tokenizer has 302 tokens, the weights in .* have rows for 300, and adapters do not"
    with pytest.raises(ConfigError, match=text):
        load_task(Config.model_validate(refused))


def generate_while_training(config: Config) -> Any:
    """What the command answers on this rank, between steps of a run. Collective."""

    answers: list[str] = []

    class Ask(Callback):
        def on_eval(self, run: Any, metrics: Any) -> None:
            answers.append(task.commands["generate"](run.engines, "the", "quick"))

    def build(given: Config) -> Any:
        nonlocal task
        task = load_task(given)
        task.callbacks = [Ask()]  # type: ignore[misc]
        return task

    task: Any = None
    assert run_in_world(config, build=build) == 0
    return answers


@pytest.mark.parametrize(
    ("name", "stage"), quick([("llama", 2), ("llama", 3), ("t5", 3)], ("llama", 2))
)
def test_all_ranks_generate_the_same_text_and_training_goes_on_alike(
    pools: Pools, tmp_path: Path, name: str, stage: int
) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", name)
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl", FORMS.get(name, "text"))
    options = {"max_new_tokens": 8, "do_sample": True}
    args = {"eval": str(rows), "generate": options}
    config = config_of(tmp_path, stage, folder, rows, args, trainer={"eval_every": 1})
    one, other = pools(2).run(generate_while_training, config)
    assert one == other
    assert len(set(one)) > 1
    silent = config_of(tmp_path / "silent", stage, folder, rows, {"eval": str(rows)})
    pools(2).run(run_in_world, silent)
    assert losses(silent) == losses(config)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("llama", {"model": "none"}, r"task.args.model: no such file or folder: .*none"),
        ("llama", {"tokenizer": "TMP"}, "no tokenizer in TMP"),
        ("llama", {"seq_len": 65}, "seq_len = 65: the model has 64 positions"),
        ("bert", {"packing": "greedy"}, "packing: only for causal models, found a masked one"),
        ("t5", {}, r"row 0: no text in field 'prompt'; found \['text'\]"),
        ("llama", {"train": "none"}, "none does not exist"),
        ("llama", {"field": "words"}, r"row 0: no text in field 'words'; found \['text'\]"),
        ("bert", {"kind": "seq2seq"}, "decoder_start_token_id is missing"),
    ],
)
def test_what_is_wrong_is_known_before_step_1(
    tmp_path: Path, name: str, args: dict[str, Any], message: str
) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", name, weights=False)
    rows = hf_folders.write_rows(tmp_path / "rows.jsonl")
    given = {key: str(tmp_path) if value == "TMP" else value for key, value in args.items()}
    config = config_of(tmp_path, 0, folder, rows, given)
    with pytest.raises(ConfigError, match=message.replace("TMP", re.escape(str(tmp_path)))):
        load_task(config)


def test_a_prepared_corpus_is_packed(tmp_path: Path) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "llama", weights=False)
    with TokenWriter(tmp_path / "corpus", "u2") as writer:
        writer.write([[5, 6, 7, 2], [8, 9, 2]])
    task = load_task(config_of(tmp_path, 0, folder, tmp_path / "corpus", {"packing": "greedy"}))
    assert task.train_data[0]["position_ids"][:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    batch = task.collate([task.train_data[0]])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}, "a mask would hide positions"
    with pytest.raises(ConfigError, match=r"a corpus of tokens: set task\.args\.packing"):
        load_task(config_of(tmp_path, 0, folder, tmp_path / "corpus"))
    with TokenWriter(tmp_path / "other", "u2") as writer:
        writer.write([[400, 2]])
    with pytest.raises(ConfigError, match="token 400 is not one of the tokenizer's 300"):
        load_task(config_of(tmp_path, 0, folder, tmp_path / "other", {"packing": "greedy"}))

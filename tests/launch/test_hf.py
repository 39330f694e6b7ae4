"""The task on models of Hugging Face, from a folder to a folder, at every stage (extra: hf)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import Config
from harness.config.sections import merge
from harness.run import run_in_world
from tests.support import hf_folders
from tests.support.helpers import ROOT, Pools, exports, tiny_config
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
    from harness import Callback
    from harness.task import load_task

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
        ("t5", 3),
        ("gpt2", 1),
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
    assert (written / "tokenizer.json").is_file() and (written / "chat_template.jinja").is_file()
    assert (written / "generation_config.json").is_file() == (name != "bert")

"""The task trains as the HF Trainer does on Accelerate's DeepSpeed (extra: hf)."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.config.sections import merge
from harness.testing.pool import RankPool
from tests.support import hf_folders
from tests.support.helpers import ROOT, losses, tiny_config
from tests.support.hf_trainer import harness_losses, trainer_losses

pytest.importorskip("transformers", reason="needs the extra: hf")
pytest.importorskip("accelerate", reason="needs accelerate")

STEPS, LR = 20, 1e-3
FORMS = {"t5": "completion"}


def settings_of(stage: int) -> dict[str, Any]:
    """DeepSpeed's config of both."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def write_many_rows(path: Path, form: str) -> Path:
    """Forty rows of all lengths."""
    words = " ".join(hf_folders.TEXTS).split()
    texts = [" ".join(words[n : n + 3 + n * 7 % 12]) for n in range(40)]
    rows: list[dict[str, str]] = [{"text": text} for text in texts]
    if form == "completion":
        rows = [{"prompt": text, "completion": " ".join(text.split()[1:])} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def with_accelerate() -> Any:
    with RankPool(2, timeout_s=300) as pool:  # of its own, since Accelerate changes its ranks
        yield pool


@pytest.fixture(scope="module")
def with_harness() -> Any:
    with RankPool(2, timeout_s=300) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", hf_folders.MODELS)
def test_losses_are_those_of_the_trainer(
    with_harness: RankPool, with_accelerate: RankPool, tmp_path: Path, name: str, stage: int
) -> None:
    folder = hf_folders.write_folder(tmp_path / name, name)
    rows = write_many_rows(tmp_path / "rows.jsonl", FORMS.get(name, "text"))
    settings = settings_of(stage)
    table: dict[str, Any] = {
        "run": {"steps": STEPS},
        "task": {
            "path": str(
                ROOT / f"{'tests/tasks/clip_task' if name == 'clip' else 'launch/tasks/hf'}.py"
            ),
            "args": {"model": str(folder)},
        },
        "data": {"micro_batch_size": 2, "sampler": "ordered"},
        "engines": {"net": {"optimizer": {"lr": LR, "weight_decay": 0.0}}},
    }
    if name != "clip":
        table["task"]["args"] |= {"train": str(rows), "seq_len": 32}
    config = tiny_config(tmp_path, stage, **table).model_dump()
    engine = config["engines"].pop("net")
    del settings["train_micro_batch_size_per_gpu"]
    engine["ds_overrides"] = merge(engine["ds_overrides"], settings)
    config["engines"]["clip" if name == "clip" else "lm"] = engine
    checked = Config.model_validate(config)
    with_harness.run(harness_losses, checked, folder, rows)
    expected, _ = with_accelerate.run(trainer_losses, folder, rows, settings_of(stage), STEPS, LR)
    found = losses(checked)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-5, rel=0)
    assert found[-1] < found[0] - 0.1

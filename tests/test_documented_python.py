"""The Python of the pages does what they say, as it stands there."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import Task, command, train
from harness.control.client import NoAnswer
from tests.support import hf_folders
from tests.support.helpers import ROOT
from tests.support.pages import PAGES, examples, files_of

FILES = {name: text for page in PAGES for name, text in files_of(page).items()}
CELLS = examples(ROOT / "docs/python.md")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a reader, who has a task and a config, for runs of 20 steps."""
    for folder in ("launch", "ds_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name in ("my_task.py", "my.toml"):
        (tmp_path / name).write_text(FILES[name])
    monkeypatch.setenv("HARNESS__RUN__STEPS", "20")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    with suppress(NoAnswer):  # a test that has failed may have left it
        command("runs/live", "quit!")


def test_the_test_of_python_md(reader: Path) -> None:
    names: dict[str, Any] = {}
    exec(next(cell for cell in CELLS if "def test_" in cell), names)
    names["test_the_model_learns"](reader / "pytest")


@pytest.mark.slow
def test_python_md(reader: Path) -> None:
    """Its cells in their order, without a wait in between: a notebook that is run whole."""
    names: dict[str, Any] = {}
    exec(FILES["my_task.py"], names)
    data = names["build"](None).train_data
    names |= {"data": data, "held_out": data}
    for cell in CELLS:
        exec(cell, names)
    assert names["result"].ended == "quit" and names["result"].metrics["lr"] == 5e-4
    assert names["best"] in names["results"]
    (sweep,) = (cell for cell in CELLS if "results[rate]" in cell)
    assert len(sweep.splitlines()) <= 10


@pytest.mark.slow
def test_huggingface_md(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_folders.write_folder(reader / "models/llama", "llama")
    hf_folders.write_folder(reader / "models/clip", "clip")
    hf_folders.write_rows(reader / "chats.jsonl", "messages")
    monkeypatch.setenv("HARNESS__TASK__ARGS__SEQ_LEN", "32")
    form, own_task = examples(ROOT / "docs/huggingface.md")
    names: dict[str, Any] = {}
    exec(form, names)
    assert names["model"].config.model_type == "llama"
    assert names["result"].run_dir.name == "tuned"

    pair = {"input_ids": torch.arange(5, 17), "pixel_values": torch.ones(3, 8, 8)}
    names |= {"pairs": [pair] * 8, "processor": hf_folders.tokenizer()}
    exec(own_task, names)
    task: Task = names["build"](None)
    engine = {"ds_config": "ds_configs/zero3.json", "optimizer": {"name": "adamw"}}
    result = train({"engines": {"clip": engine}}, task, {"run.steps": 1})
    assert result.exports and (result.exports / "clip/config.json").is_file()

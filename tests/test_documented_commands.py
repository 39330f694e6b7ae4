"""What the documentation tells one to type does what it says: each page's commands, in their order.

A page has a directory of its own, with the files that the pages have the reader write. Runs of the
example tasks are made small by variables of the environment; everything else is as it is written.
Blocks that cannot run here are skipped, each with its reason (tests/support/pages.py).
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest

from harness import train
from harness.control.client import Client, NoAnswer
from harness.distributed import free_port
from harness.testing.pool import RankPool
from tests.support import hf_folders
from tests.support.helpers import ROOT
from tests.support.pages import PAGES, Block, blocks_of, examples, files_of
from tests.support.run_directories import write_run

BIN = Path(sys.executable).parent
FILES = {name: text for page in PAGES for name, text in files_of(page).items()}
UTILITIES = ROOT / "docs/from-utils.md"
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SMALL = {
    "byte_lm.toml": {"seq_len": 32, "dim": 16, "layers": 1, "heads": 1, "eval_windows": 4},
    "codec_lm.toml": {"dim": 16, "layers": 1},
    "images.toml": {"channels": 4, "blocks": 1},
    "gan.toml": {"width": 16},
    "hf.toml": {"seq_len": 32},
    "distill.toml": {},
    "my.toml": {},
}
"""Arguments of the tasks, which take two steps unless the command says otherwise."""


def write_data(directory: Path) -> None:
    (directory / "texts").mkdir()
    (directory / "texts/a.txt").write_text("the rest is silence")
    (directory / "more.jsonl").write_text('{"text": "brevity is the soul of wit"}\n')
    (directory / "path/to").mkdir(parents=True)
    (directory / "path/to/tokenizer.json").write_text(hf_folders.tokenizer_json(300))


def write_models(directory: Path) -> None:
    hf_folders.write_folder(directory / "models/llama", "llama")
    hf_folders.write_rows(directory / "chats.jsonl", "messages")


def write_shapes(directory: Path) -> None:
    hf_folders.write_folder(directory / "path/to/folder", "llama")
    (directory / "my_package").mkdir()
    text = "import torch\n\n\ndef build():\n    return torch.nn.Embedding(16, 4)\n"
    (directory / "my_package/models.py").write_text(text)


def write_runs(directory: Path) -> None:
    for name in ("byte_lm", "a", "b"):
        write_run(directory / "runs" / name)


PREPARED: dict[str, Callable[[Path], None]] = {
    "data.md": write_data,
    "huggingface.md": write_models,
    "plan.md": write_shapes,
    "report.md": write_runs,
}
"""What the reader of a page has already."""
QUICK = ("data.md",)


def followed() -> Iterator[Any]:
    """The pages with commands that run here, each a parameter."""
    for page in PAGES:
        if any(not block.not_run for block in blocks_of(page)):
            marks = () if page.name in QUICK else pytest.mark.slow
            yield pytest.param(page, id=page.name, marks=marks)


@pytest.mark.parametrize("page", list(followed()))
@pytest.mark.timeout(900)
def test_a_page_can_be_followed(page: Path, tmp_path: Path) -> None:
    for folder in ("launch", "ds_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    if page.name in PREPARED:
        PREPARED[page.name](tmp_path)
    for block in blocks_of(page):
        if not block.not_run:
            with job_beside(block, tmp_path):
                run_block(block, tmp_path)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.not_run])
def test_what_cannot_run_is_listed(block: Block) -> None:
    pytest.skip(block.not_run)


@pytest.mark.slow
def test_the_readmes_forms_of_a_run_train(tmp_path: Path) -> None:
    with RankPool(1) as rank:  # of its own, as `train` leaves the world
        losses = rank.run(both_forms, tmp_path)[0]
    assert all(loss > 0 for loss in losses)


def both_forms(directory: Path) -> list[float]:
    """The loss of the first steps, from a TOML file and from Python."""
    os.chdir(directory)
    (directory / "ds_configs").symlink_to(ROOT / "ds_configs")
    for name in ("my_task.py", "my.toml"):
        (directory / name).write_text(FILES[name])
    names: dict[str, Any] = {}
    exec(FILES["my_task.py"], names)
    names["data"] = names["build"](None).train_data
    python = next(code for code in examples(ROOT / "README.md") if "train(" in code)
    exec(python.replace('"steps": 500', '"steps": 2'), names)
    result = train("my.toml", overrides={"run.steps": 2, "data.micro_batch_size": 16})
    return [result.metrics["loss"], names["result"].metrics["loss"]]


def test_examples_for_users_of_the_original_utilities_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in examples(UTILITIES):
        exec(code, names)


def test_names_for_users_of_the_original_utilities_exist() -> None:
    for name in sorted(set(re.findall(r"`(harness(?:\.\w+)+)[`(]", UTILITIES.read_text()))):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute) or find_spec(name), name


def run_block(block: Block, directory: Path) -> None:
    """Runs its commands, as in a terminal with the environment activated."""
    output = directory / "output.txt"
    with output.open("w") as file, started(block.commands, directory, file) as process:
        code = process.wait(600)
    assert code == 0, f"{block.place}: {output.read_text()}"


@contextmanager
def job_beside(block: Block, directory: Path) -> Iterator[None]:
    """The job that the block commands, until it has ended."""
    if not block.beside:
        yield
        return
    run = directory / re.findall(r"^harness ctl (\S+)", block.commands, re.M)[0]
    output = directory / "beside.txt"
    with output.open("w") as file, started(block.beside, directory, file) as process:
        while not answers(run):
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        yield
        with suppress(NoAnswer), closing(Client(run)) as client:
            list(client.send("quit!"))
        process.wait(60)


def answers(run: Path) -> bool:
    """Whether a job answers commands."""
    try:
        Client(run).close()
    except NoAnswer:
        return False
    return True


@contextmanager
def started(commands: str, directory: Path, output: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """A shell with small tasks and a free port: other jobs run on this machine."""
    given = [arguments for name, arguments in SMALL.items() if name in commands]
    small = {"RUN__STEPS": 2} if given else {}
    small |= {f"TASK__ARGS__{key.upper()}": value for one in given for key, value in one.items()}
    port = free_port()
    (directory / "bin").mkdir(exist_ok=True)
    (directory / "bin/deepspeed").write_text(
        f'#!/bin/sh\nexec {BIN}/deepspeed --master_port {port} "$@"\n'
    )
    (directory / "bin/deepspeed").chmod(0o755)
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=directory,
        env=os.environ
        | {f"HARNESS__{key}": str(value) for key, value in small.items()}
        | {"PATH": f"{directory}/bin:{BIN}:{os.environ['PATH']}"}
        | {"PYTHONPATH": str(ROOT), "PET_MASTER_PORT": str(port)},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

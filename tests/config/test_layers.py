"""Settings in layers: several files, what a file extends, the environment, the command line."""

from pathlib import Path

import pytest

from harness.config import Config
from harness.config.command_line import parse_args
from harness.errors import ConfigError
from harness.run_directory import write_config
from tests.support.helpers import ROOT

BASE = f"""
[run]
steps = 7
seed = 1
[task]
path = "{ROOT}/tests/tasks/tiny_task.py"
[engines.Net]
ds_config = "{ROOT}/ds_configs/zero1.json"
optimizer = {{ name = "adamw", lr = 1e-3, betas = [0.9, 0.95] }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    return tmp_path


def parsed(*paths: Path, words: tuple[str, ...] = ()) -> Config:
    return parse_args([*(word for path in paths for word in ("--config", str(path))), *words])


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_later_files_count_and_tables_are_merged(folder: Path) -> None:
    mine = written(folder / "mine.toml", "[run]\nsteps = 9\n[engines.Net.optimizer]\nlr = 2.0\n")
    config = parsed(folder / "base.toml", mine, words=("--run.seed=3",))
    assert (config.run.steps, config.run.seed, config.run.name) == (9, 3, "mine")
    optimizer = config.engines["Net"].optimizer
    assert optimizer is not None and optimizer.lr == 2.0
    assert optimizer.args == {"betas": [0.9, 0.95]}
    assert parsed(mine, folder / "base.toml").run.steps == 7


def test_a_file_extends_others_relative_to_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(folder))
    middle = written(folder / "sub/middle.toml", 'extends = "../base.toml"\n[run]\nseed = 5\n')
    top = written(
        folder / "top.toml", 'extends = ["$PLACE/base.toml", "sub/middle.toml"]\n[run]\nsteps = 8'
    )
    config = parsed(top)
    assert (config.run.steps, config.run.seed, config.run.name) == (8, 5, "top")
    assert parsed(middle).run.steps == 7


def test_the_environment_is_above_files_and_below_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS__RUN__STEPS", "11")
    monkeypatch.setenv("HARNESS__RUN__SEED", "12")
    monkeypatch.setenv("HARNESS__RUN__NAME", "2024")  # a string, as on the command line
    monkeypatch.setenv("HARNESS__ENGINES__NET__OPTIMIZER__LR", "0.5")  # the file has Net
    monkeypatch.setenv("HARNESS_OUTCOME", "no setting")
    config = parsed(folder / "base.toml", words=("--run.seed=13",))
    assert (config.run.steps, config.run.seed, config.run.name) == (11, 13, "2024")
    optimizer = config.engines["Net"].optimizer
    assert optimizer is not None and optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        ("[run]\nstepz = 1", {}, "run.stepz: unknown key (did you mean 'steps'?)"),
        ("", {"HARNESS__RUN__STEPZ": "1"}, "run.stepz (HARNESS__RUN__STEPZ): unknown key"),
        ("", {"HARNESS__RUN__STEPS": "x"}, "run.steps (HARNESS__RUN__STEPS): found 'x' (str)"),
        ('extends = "none.toml"', {}, "none.toml, which {mine} extends: No such file"),
        ('extends = "mine.toml"', {}, "extends itself: {mine} -> {mine}"),
        ("extends = 3", {}, "extends: found 3, expected the path of a file"),
        (
            "",
            {"HARNESS__": "5"},
            "environment: HARNESS__ names no key: expected HARNESS__SECTION__",
        ),
        ("", {"HARNESS__RUN__": "5"}, "environment: HARNESS__RUN__ names no key"),
        ('[run]\ndir = "a/${B/c"', {}, "run.dir: found 'a/${B/c': expected ${NAME} at '${B/c'"),
        ('extends = "$NO_SUCH"', {}, "extends: found '$NO_SUCH': the environment variable NO_SUCH"),
    ],
)
def test_a_mistake_names_where_it_is(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mine = written(folder / "mine.toml", text)
    with pytest.raises(ConfigError) as caught:
        parsed(folder / "base.toml", mine)
    assert message.replace("{mine}", str(mine)) in str(caught.value)


def test_a_mistake_in_an_earlier_file_names_that_file(folder: Path) -> None:
    wrong = written(folder / "wrong.toml", "[run]\nsteps = 0")
    with pytest.raises(ConfigError) as caught:
        parsed(wrong, folder / "base.toml", written(folder / "mine.toml", "[run]\nsteps = -1"))
    assert f"config {folder}/mine.toml:\n  run.steps: found -1" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parsed(folder / "base.toml", wrong, written(folder / "mine.toml", ""))
    assert f"run.steps ({wrong}): found 0" in str(caught.value)
    with pytest.raises(ConfigError, match=r"task.path: missing \(required\)"):
        parsed(written(folder / "mine.toml", BASE.replace("[task]", "[data]").replace("path", "#")))


def test_the_last_length_of_the_run_counts(folder: Path) -> None:
    epochs = written(folder / "epochs.toml", "[run]\nepochs = 2\n")
    config = parsed(folder / "base.toml", epochs)
    assert config.run.epochs == 2
    steps = written(folder / "steps.toml", "[run]\nsteps = 5\n")
    config = parsed(folder / "base.toml", epochs, steps)
    assert (config.run.steps, config.run.epochs) == (5, None)
    with pytest.raises(ConfigError, match="are both set: remove one"):
        parsed(folder / "base.toml", written(steps, "[run]\nsteps = 5\nepochs = 1\n"))


def test_null_unsets_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder / "base.toml"
    words = ("--run.seed=null", "--engines.Net.optimizer.betas=null", "--run.epochs=null")
    config = parsed(base, words=words)
    assert (config.run.seed, config.run.steps) == (0, 7)
    optimizer = config.engines["Net"].optimizer
    assert optimizer is not None and optimizer.args == {}
    monkeypatch.setenv("HARNESS__RUN__STEPS", "null")
    assert parsed(base).run.steps == 1000
    assert parsed(base, words=("--run.steps=3",)).run.steps == 3
    with pytest.raises(ConfigError, match=r"task.path: missing \(required\)"):
        parsed(base, words=("--task.path=null",))


def test_events_are_read_and_written(folder: Path) -> None:
    text = '[[events]]\ncommand = "export"\nevery = 1000\n[[events]]\ncommand = "eval"\nat = 7\n'
    config = parsed(written(folder / "mine.toml", f'extends = "base.toml"\n{text}'))
    assert [(e.command, e.every, e.at) for e in config.events] == [
        ("export", 1000, 0),
        ("eval", 0, 7),
    ]
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    config.run_dir.mkdir()
    write_config(config)
    assert parsed(config.run_dir / "config.toml") == config
    with pytest.raises(ConfigError, match=r"events.0: every = 0, at = 0: expected one of them"):
        parsed(folder / "base.toml", written(folder / "none.toml", '[[events]]\ncommand = "save"'))


def test_a_path_with_an_unknown_variable_is_refused_by_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parsed(Path("$NO_SUCH/mine.toml"))
    assert "the environment variable NO_SUCH is not set" in capsys.readouterr().err

"""Old names of keys, values and modules: in files, overrides, live commands and checkpoints."""

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from harness.checkpoint.manifest import EngineManifest
from harness.config import Config
from harness.config.command_line import parse_args
from harness.config.load import load
from harness.config.old_names import (
    MOVED_MODULES,
    RENAMED_KEYS,
    RenamedKey,
    current_import_path,
    current_keys,
    current_setting,
)
from harness.config.overrides import parse_overrides
from harness.config.sections import section_of
from harness.control.commands import Set
from harness.control.grammar import Grammar
from harness.control.live import LiveConfig
from harness.errors import CommandError, ConfigError
from harness.utils import import_path
from tests.support.helpers import ROOT, tiny_config

OLD: dict[str, Any] = {
    "engines": {"net": {"every": 1}},
    "trainer": {"save_on_quit": False, "export_on_quit": False},
    "checkpoint": {"best": "highest"},
    "optimizations": {"offload": {"budget": 0.5, "host_budget": 7}},
}
NEW: dict[str, Any] = {
    "engines": {"net": {"train_every": 1}},
    "trainer": {"save_at_end": False, "export_at_end": False},
    "checkpoint": {"best_mode": "max"},
    "optimizations": {"offload": {"fraction": 0.5, "host_bytes": 7}},
}

FILE = f"""
[task]
path = "{ROOT}/tests/tasks/tiny_task.py"
[engines.net]
ds_config = "{ROOT}/ds_configs/zero1.json"
optimizer = {{ name = "adamw" }}
every = 2
[engines.other]
ds_config = "{ROOT}/ds_configs/zero1.json"
optimizer = {{ name = "adamw" }}
[trainer]
save_on_quit = false
export_on_quit = false
[checkpoint]
best = "highest"
[optimizations]
offload = {{ budget = "all", host_budget = 9 }}
[[optimizations.replace]]
what = "torch.nn:Linear"
by = "harness.bitnet:BitLinear"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "old.toml"
    path.write_text(FILE)
    return path


def from_command_line(toml: Path, *words: str) -> Config:
    return parse_args(["--config", str(toml), *words])


def test_a_file_with_old_names(toml: Path) -> None:
    config = load(toml)
    assert config.engines["net"].train_every == 2 and config.engines["other"].train_every == 1
    assert not config.trainer.save_at_end and not config.trainer.export_at_end
    assert config.checkpoint.best_mode == "max"
    offload = config.optimizations.offload
    assert (offload.fraction, offload.host_bytes) == ("all", 9)
    assert config.optimizations.replace[0].by == "harness.wrapper.layers.bitnet:BitLinear"


@pytest.mark.parametrize("names", ["old", "new"])
def test_an_override_by_either_name_wins_over_the_file(toml: Path, names: str) -> None:
    words = {
        "old": ["engines.net.every=3", "trainer.save_on_quit=true", "checkpoint.best=lowest"],
        "new": [
            "engines.net.train_every=3",
            "trainer.save_at_end=true",
            "checkpoint.best_mode=min",
        ],
    }[names]
    offload = {"old": "budget=0.25", "new": "fraction=0.25"}[names]
    words += [f"optimizations.offload.{offload}"]
    for text in (FILE, with_new_names(FILE)):
        toml.write_text(text)
        config = from_command_line(toml, *(f"--{word}" for word in words))
        assert config.engines["net"].train_every == 3
        assert (config.trainer.save_at_end, config.trainer.export_at_end) == (True, False)
        assert config.checkpoint.best_mode == "min"
        assert config.optimizations.offload.fraction == 0.25
        assert config.optimizations.offload.host_bytes == 9


def with_new_names(text: str) -> str:
    for old, new in (
        ("every", "train_every"),
        ("_on_quit", "_at_end"),
        ("highest", "max"),
        ("best", "best_mode"),
        ("host_budget", "host_bytes"),
        ("budget", "fraction"),
    ):
        text = text.replace(old, new)
    return text


def test_a_config_made_of_tables(tmp_path: Path) -> None:
    assert tiny_config(tmp_path, **OLD) == tiny_config(tmp_path, **NEW)
    again = Config.model_validate(tiny_config(tmp_path, **OLD).model_dump())
    assert again == tiny_config(tmp_path, **NEW)
    assert current_keys(OLD) == current_keys(NEW) == NEW
    assert current_keys({"trainer": 3, "engines": {"net": 4}}) == {
        "trainer": 3,
        "engines": {"net": 4},
    }


@pytest.mark.parametrize("key", RENAMED_KEYS, ids=lambda key: f"{key.section}.{key.old}")
def test_both_names_in_one_place_are_an_error(toml: Path, key: RenamedKey) -> None:
    section = key.section.replace("*", "net")
    words = [f"--{section}.{name}=1" for name in (key.old, key.new)]
    with pytest.raises(ConfigError, match=f"line: .*{key.old!r} was renamed to {key.new!r}"):
        from_command_line(toml, *words)
    with pytest.raises(ValidationError, match=f"{key.old!r} was renamed to {key.new!r}"):
        Config.model_validate(parse_overrides(words))


def test_both_names_in_a_file_are_an_error(toml: Path) -> None:
    toml.write_text(FILE.replace("[trainer]", "[trainer]\nsave_at_end = true"))
    message = r"config .*old\.toml: trainer: 'save_on_quit' was renamed to 'save_at_end'"
    with pytest.raises(ConfigError, match=message):
        load(toml)


def test_a_wrong_value_by_an_old_name_is_explained_by_the_new_one(toml: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_command_line(toml, "--checkpoint.best=good", "--engines.net.every=0")
    assert "checkpoint.best_mode (command line): found 'good'" in str(caught.value)
    assert "engines.net.train_every (command line): found 0" in str(caught.value)


def test_help_shows_new_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    for key in RENAMED_KEYS:
        section = key.section.replace("*", "NAME")
        assert f"--{section}.{key.new} " in text and f"--{section}.{key.old} " not in text


def test_the_table_names_keys_that_exist_or_existed() -> None:
    for key in RENAMED_KEYS:
        section: type[BaseModel] | None = Config
        for part in key.section.split("."):
            if part != "*":
                assert section is not None
                section = section_of(section.model_fields[part].annotation)
        assert section is not None
        assert key.new in section.model_fields and key.old not in section.model_fields


# ---------------------------------------------------------------------------------------- live


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("set trainer.save_on_quit false", "trainer.save_at_end", "false"),
        ("set trainer.export_on_quit 0", "trainer.export_at_end", "0"),
        ("set checkpoint.best highest", "checkpoint.best_mode", "max"),
        ("set checkpoint.best 'lowest'", "checkpoint.best_mode", "'min'"),
        ("set checkpoint.best_mode max", "checkpoint.best_mode", "max"),
        ("set checkpoint.best_metric eval/lowest", "checkpoint.best_metric", "eval/lowest"),
    ],
)
def test_set_takes_old_names(tmp_path: Path, line: str, key: str, value: str) -> None:
    command = Grammar([], {}).parse(line)
    assert command == Set(key, value)
    live = LiveConfig(tiny_config(tmp_path))
    live.set(key, value)


def test_an_answer_to_set_names_new_keys_only() -> None:
    with pytest.raises(CommandError) as caught:
        Grammar([], {}).parse("set trainer.save_on_qui 1")
    assert "save_at_end" in str(caught.value) and "save_on_quit'" not in str(caught.value)


def test_live_changes_of_old_checkpoints_are_applied(tmp_path: Path) -> None:
    live = LiveConfig(tiny_config(tmp_path, checkpoint={"keep_last": 2}))
    changes = {
        "checkpoint.best": ["highest", "'lowest'"],
        "checkpoint.keep_best": ["1", "0"],
        "trainer.save_on_quit": ["false", "True"],
        "trainer.export_on_quit": ["false", "True"],
    }
    live.load_state_dict(live.state_dict() | {"changes": changes})
    assert live.config.checkpoint.best_mode == "max" and live.config.checkpoint.keep_best == 1
    assert not live.config.trainer.save_at_end and not live.config.trainer.export_at_end
    assert live.state_dict()["changes"]["checkpoint.best_mode"] == ["max", "'min'"]


def test_a_live_change_of_an_old_checkpoint_yields_to_the_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveConfig(tiny_config(tmp_path, checkpoint={"best_mode": "max"}))
    changes = {"checkpoint.best": ["highest", "'lowest'"]}
    with caplog.at_level(logging.INFO):
        live.load_state_dict(live.state_dict() | {"changes": changes})
    assert "dropping the live change checkpoint.best_mode = max:" in caplog.text


def test_an_event_of_an_old_checkpoint_is_executed() -> None:
    event = current_setting("checkpoint.best", '"highest"')
    assert event == ("checkpoint.best_mode", '"max"')
    assert current_setting("run.steps", "5") == ("run.steps", "5")


# ------------------------------------------------------------------------------------- modules


def test_moved_modules_exist() -> None:
    assert current_import_path("harness.bitnet:BitLinear") == (
        "harness.wrapper.layers.bitnet:BitLinear"
    )
    assert current_import_path("torch.nn:Linear") == "torch.nn:Linear"
    assert current_import_path("none") == "none"
    for old, new in MOVED_MODULES.items():
        path = ROOT / new.replace(".", "/")
        assert path.with_suffix(".py").is_file(), f"{old} -> {new}"


def test_a_manifest_names_the_class_as_it_is_called_now() -> None:
    for name in ("Apollo", "ApolloMini"):
        manifest = EngineManifest(
            zero_stage=3, dtype="torch.float32", optimizer=f"harness.optim.apollo:{name}", layout=""
        )
        kind = import_path(f"harness.optim.apollo:{name}")
        assert manifest.optimizer == f"{kind.__module__}:{kind.__qualname__}"


# ------------------------------------------------------------------------------------ fixtures


@pytest.mark.parametrize("name", ["zero2_bf16_ema", "zero3_apollo"])
@pytest.mark.parametrize("file", ["{}.toml", "{}/config.toml"])
def test_configs_written_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str
) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "tests/fixtures/before" / file.format(name)
    overrides = {"task": {"path": "tests/tasks/tiny_task.py"}}  # which has moved
    config = load(path, overrides)
    table: Mapping[str, Any] = tomllib.loads(path.read_text())
    assert table["checkpoint"]["best"] == "highest" and config.checkpoint.best_mode == "max"
    assert config.run.name == name and config.trainer.save_at_end

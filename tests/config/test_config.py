"""The config: what it accepts, how it explains mistakes, and that it can be read back."""

import json
import pickle
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from harness.config import Config
from harness.config.command_line import parse_args
from harness.config.engine_sections import EngineConfig
from harness.config.load import load
from harness.config.overrides import parse_overrides
from harness.config.sections import merge, section_of
from harness.errors import ConfigError
from harness.run_directory import write_config
from tests.support.helpers import ROOT

GOOD = """
[run]
steps = 7
[task]
path = "TASK"
[engines.net]
ds_config = "ZERO"
optimizer = { name = "adamw", lr = 1e-3, betas = [0.9, 0.95] }
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    text = GOOD.replace("TASK", str(ROOT / "tests/tasks/tiny_task.py"))
    path.write_text(text.replace("ZERO", str(ROOT / "ds_configs/zero1.json")))
    return path


def test_a_file_and_overrides_make_a_config(toml: Path) -> None:
    words = [
        "--run.steps=9",
        "--run.name",
        "2024",
        "--engines.net.optimizer.lr=2",
        "--task.args.a={b=[1]}",
    ]
    config = parse_args(["--config", str(toml), "--local_rank=1", *words])
    assert (config.run.steps, config.run.name, config.run_dir) == (9, "2024", Path("runs/2024"))
    optimizer = config.engines["net"].optimizer
    assert optimizer is not None
    assert (optimizer.lr, optimizer.args) == (2.0, {"betas": [0.9, 0.95]})
    assert config.task.args == {"a": {"b": [1]}}
    assert config.engines["net"].deepspeed()["zero_optimization"]["stage"] == 1


def test_the_run_is_named_after_the_file(toml: Path) -> None:
    assert load(toml).run.name == "small"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--run.stesp=1", "run.stesp (command line): unknown key (did you mean 'steps'?); known: "),
        ("--rum.steps=1", "rum (command line): unknown key (did you mean 'run'?)"),
        ("--run.steps=many", "run.steps (command line): found 'many' (str): input should be a"),
        ("--run.steps=true", "run.steps (command line): expected a number, found true"),
        ("--run.epochs=true", "run.epochs (command line): expected a number, found true"),
        ("--task.args=7", "task.args (command line): found 7 (int): input should be a table"),
        ("--run.steps=0", "run.steps (command line): found 0 (int): input should be greater"),
        ("--run.name=a/b", "run.name (command line): found 'a/b'"),
        ("--task.path=no.py", "task.path (command line): no such file: "),
        ("--task.path=no.such", "neither a .py file nor an importable module"),
        ("--data.sampler=radnom", "data.sampler (command line): found 'radnom'"),
        ("--data.max_tokens=5", "max_tokens needs sampler = 'batched', found 'random'"),
        ("--engines.net.ds_config=no.json", "ds_config no.json: No such file"),
        ("--engines.net.role=teacher", "a teacher is not trained"),
        (
            "--engines.net.ds_overrides.train_batch_size=4",
            "ds_overrides: train_batch_size: found 4",
        ),
        ("--engines.net.ds_overrides.optimizer.type=Adam", "use engines.NAME.optimizer"),
        ("--engines.n-t.role=train", "engines.n-t (command line): role = 'train' needs an opti"),
        ("--engines.n-t.role=teacher", "engines.n-t (command line): ds_config is missing"),
        ("--engines.net.frozn=1", "engines.net.frozn (command line): unknown key (did you mean"),
        (
            "--engines.net.ds_overrides.zero_optimization=3",
            "found 3, expected a table, like {'stage'",
        ),
        (
            "--engines.net.ds_overrides.bf16=true",
            "ds_overrides: bf16: found True, expected a table",
        ),
        ("--engines.net.ds_overrides.zero_optimization.stage=4", "found 4, expected 0, 1, 2 or 3"),
        ("--engines.net.ds_overrides.zero_optimization.elastic_checkpoint=true", "remove it"),
        ("--engines.net.ds_overrides.checkpoint.use_node_local_storage=true", "remove it"),
        (
            "--engines.net.ds_overrides.zero_optimization.offload_optimizer.device=nvme",
            "offload_optimizer.device: found 'nvme', expected 'cpu': checkpoints would lack",
        ),
        (
            "--engines.net.ds_overrides.gradient_accumulation_steps=0",
            "found 0, expected an integer >= 1",
        ),
        (
            "--engines.net.ds_overrides.gradient_cliping=2",
            "ds_overrides: gradient_cliping: unknown key (did you mean 'gradient_clipping'?)",
        ),
        (
            "--engines.net.ds_overrides.zero_optimization.offload_param.divice=cpu",
            "zero_optimization.offload_param.divice: unknown key (did you mean 'device'?)",
        ),
        (
            "--engines.net.ds_overrides.bf16.enable=true",
            "bf16.enable: unknown key (did you mean 'ena",
        ),
        ("--engines.net.ds_overrides.amp.enabled=true", "amp: DeepSpeed has removed it"),
        (
            "--engines.net.ds_overrides.bf16.enabled=auto",
            "found 'auto', expected true or false: only",
        ),
        (
            "--engines.net.ds_overrides.zero_optimization.reduce_bucket_size=auto",
            "zero_optimization.reduce_bucket_size: found 'auto', expected a number: only the Hug",
        ),
        (
            "--engines.net.ds_overrides.zero_optimization.offload_param.device=auto",
            "found 'auto', expected a value, or no such key: only the Hugging Face Trainer",
        ),
        ("--engines.net.ds_overrides.gradient_clipping=auto", "found 'auto', expected a number"),
        ("--engines.net.ds_overrides.gradient_clipping=-1", "found -1, expected a number >= 0"),
        ("--engines.net.ds_overrides.checkpoint=true", "checkpoint: found True, expected a table"),
        ("--engines.net.ds_overrides.wandb.enabled=true", "wandb is not installed: pip install wa"),
        ("--engines.net.ds_config=$NOT_SET/a.json", "the environment variable NOT_SET is not set"),
        ("--run.dir=~nobody-here/runs", "'~nobody-here/runs': there is no such user"),
        ("--engines.net.optimizer.lr=inf", "found inf (float): input should be a finite number"),
        ("--run.name=..", "run.name (command line): found '..'"),
        ("--run.timeout_s=inf", "run.timeout_s (command line): found inf"),
        ("--engines=1", "command line: '--engines=1': expected --section.key=value"),
        ("run.steps=1", "command line: 'run.steps=1': expected --section.key=value"),
        ("--run.steps", "command line: --run.steps: missing value"),
    ],
)
def test_a_mistake_is_explained(toml: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(toml), word])
    assert message in str(caught.value)


def test_events_can_be_set_on_the_command_line(toml: Path) -> None:
    toml.write_text(toml.read_text() + '[[events]]\ncommand = "export"\nevery = 2\n')
    config = parse_args(["--config", str(toml), "--events=[{command = 'quit!', at = 7}]"])
    assert [(event.command, event.at) for event in config.events] == [("quit!", 7)]


def test_all_mistakes_are_reported_together(toml: Path) -> None:
    toml.write_text(toml.read_text() + "[trainer]\nsave_evry = 1\n[data]\nworkers = -1\n")
    with pytest.raises(ConfigError) as caught:
        load(toml)
    assert f"config {toml}:" in str(caught.value)
    assert "trainer.save_evry: unknown key (did you mean 'save_every'?)" in str(caught.value)
    assert "data.workers: found -1 (int)" in str(caught.value)


@pytest.mark.parametrize("text", ["[run", "run = 3"])
def test_what_is_not_a_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing.toml")


@pytest.mark.parametrize("words", [[], ["--run.resume=4"]])
def test_a_step_to_resume_from_is_a_number(toml: Path, words: list[str]) -> None:
    text = toml.read_text()
    toml.write_text(text if words else text.replace("[run]\n", "[run]\nresume = 4\n"))
    assert parse_args([f"--config={toml}", *words]).run.resume == "4"


def test_home_and_variables_in_paths(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PROJECT", str(ROOT))
    words = [
        "--run.dir=~/runs",
        "--run.resume=$HOME/old",
        "--task.path=${PROJECT}/tests/tasks/tiny_task.py",
        "--engines.net.ds_config=$PROJECT/ds_configs/zero3.json",
        "--engines.net.init_from=~/weights.sft",
    ]
    config = parse_args(["--config=~/small.toml", *words])
    assert config.run.dir == tmp_path / "runs"
    assert config.run.resume == str(tmp_path / "old")
    assert config.task.path == str(ROOT / "tests/tasks/tiny_task.py")
    assert config.engines["net"].ds_config == ROOT / "ds_configs/zero3.json"
    assert config.engines["net"].init_from == tmp_path / "weights.sft"
    in_the_file = toml.read_text().replace("steps = 7", 'dir = "${HOME}/b"')
    toml.write_text(in_the_file)
    assert load(toml).run.dir == tmp_path / "b"


def test_a_byte_order_mark_is_skipped(toml: Path, tmp_path: Path) -> None:
    toml.write_text(toml.read_text(), encoding="utf-8-sig")
    ds = tmp_path / "ds.json"
    ds.write_text("{}", encoding="utf-8-sig")
    assert load(toml, {"engines": {"net": {"ds_config": str(ds)}}}).run.steps == 7


def test_a_teacher_fits_only_some_stages(toml: Path) -> None:
    for stage in range(4):
        ds = ROOT / f"ds_configs/zero{stage}.json"
        words = ["--engines.wise.role=teacher", f"--engines.wise.ds_config={ds}"]
        if stage in (1, 2):
            with pytest.raises(ConfigError, match=f"ZeRO stage {stage} shards optimizer state"):
                load(toml, parse_overrides(words))
        else:
            assert load(toml, parse_overrides(words)).engines["wise"].role == "teacher"


@pytest.mark.parametrize(
    "key",
    [
        "bf16.bf16_master_weights_and_grads",
        "bfloat16.bf16_optimizer_states",
        "fp16.fp16_master_weights_and_grads",
    ],
)
def test_an_average_is_not_kept_in_16_bits(toml: Path, key: str) -> None:
    words = [f"--engines.net.ds_overrides.{key}=true"]
    load(toml, parse_overrides(words))
    with pytest.raises(ConfigError, match=rf"ds_overrides: {key}: found True, expected false: ema"):
        load(toml, parse_overrides([*words, "--engines.net.ema_decay=0.9"]))


def test_the_resolved_config_can_be_run_again(toml: Path, tmp_path: Path) -> None:
    words = ["--task.args.text='''it's \"odd\"\n\\ é'''", "--task.args.t.u=inf", "--task.args.f=no"]
    over = parse_overrides([*words, f"--run.dir={tmp_path}"])
    config = load(toml, over)
    config.run_dir.mkdir()
    write_config(config)
    assert load(config.run_dir / "config.toml") == config
    assert tomllib.loads((config.run_dir / "config.toml").read_text())["run"]["seed"] == 0


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        assert field.description, f"{prefix}{name} has no docstring"
        within = {"engines": ".NAME.", "mix": ".NAME."}
        within |= dict.fromkeys(("replace", "groups", "events"), "[].")
        yield from (
            leaves(inner, f"{prefix}{name}{within.get(name, '.')}")
            if inner
            else [f"{prefix}{name}"]
        )


def test_help_lists_every_key_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        parse_args(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for key in leaves(Config):
        assert f"  --{key}  <" in text
    assert "--run.steps  <int>  default 1000" in text
    assert "--engines.NAME.ds_config  <path>  default null" in text
    assert "--events[].command  <str>  required" in text
    assert max(len(line) for line in text.splitlines() if " " in line.strip()) <= 80


def test_deepspeeds_json_is_read_once(toml: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "ds.json", tmp_path / "other.json"
    file.write_text('{"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}')
    other.write_text('{"gradient_accumulation_steps": 5}')
    config = load(toml, {"engines": {"net": {"ds_config": str(file)}}})
    engine, dump = config.engines["net"], config.model_dump()
    assert dump["engines"]["net"]["ds_config"] == file and "_file" not in str(dump)
    file.write_text('{"gradient_accumulation_steps": 3, "zero_optimization": {"stage": 2}}')
    for same in (engine, pickle.loads(pickle.dumps(config)).engines["net"], engine.model_copy()):
        assert (same.gradient_accumulation, same.zero_stage) == (2, 1)
    engine.deepspeed()["zero_optimization"]["stage"] = 3
    assert engine.zero_stage == 1  # what is returned is a copy
    overrides = {"gradient_accumulation_steps": 7}
    assert engine.model_copy(update={"ds_overrides": overrides}).gradient_accumulation == 7
    assert engine.model_copy(update={"ds_config": other}).gradient_accumulation == 5
    assert Config.model_validate(dump).engines["net"].gradient_accumulation == 3
    assert EngineConfig.model_validate(engine).gradient_accumulation == 3
    assert engine.model_dump() == dump["engines"]["net"]


def test_a_mistake_of_deepspeeds_names_the_place_that_it_is_in(toml: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 4}}')
    with pytest.raises(ConfigError, match=rf"ds_config {file}: zero_optimization\.stage: found 4"):
        load(toml, {"engines": {"net": {"ds_config": str(file)}}})
    overrides = {"zero_optimization": {"stage": 5}}
    with pytest.raises(ConfigError, match=r"ds_overrides: zero_optimization\.stage: found 5"):
        load(toml, {"engines": {"net": {"ds_config": str(file), "ds_overrides": overrides}}})
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        load(toml, {"engines": {"net": {"ds_config": str(file)}}})
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(toml, {"engines": {"net": {"ds_config": str(file)}}})
    file.write_text('{"gradient_clipping": 1, "gradient_clipping": 2}')
    with pytest.raises(ConfigError, match=r"repeated keys: \['gradient_clipping'\]"):
        load(toml, {"engines": {"net": {"ds_config": str(file)}}})
    file.write_text('{"gradient_cliping": 2}')
    with pytest.raises(ConfigError, match=rf"ds_config {file}: gradient_cliping: unknown key"):
        load(toml, {"engines": {"net": {"ds_config": str(file)}}})


RATIO = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


@pytest.mark.parametrize(
    ("settings", "ds", "reason"),
    [
        ({"ema_decay": 0.9}, RATIO, "found 0.5, expected 1.0: ema_decay: DeepSpeed updates"),
        ({}, NVME, "offload_param.device: found 'nvme', expected 'cpu': checkpoints would lack"),
        ({"role": "teacher", "init_from": "x.sft"}, NVME, "init_from cannot initialize"),
    ],
)
def test_deepspeeds_settings_that_do_not_fit_the_engines(
    toml: Path, settings: dict[str, Any], ds: dict[str, Any], reason: str
) -> None:
    zero0 = str(ROOT / "ds_configs/zero0.json")
    optimizer = {} if "role" in settings else {"optimizer": {"name": "adamw"}}
    engine = {"ds_config": zero0, "ds_overrides": ds} | optimizer | settings
    with pytest.raises(ConfigError, match=reason):
        load(toml, {"engines": {"other": engine}})
    allowed = {"role": "teacher"} if ds is NVME else {"optimizer": {"name": "adamw"}}
    load(toml, {"engines": {"other": {"ds_config": zero0, "ds_overrides": ds} | allowed}})


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_the_shipped_deepspeed_configs_are_usable(toml: Path, path: Path) -> None:
    config = load(toml, {"engines": {"net": {"ds_config": str(path)}}})
    assert config.engines["net"].gradient_accumulation == 1
    assert json.loads(path.read_text())["gradient_clipping"] == 1.0


def test_merge_goes_table_by_table() -> None:
    base: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, {"a": {"c": {"d": 4}}, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": {"d": 4}},
        "e": {"f": 5},
    }
    assert base["a"]["c"]["d"] == 2

"""The task on corpora of tokens: packed, mixed, and the same loss on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.config.sections import merge
from harness.data.token_files import TokenWriter
from harness.run import run_in_world
from tests.support.helpers import ROOT, Pools, error_of, losses, records, tiny_config


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for name, texts in {
        "code": [b"def f(x):\n    return x\n" * (1 + n % 3) for n in range(40)],
        "prose": [b"It was a dark and stormy night. " * (1 + n % 4) for n in range(30)],
        "held-out": [b"def g(y):\n    return y + 1\n"] * 5,
    }.items():
        with TokenWriter(tmp_path / name, "u1") as writer:
            writer.write([list(text + b"\0") for text in texts])
    return tmp_path


def config_of(corpora: Path, name: str, args: dict[str, Any], **overrides: Any) -> Config:
    defaults = {"vocabulary": 256, "seq_len": 64, "dim": 32, "layers": 1}
    tables: dict[str, Any] = {
        "run": {"steps": 4},
        "task": {"path": str(ROOT / "launch/tasks/lm.py"), "args": defaults | args},
        "data": {"micro_batch_size": 2},
    }
    config = tiny_config(corpora / name, 2, **merge(tables, overrides)).model_dump()
    config["engines"] = {"lm": config["engines"].pop("net")}
    return Config.model_validate(config)


def test_a_mixture_of_packed_corpora_trains_and_resumes(pools: Pools, corpora: Path) -> None:
    mix = {name: {"source": str(corpora / name)} for name in ("code", "prose")}
    args = {"eval_corpus": str(corpora / "held-out")}

    def config(name: str, steps: int) -> Config:
        return config_of(corpora, name, args, data={"mix": mix}, run={"steps": steps})

    whole = config("whole", 4)
    pools(2).run(run_in_world, whole)
    pools(2).run(run_in_world, config("resumed", 2))
    pools(2).run(run_in_world, config("resumed", 4))
    assert losses(config("resumed", 4)) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    found = records(whole)[-1]
    assert found["epoch/code"] > 0
    assert found["epoch/prose"] > 0
    assert records(whole, "eval/")[-1]["eval/loss"] < 5.6


def test_the_loss_is_that_of_one_process(pools: Pools, corpora: Path) -> None:
    """Labels that count are weighed, whatever the windows hold."""
    args = {"corpus": str(corpora / "prose"), "packing": "greedy"}
    found = {}
    for ranks, size in ((1, 4), (2, 2)):
        data = {"micro_batch_size": size}
        config = config_of(corpora, f"ranks-{ranks}", args, data=data)
        pools(ranks).run(run_in_world, config)
        found[ranks] = losses(config)
    assert found[2] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "set task.args.corpus"),
        ({"corpus": "none"}, "task.args.corpus: none: no such corpus"),
        ({"corpus": "CORPORA/code", "vocabulary": 100}, r"token 120 is outside of the vocabulary"),
        ({"corpus": "CORPORA/code", "packing": "best"}, "packing"),
    ],
)
def test_what_is_wrong_is_known_before_step_1(
    pools: Pools, corpora: Path, args: dict[str, Any], message: str
) -> None:
    args = {k: v.replace("CORPORA", str(corpora)) if k == "corpus" else v for k, v in args.items()}
    assert message in pools(1).run(error_of, config_of(corpora, "wrong", args))[0]

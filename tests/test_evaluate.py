"""Evaluation over whole sets, on several ranks, against one pass of plain PyTorch over all samples.

The expected numbers do not depend on ranks, ZeRO stage, micro-batch size, workers or kind of data.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness import distributed
from harness.config import Config
from harness.config.sections import merge
from harness.engine.build import build_engines
from harness.engine.engines import Engines
from harness.errors import ConfigError, HarnessError, TaskError
from harness.evaluate import MAX_SUMMED, _add, check_best_metric, evaluate
from harness.run import run_in_world
from harness.task import (
    Task,
    check_eval_data,
    checked_stats,
    default_feeder,
    load_task,
    validate,
)
from harness.testing.pool import RankError, RankPool
from tests.support.helpers import ROOT, Pools, error_of, log_text, losses, records, tiny_config
from tests.tasks import tiny_task
from tests.tasks.evaluated_task import PAD, Texts, pad, perplexity_and_f1, tagger

TASK = str(ROOT / "tests/tasks/evaluated_task.py")
Metrics = dict[str, float]


def config_of(directory: Path, stage: int, size: int = 4, workers: int = 0, **args: Any) -> Config:
    """An evaluation of the tagger, by the task's `args`."""
    table = {
        "task": {"path": TASK, "args": args},
        "data": {"micro_batch_size": size, "workers": workers},
        "engines": {"net": {"ds_overrides": NO_PERSISTENCE}} if stage == 3 else {},
    }
    return tiny_config(directory, stage, **table)


NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def evaluated(configs: list[Config]) -> list[Metrics]:
    """The metrics of one untrained model, by config: of tasks that differ in all but the model."""
    distributed.seed_everything(configs[0].run.seed)
    engines = build_engines(load_task(configs[0]), configs[0])
    found = []
    for config in configs:
        task = load_task(config)
        before = torch.get_rng_state()
        metrics = evaluate(Engines(dict(engines), task, ExitStack()), task, config, lambda: False)
        assert metrics is not None and torch.equal(torch.get_rng_state(), before)
        found.append(metrics)
    engines.close()
    return found


def plain_sums(texts: Texts) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sums over the set of one process, and the mean loss of each sample."""
    torch.manual_seed(0)
    model = tagger()
    ids, classes = pad([texts[index] for index in range(len(texts))])
    with torch.no_grad():
        logits = model(ids)
    nll = F.cross_entropy(
        logits.flatten(0, 1), classes.flatten(), ignore_index=PAD, reduction="none"
    ).view_as(classes)
    known = classes != PAD
    confusion = torch.zeros(3, 3)
    for truth, guess in zip(classes[known], logits.argmax(-1)[known], strict=True):
        confusion[truth, guess] += 1
    sums = {"nll": nll.sum(), "tokens": known.sum(), "confusion": confusion}
    return sums, nll.sum(1) / known.sum(1)


def token_mean(texts: Texts) -> float:
    sums, _ = plain_sums(texts)
    return float(sums["nll"] / sums["tokens"])


KINDS = [
    ({"kind": "map", "sums": True}, 3, 2),
    ({"kind": "map", "weigh": True}, 22, 0),
    ({"kind": "samples", "sums": True}, 5, 0),
    ({"kind": "samples", "weigh": True}, 4, 2),
    ({"kind": "batches", "sums": True}, 1, 0),
    ({"kind": "batches", "weigh": True}, 1, 0),
]
"""Kind of held-out data, micro-batch size, workers."""


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 3), (3, 1), (3, 3)])
def test_metrics_of_whole_sets(pools: Pools, tmp_path: Path, ranks: int, stage: int) -> None:
    sums, _ = plain_sums(Texts(22, 2))
    expected = {f"eval/{name}": float(value) for name, value in perplexity_and_f1(sums).items()}
    loss = {"eval/loss": token_mean(Texts(22, 2))}
    configs = [config_of(tmp_path, stage, size, workers, **how) for how, size, workers in KINDS]
    for (how, *_), *by_rank in zip(KINDS, *pools(ranks).run(evaluated, configs), strict=True):
        wanted = expected if "sums" in how else loss
        assert all(metrics == by_rank[0] for metrics in by_rank)
        assert by_rank[0] == pytest.approx(wanted, rel=0, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_mean_over_terms_does_not_depend_on_batches(
    pools: Pools, tmp_path: Path, ranks: int
) -> None:
    """Not even if some samples have no term, and the loss of their batch is NaN."""
    silent = [0, 1, 2, 7]
    configs = [
        config_of(tmp_path, 1, size, weigh=True, silent=silent, samples=samples)
        for size in (1, 2, 5, 8)
        for samples in (10, 3)
    ]
    few, none = token_mean(Texts(10, 2, tuple(silent))), torch.nan
    for metrics in pools(ranks).run(evaluated, configs):
        found = [m["eval/loss"] for m in metrics]
        assert found == pytest.approx([few, none] * 4, rel=0, abs=1e-6, nan_ok=True)


TOKENS = {
    "losses": [3.1022, 3.0311, 3.0488, 2.9585, 2.9723, 2.9502, 2.9523, 2.9160],
    "evaluations": [3.0803, 2.9236],
}
"""Means over the tokens of plain PyTorch, by steps of 8 texts, and on all 24 held-out texts."""


@pytest.mark.parametrize(("ranks", "size", "accumulation"), [(1, 1, 8), (2, 4, 1), (4, 1, 2)])
def test_the_tokens_of_a_language_model_count_alike(
    pools: Pools, tmp_path: Path, ranks: int, size: int, accumulation: int
) -> None:
    """In training and evaluation; texts have 3 or 40 tokens."""
    engine = {
        "optimizer": {"name": "torch.optim:SGD", "lr": 2.0, "weight_decay": 0.0},
        "ds_overrides": {"gradient_accumulation_steps": accumulation},
    }
    config = tiny_config(
        tmp_path,
        1,
        run={"steps": 8},
        task={"path": str(ROOT / "tests/tasks/tokens_task.py")},
        engines={"net": engine},
        data={"micro_batch_size": size, "sampler": "ordered"},
        trainer={"eval_every": 8},
    )
    pools(ranks).run(run_in_world, config)
    assert losses(config) == pytest.approx(TOKENS["losses"], abs=1e-4)
    found = [record["eval/loss"] for record in records(config, "eval/")]
    assert found == pytest.approx(TOKENS["evaluations"], abs=1e-4)


def test_without_weights_samples_count_alike(two_ranks: RankPool, tmp_path: Path) -> None:
    """One sample in a batch; the last batches are incomplete, and one rank has none at all."""
    _, per_sample = plain_sums(Texts(5, 2))
    configs = [config_of(tmp_path, 3, 1, kind=kind, samples=5) for kind in ("map", "samples")]
    for metrics in two_ranks.run(evaluated, configs):
        expected = [{"eval/loss": float(per_sample.mean())}] * 2
        assert metrics == [pytest.approx(e, rel=0, abs=1e-6) for e in expected]


def test_fewer_samples_than_ranks(four_ranks: RankPool, tmp_path: Path) -> None:
    expected = token_mean(Texts(1, 2))
    configs = [config_of(tmp_path, 3, kind=k, samples=1, weigh=True) for k in ("map", "batches")]
    for metrics in four_ranks.run(evaluated, configs):
        assert metrics == [{"eval/loss": pytest.approx(expected, abs=1e-6)}] * 2


def test_named_sets_are_reported_and_ranked_by_name(two_ranks: RankPool, tmp_path: Path) -> None:
    best = {"keep_last": 1, "keep_best": 1, "best_metric": "eval/test/loss"}
    config = config_of(tmp_path, 3, kind="sets", weigh=True)
    config = Config.model_validate(
        merge(config.model_dump(), {"trainer": {"eval_every": 3}, "checkpoint": best})
    )
    two_ranks.run(run_in_world, config)
    found = records(config, "eval/")
    assert [record["step"] for record in found] == [0, 3, 6]
    assert found[0]["eval/dev/loss"] == pytest.approx(token_mean(Texts(22, 2)), abs=1e-6)
    assert found[0]["eval/test/loss"] == pytest.approx(token_mean(Texts(9, 5)), abs=1e-6)


def test_an_evaluation_does_not_change_the_training(two_ranks: RankPool, tmp_path: Path) -> None:
    """Not even one through a DataLoader, which draws from torch's generator."""
    configs = []
    for every in (0, 1):
        config = config_of(tmp_path / str(every), 1, kind="batches")
        dropout = merge(config.model_dump(), {"trainer": {"eval_every": every}})
        dropout = merge(dropout, {"task": {"args": {"dropout": 0.5}}})
        configs.append(Config.model_validate(dropout))
        two_ranks.run(run_in_world, configs[-1])
    assert losses(configs[0]) == losses(configs[1])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_corrupt_sample_is_raised_on_all_ranks_at_once(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = config_of(tmp_path, stage, 1, kind="broken")
    errors = two_ranks.run(error_of, config)
    assert all("rank 1: evaluation:" in text and "corrupt sample 3" in text for text in errors)
    assert "saved" in log_text(config)  # the evaluation at the end is after all steps


def failing_in_a_forward(config: Config) -> str:
    """The error of a run whose second evaluation forward fails on rank 1."""
    calls = 0

    def add(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and distributed.global_rank() == 1:
            raise RuntimeError("it is unwell")
        original(*args, **options)

    original = _add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.evaluate._add", add)
        return error_of(config)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_failure_in_a_forward_ends_all_ranks(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """Within seconds, though at stage 3 the other rank waits in a collective of the forward."""
    config = config_of(tmp_path, stage, 1)
    if stage == 2:
        for error in two_ranks.run(failing_in_a_forward, config):
            assert "rank 1: evaluation:" in error and "it is unwell" in error
    else:
        with pytest.raises(RankError, match=r"rank 1: (.|\n)*it is unwell"):
            two_ranks.run(failing_in_a_forward, config)
    assert "RuntimeError: it is unwell" in log_text(config)


def build_with(**fields: Any) -> Task:
    return Task(models={}, train_data=[], **fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "eval_data is a str, expected a map-style dataset"),
        (7, "eval_data is a int, expected"),
        (iter([1]), "eval_data is a list_iterator, which can be read only once"),
        ((n for n in range(3)), "eval_data is a generator, which can be read only once"),
        ([], "eval_data: list has no items"),
        ({}, "eval_data has no sets"),
        ({"dev": [1], "test": 3}, "eval_data['test'] is a int"),
        ({"dev": []}, "eval_data['dev']: list has no items"),
        ({"de v": [1]}, "eval_data: the name 'de v' of a set"),
    ],
)
def test_data_of_a_wrong_kind_is_known_before_step_1(
    tmp_path: Path, data: Any, message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        check_eval_data(build_with(eval_data=data), tiny_config(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [[1], np.ones(3), torch.ones(3), {0: "a", 1: "b"}], ids=str)
def test_lengths_of_data_that_can_be_evaluated(tmp_path: Path, data: Any) -> None:
    lengths = check_eval_data(build_with(eval_data=data), tiny_config(tmp_path))
    assert lengths == {"eval_data": len(data)}


def test_sets_that_differ_between_ranks_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    errors = two_ranks.run(error_with_another_set, config_of(tmp_path, 0, kind="sets"))
    assert all("eval_data['dev'] differs in length between the ranks: [22, 5]" in e for e in errors)


def error_with_another_set(config: Config) -> str:
    args = {"samples": 5 if distributed.global_rank() else 22}
    task = config.task.model_copy(update={"args": config.task.args | args})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.startup.check_ranks_alike", lambda config: None)
        return error_of(config.model_copy(update={"task": task}))


def returned(config: Config, what: dict[str, Any]) -> str:
    """The error of an evaluation whose functions return `what` on this rank."""
    task = load_task(config)
    task.evaluate = lambda engine, batch: what["evaluate"](len(batch[0]))
    task.summarize = what.get("summarize")
    engines = build_engines(task, config)
    try:
        evaluate(engines, task, config, lambda: False)
    except HarnessError as error:
        return str(error) if error.on_all_ranks else f"on one rank: {error}"
    finally:
        engines.close()
    return ""


def words(size: int) -> Any:
    return {"accuracy": "high"}


def not_a_dict(size: int) -> Any:
    return 1.0


def by_batch(size: int) -> Any:
    return {"hits": torch.ones(size)}


def by_rank(size: int) -> Any:
    return {"hits": torch.ones(1 + distributed.global_rank())}


def huge(size: int) -> Any:
    return {"predictions": torch.ones(1).expand(MAX_SUMMED + 1)}


def good(size: int) -> Any:
    return {"hits": torch.ones(2, 2)}


def nothing(sums: Any) -> Any:
    return None


def the_same(sums: Any) -> Any:
    return sums


def broken(sums: Any) -> Any:
    return {"hits": 1 / 0}


@pytest.mark.parametrize(
    ("evaluate", "summarize", "message"),
    [
        (words, None, "Task.evaluate returned the stat 'accuracy' = 'high', expected a number"),
        (not_a_dict, None, "Task.evaluate returned float, expected a dict of numbers"),
        (by_batch, the_same, "'hits' with the shapes [4] and [1]"),
        (by_rank, the_same, "'hits' with the shapes [1] and [2]"),
        (
            huge,
            the_same,
            "returned 16,777,217 numbers to be summed, in predictions: expected at",
        ),
        (good, nothing, "Task.summarize returned NoneType, expected a dict of numbers"),
        (good, the_same, "Task.summarize returned 'hits' = tensor("),
        (good, broken, "ZeroDivisionError"),
    ],
)
def test_what_breaks_the_contract(
    two_ranks: RankPool, tmp_path: Path, evaluate: Any, summarize: Any, message: str
) -> None:
    config = config_of(tmp_path, 0, samples=9)
    errors = two_ranks.run(error_of_evaluation, config, evaluate, summarize)
    assert all(message in text for text in errors)


def error_of_evaluation(config: Config, evaluate_size: Any, summarize: Any) -> str:
    """The error of an evaluation that returns `evaluate_size(samples)` for each batch."""
    task = load_task(config)
    task.evaluate = lambda engine, batch: evaluate_size(len(batch[0]))
    task.summarize = summarize
    engines = build_engines(task, config)
    try:
        evaluate(engines, task, config, lambda: False)
    except HarnessError as error:
        assert error.on_all_ranks
        return str(error)
    finally:
        engines.close()
    return ""


def test_sums_need_an_evaluate_that_returns_them() -> None:
    with pytest.raises(TaskError, match="summarize needs evaluate"):
        validate(build_with(summarize=the_same), "task.py")


def test_numbers_of_any_kind_are_numbers() -> None:
    given = {
        "float32": np.float32(0.5),
        "float64": np.float64(0.5),
        "int64": np.int64(2),
        "bool": True,
        "numpy_bool": np.bool_(True),
        "array": np.array(0.5, dtype=np.float32),
        "vector": np.array([1, 3]),
        "tensor": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "nan": float("nan"),
    }
    found = {name: float(torch.as_tensor(v).double().mean()) for name, v in checked(given).items()}
    assert found.pop("nan") != found.get("nan")
    assert found == {
        **{"float32": 0.5, "float64": 0.5, "int64": 2.0, "bool": 1.0, "numpy_bool": 1.0},
        **{"array": 0.5, "vector": 2.0, "tensor": 7.0, "flags": 0.5},
    }
    assert not checked({"it": torch.ones(1, requires_grad=True).sum()})["it"].requires_grad
    for value in ("x", None, 1j, np.array("x"), torch.tensor(1j), [1.0]):
        with pytest.raises(TaskError, match="expected a number"):
            checked({"it": value})


def run_with_numbers_as_names(config: Config) -> None:
    def build(config: Config) -> Task:
        def feed(engine: Any, batch: Any) -> tuple[Tensor, Any]:
            return default_feeder(engine, batch)[0], {7: 0.5}

        return replace(tiny_task.build(config), feeder=feed)

    run_in_world(config, build=build)


def test_names_become_text(pools: Pools, tmp_path: Path) -> None:
    """Also those of the only engine, which are not renamed."""
    config = tiny_config(tmp_path, run={"steps": 2})
    pools(1).run(run_with_numbers_as_names, config)
    assert [record["7"] for record in records(config)] == [0.5, 0.5]


def checked(stats: dict[str, Any]) -> Any:
    return checked_stats(stats, "the feeder")


def best(metric: str, engines: int = 1, **fields: Any) -> tuple[Config, Task]:
    one = tiny_config(Path()).engines["net"].model_dump()
    table = {"checkpoint": {"keep_last": 1, "keep_best": 1, "best_metric": metric}}
    more = {"engines": {f"e{n}": one for n in range(engines - 1)}}
    return tiny_config(Path(), 0, **table, **more), build_with(**{"eval_data": [1], **fields})


@pytest.mark.parametrize(
    ("how", "known", "message"),
    [
        (best("loss"), (), "'loss' is not a metric of an evaluation (did you mean 'eval/loss'?)"),
        (best("f1"), (), "(did you mean 'eval/f1'?): these are eval/..."),
        (
            best("eval/loss", 2),
            (),
            "these are eval/net/..., eval/e0/...",
        ),
        (
            best("eval/loss", eval_data={"dev": [1], "test": [1]}),
            (),
            "(did you mean 'eval/dev/loss'?): these are eval/dev/..., eval/test/...",
        ),
        (
            best("eval/acuracy"),
            ("eval/loss", "eval/accuracy"),
            "(did you mean 'eval/accuracy'?): these are eval/accuracy, eval/loss",
        ),
        (best("eval/other", eval_data=None), (), "keep_best is set, but the task has no eval_data"),
    ],
)
def test_a_best_metric_that_no_evaluation_has_is_an_error(
    how: tuple[Config, Task], known: tuple[str, ...], message: str
) -> None:
    config, task = how
    with pytest.raises(ConfigError) as caught:
        check_eval_data(task, config)
        check_best_metric(config, task, known)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("how", "known"),
    [
        (best("eval/loss"), ()),
        (best("eval/loss"), ("eval/loss",)),
        (best("eval/e0/loss", 2), ()),
        (best("eval/test/f1", eval_data={"test": [1]}), ()),
    ],
)
def test_a_best_metric_that_may_exist(how: tuple[Config, Task], known: tuple[str, ...]) -> None:
    check_best_metric(*how, known)


BY_STEP = {0: 1.0, 2: 0.9, 4: 0.5, 6: 0.3, 8: float("nan"), 10: 0.6}


def with_losses(config: Config) -> None:
    """A run whose evaluations at each step are `BY_STEP`."""

    def with_evaluate(config: Config) -> Task:
        task = load_task(config)
        task.evaluate = lambda engine, batch: {"loss": BY_STEP[engine.peers.global_step]}
        return task

    run_in_world(config, None, with_evaluate)


def test_the_best_checkpoint_of_a_run_stays(two_ranks: RankPool, tmp_path: Path) -> None:
    """And the last good one, if the newest evaluation is NaN."""
    for steps, left in ((8, [6, 8]), (10, [6, 10])):
        config = tiny_config(
            tmp_path,
            run={"steps": steps},
            trainer={"save_every": 2, "eval_every": 2},
            checkpoint={"keep_last": 1, "keep_best": 1},
        )
        two_ranks.run(with_losses, config)
        found = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
        assert found == [f"step-{step:08d}" for step in left]


def test_the_best_metric_is_checked_in_a_run(two_ranks: RankPool, tmp_path: Path) -> None:
    keep = {"keep_last": 1, "keep_best": 1}
    for metric, evaluations in (("loss", 0), ("eval/f1", 1)):
        config = tiny_config(
            tmp_path / metric,
            trainer={"save_every": 2, "eval_every": 2},
            checkpoint=keep | {"best_metric": metric},
        )
        errors = two_ranks.run(error_of, config)
        assert all(f"checkpoint.best_metric = {metric!r} is not a metric" in e for e in errors)
        assert config.run_dir.exists() == bool(evaluations)
        assert not evaluations or len(records(config, "eval/")) == evaluations
        assert not list(tmp_path.rglob("step-*"))  # nothing was trained

"""Evaluation on the held-out data, every rank its share, and every sample counted once."""

import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from harness import distributed
from harness.config import Config
from harness.data.held_out import Counted, read_once, sets_of
from harness.data.step_batches import checked_weight
from harness.distributed.rng import seeded
from harness.engine.engines import Engines
from harness.errors import ConfigError, TaskError, did_you_mean, first_few
from harness.health import phases
from harness.task import Task, checked_stats
from harness.utils import to_device

Sums = dict[tuple[str, str], Tensor]
"""Sums over batches in float64, by engine and name. Of a mean: that of the weighted means, and that
of the weights, (2,)."""

Shapes = dict[tuple[str, str], dict[torch.Size, None]]
"""The different ones of each sum, in the order of the ranks."""

MAX_SUMMED = 2**24
"""Most numbers in the sums of a set: 128 MB on every rank."""

DONE, READ, FAILED = range(3)
"""What a rank can say before each round of batches; the largest of all ranks decides."""


def evaluate(
    engines: Engines, task: Task, config: Config, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """The metrics of every trained engine on every held-out set: `eval/loss`, with named sets
    `eval/SET/loss`, with several engines `eval/SET/ENGINE/loss`.

    Collective; the same result on every rank. The engines are in evaluation mode meanwhile, with
    their EMA weights if they keep them, and the random generators are seeded alike in every
    evaluation. None if `should_stop`, which every rank calls after each batch, returned True. A
    failure on one rank is raised on all of them, except in a forward at ZeRO stage 3.
    """
    found: dict[str, float] = {}
    seed, rank = config.run.seed, distributed.global_rank()
    ranks = rank, distributed.world_size()
    engines.sync_buffers(search=True)
    engines.log_own_buffers("evaluates with each rank's own buffers")
    engines.eval()
    try:
        with engines.averaged(), seeded(seed, rank):
            for name, data in sets_of(task.eval_data).items():
                with closing(
                    read_once(data, config.data, task.collate, task.count, seed, *ranks)
                ) as batches:
                    sums = _sum_up(engines, task, batches, should_stop)
                if sums is None:
                    return None
                prefix = f"eval/{name}/" if name else "eval/"
                for key, number in _summarize(engines, task, _over_ranks(sums)).items():
                    found[prefix + key] = number
    finally:
        engines.train()
    return found


def _sum_up(
    engines: Engines, task: Task, batches: Iterator[Counted], should_stop: Callable[[], bool]
) -> Sums | None:
    """This rank's sums over its batches; None if `should_stop` returned True. Collective.

    All ranks make equally many forwards, so that their collectives match: a rank that has no batch
    left repeats one, which does not count.
    """
    sums: Sums = {}
    failure: Exception | None = None
    own: Counted | None = None
    latest: Counted | None = None
    while True:
        if failure is None:
            try:
                own = next(batches, None)
            except Exception as error:  # raised on all ranks, below
                failure = error
        state = READ if own is not None else DONE
        (agreed,) = distributed.all_reduce_max([FAILED if failure else state])
        if agreed != READ:
            break
        latest = _or_that_of_another_rank(own) if latest is None else own or latest
        try:
            _add(sums, engines, task, latest, counts=own is not None)
        except Exception as error:
            if any(engine.zero_stage == 3 for engine in engines.values()):
                raise  # the other ranks wait in collectives of this forward, until this one ends
            failure = error
        if should_stop():
            return None
        phases.beat()
    with distributed.raise_on_all_ranks("evaluation"):
        if failure is not None:
            raise failure
        if latest is None and agreed == DONE:
            raise TaskError("eval_data: no rank has a batch")
    return sums


def _or_that_of_another_rank(batch: Counted | None) -> Counted:
    """The batch, or on ranks that have none that of the first rank that has one. Collective."""
    source, all_have = distributed.first_rank(batch is not None)
    if not all_have:
        assert source is not None  # for all ranks have read, or had none left
        pickled = b""
        with distributed.raise_on_all_ranks("a batch of eval_data, for ranks that have none"):
            if distributed.global_rank() == source:
                pickled = pickle.dumps(batch)
        pickled = distributed.broadcast(pickled, source)
        batch = batch or pickle.loads(pickled)
    assert batch is not None
    return batch


def _add(sums: Sums, engines: Engines, task: Task, batch: Counted, counts: bool) -> None:
    """Evaluates a batch; if it `counts`, adds the results to the sums."""
    samples, tree = batch
    weight = samples if task.weigh is None else checked_weight(task.weigh(tree))
    reports = engines.evaluate(to_device(tree, distributed.device()))
    found = {(e, name): value for e, report in reports.items() for name, value in report.items()}
    for key, value in found.items() if counts else ():
        value = torch.as_tensor(value, device=distributed.device()).to(torch.float64)
        if task.summarize is None:
            mean = value.mean() if weight else value.new_zeros(())  # a mean over no terms is NaN
            value = torch.stack([mean * weight, torch.full_like(mean, weight)])
        total = sums.setdefault(key, torch.zeros_like(value))
        if total.shape != value.shape:
            raise _shape_error(key[1], total.shape, value.shape)
        sums[key] = total + value


def _shape_error(name: str, *shapes: Sequence[int]) -> TaskError:
    found = " and ".join(str(list(shape)) for shape in shapes)
    return TaskError(
        f"Task.evaluate returned {name!r} with the shapes {found}: what is summed must have one "
        "shape in all batches"
    )


def _over_ranks(sums: Sums) -> Sums:
    """The sums over all ranks, on the CPU. Collective. Raises TaskError on all ranks."""
    found = distributed.all_reduce({key: {total.shape: None} for key, total in sums.items()}, _both)
    shapes = {key: next(iter(different)) for key, different in found.items()}
    with distributed.raise_on_all_ranks("evaluation"):
        for key, different in found.items():
            if len(different) > 1:
                raise _shape_error(key[1], *list(different)[:2])
        numbers = sum(shape.numel() for shape in shapes.values())
        if numbers > MAX_SUMMED:
            raise TaskError(
                f"Task.evaluate returned {numbers:,} numbers to be summed, in "
                f"{first_few(name for _, name in shapes)}: expected at most {MAX_SUMMED:,}"
            )
    own = [sums[key].cpu() if key in sums else torch.zeros(shapes[key]).double() for key in shapes]
    vector = torch.cat([torch.zeros(0).double(), *(part.flatten() for part in own)])
    distributed.all_reduce_sum(vector)
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {key: part.view(shapes[key]) for key, part in zip(shapes, parts, strict=True)}


def _both(some: Shapes, more: Shapes) -> Shapes:
    return {key: some.get(key, {}) | more.get(key, {}) for key in some | more}


def _summarize(engines: Engines, task: Task, sums: Sums) -> dict[str, float]:
    """The metrics of a set, under their log names. Collective. Raises TaskError on all ranks."""
    by_engine: dict[str, dict[str, Tensor]] = {}
    for (engine, name), total in sums.items():
        by_engine.setdefault(engine, {})[name] = total
    metrics: dict[str, float] = {}
    with distributed.raise_on_all_ranks("Task.summarize"):
        for engine, totals in by_engine.items():
            if task.summarize is None:
                stats = {name: total / weight for name, (total, weight) in totals.items()}
            else:
                stats = checked_stats(task.summarize(totals), "Task.summarize")
            for name, value in engines.label(engines[engine], stats).items():
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise TaskError(
                        f"Task.summarize returned {name!r} = {value}, expected a number"
                    )
                metrics[name] = float(value)
    return metrics


def check_best_metric(config: Config, task: Task, known: Collection[str] = ()) -> None:
    """Raises ConfigError if `keep_best` ranks by a metric that no evaluation has.

    `known`: the metrics of the evaluations so far; before the first one, how it begins is checked.
    """
    metric = config.checkpoint.best_metric
    if not config.checkpoint.keep_best or metric in known:
        return
    several = len(config.engines) > 1
    engines = [name for name, engine in config.engines.items() if engine.role == "train"]
    prefixes = [
        "eval/" + (f"{name}/" if name else "") + (f"{engine}/" if several else "")
        for name in sets_of(task.eval_data)
        for engine in engines
    ]
    if not known and metric.startswith(tuple(prefixes)):
        return
    last = metric.rpartition("/")[2]
    similar = sorted(known) or [prefix + last for prefix in prefixes]
    hint = did_you_mean(metric, similar) or ("" if known else f" (did you mean {similar[0]!r}?)")
    raise ConfigError(
        f"checkpoint.best_metric = {metric!r} is not a metric of an evaluation{hint}: these are "
        + ", ".join(sorted(known) or [f"{prefix}..." for prefix in prefixes])
    )

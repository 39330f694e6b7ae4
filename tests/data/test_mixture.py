"""Mixtures: by weight, each source once an epoch of its own, on any number of ranks."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import Config
from harness.config.sections import merge
from harness.data.mixture import Mixture, MixtureSampler
from harness.run import run_in_world
from tests.support.commanded import commanded
from tests.support.helpers import ROOT, Pools, error_of, log_text, losses, records, tiny_config

LENGTHS = {"code": 7, "web": 30, "math": 3}
WEIGHTS = {"code": 2.0, "web": 5.0, "math": 1.0}
laws = settings(deadline=None, max_examples=40)


def sampler(**options: Any) -> MixtureSampler:
    return MixtureSampler(LENGTHS, WEIGHTS, **options)


def drawn(count: int, world_size: int, **options: Any) -> list[int]:
    """The first draws of all ranks together."""
    streams = [
        sampler(rank=r, world_size=world_size, **options).stream() for r in range(world_size)
    ]
    return [next(streams[number % world_size]) for number in range(count)]


def by_source(indices: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"code": [], "web": [], "math": []}
    for index in indices:
        name = "code" if index < 7 else "web" if index < 37 else "math"
        found[name].append(index - {"code": 0, "web": 7, "math": 37}[name])
    return found


def test_sources_are_drawn_by_weight() -> None:
    found = by_source(drawn(20_000, 1, seed=3))
    for name, weight in WEIGHTS.items():
        assert abs(len(found[name]) / 20_000 - weight / 8) < 0.015, "sigma is 0.0035"


@laws
@given(st.integers(1, 7), st.integers(0, 2**64), st.integers(1, 400))
def test_the_draws_are_the_same_for_any_world_size(world_size: int, seed: int, count: int) -> None:
    assert drawn(count, world_size, seed=seed) == drawn(count, 1, seed=seed)


@laws
@given(st.integers(0, 2**64))
def test_each_source_is_gone_through_before_an_item_comes_again(seed: int) -> None:
    found = by_source(drawn(300, 1, seed=seed))
    for name, items in found.items():
        length = LENGTHS[name]
        for start in range(0, len(items) - length, length):
            assert sorted(items[start : start + length]) == list(range(length))
    epochs = [tuple(found["code"][start : start + 7]) for start in (0, 7, 14)]
    assert len(set(epochs)) == 3


@laws
@given(
    st.integers(0, 2**64),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), max_size=5),
    st.sampled_from([None, {"code": 1.0, "web": 0.0, "math": 3.0}]),
)
def test_runs_at_changing_world_sizes_and_weights_make_one_stream(
    seed: int, runs: list[tuple[int, int]], later: dict[str, float] | None
) -> None:
    """Weights that change after the first run apply from there on."""
    found: list[int] = []
    state = sampler(seed=seed).state_dict()
    for number, (world_size, rounds) in enumerate(runs):
        ranks = [sampler(rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
            if later and number:
                rank.set_weights(later)
        streams = [rank.stream() for rank in ranks]
        found += [next(stream) for _ in range(rounds) for stream in streams]
        for rank in ranks:
            rank.advance(rounds)
        state = ranks[0].state_dict()
        assert all(rank.state_dict() == state for rank in ranks)
    alone = sampler(seed=seed)
    first = runs[0][0] * runs[0][1] if runs else 0
    expected = list(islice(alone.stream(), first))
    alone.advance(first)
    if later:
        alone.set_weights(later)
    expected += islice(alone.stream(), len(found) - first)
    assert found == expected


def test_a_source_without_weight_waits_and_keeps_its_place() -> None:
    one = sampler(seed=1)
    one.advance(40)
    passes = one.passes()
    one.set_weights({"code": 0, "web": 1, "math": 0})
    assert all(7 <= index < 37 for index in islice(one.stream(), 100))
    one.advance(60)
    assert one.passes()["code"] == passes["code"]
    assert one.passes()["web"] == passes["web"] + 2
    assert (one.epoch, one.position, len(one)) == (2, 20, 20)


def test_a_mixture_is_its_sources_one_after_another() -> None:
    mixture = Mixture({"a": "xyz", "b": [10, 20]})
    assert [mixture[index] for index in range(len(mixture))] == ["x", "y", "z", 10, 20]
    assert mixture.lengths == {"a": 3, "b": 2}
    with pytest.raises(IndexError):
        mixture[5]
    with pytest.raises(ValueError, match="'b' has no items"):
        Mixture({"a": "x", "b": ""})


def test_what_does_not_fit_is_named() -> None:
    for weights, message in (
        ({"code": 1.0}, r"weights of \['code'\], but the sources are \['code', 'math', 'web'\]"),
        (dict.fromkeys(LENGTHS, 0.0), "one above 0"),
        (WEIGHTS | {"code": -1.0}, "numbers >= 0"),
        (WEIGHTS | {"code": float("nan")}, "numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureSampler(LENGTHS, weights)
    with pytest.raises(ValueError, match=r"lengths is .*'web': 30.* but .*'web': 31"):
        MixtureSampler(LENGTHS | {"web": 31}, WEIGHTS).load_state_dict(sampler().state_dict())


def test_every_item_comes_equally_often() -> None:
    counts = Counter(drawn(30_000, 1))
    found = by_source(list(counts.elements()))
    for name, length in LENGTHS.items():
        times = Counter(found[name])
        assert len(times) == length
        assert max(times.values()) - min(times.values()) <= 1


def mixture_config(directory: Path, **overrides: Any) -> Config:
    tables: dict[str, Any] = {
        "task": {"path": str(ROOT / "tests/tasks/mixture_task.py")},
        "data": {"mix": {"a": {"weight": 1.0}, "b": {"weight": 3.0}}},
        "control": {"stdin": True},
    }
    return tiny_config(directory, 1, **merge(tables, overrides))


@pytest.mark.parametrize("weigh", [False, True])
def test_a_run_changes_weights_and_resumes(pools: Pools, tmp_path: Path, weigh: bool) -> None:
    """Also with micro-batches that are fetched ahead: the change applies to the next step."""
    task = {"args": {"weigh": weigh}}
    change = "event set data.mix.a.weight 9 @3\n"
    whole = mixture_config(tmp_path / "whole", run={"steps": 6}, task=task)
    pools(2).run(commanded, whole, change)
    stopped = mixture_config(tmp_path / "resumed", run={"steps": 4}, task=task)
    pools(2).run(commanded, stopped, change)
    resumed = mixture_config(tmp_path / "resumed", run={"steps": 6}, task=task)
    pools(2).run(run_in_world, resumed)
    assert losses(resumed) == losses(whole)
    assert "restored live change: data.mix.a.weight = 9.0 (config: 1.0)" in log_text(resumed)
    found = records(whole)
    assert found[-1]["epoch/a"] * 20 + found[-1]["epoch/b"] * 50 == pytest.approx(6 * 2 * 4)
    in_a = [record["epoch/a"] * 20 for record in found]
    assert in_a[5] - in_a[2] > 16 > in_a[2], "of 24 draws each; 6 of the first are expected"


def test_a_rollback_takes_a_later_change_of_weights_back(pools: Pools, tmp_path: Path) -> None:
    """The steps that are taken again have the weights of the checkpoint, as after a resume."""
    config = mixture_config(
        tmp_path,
        run={"steps": 6},
        task={"args": {"nan_at": 5}},
        data={"mix": {"b": {"weight": 1.0}}},
        health={"nonfinite": "rollback"},
    )
    pools(2).run(commanded, config, "event save @2\nevent set data.mix.a.weight 0 @3\n")
    sampler = MixtureSampler({"a": 20, "b": 50}, {"a": 1.0, "b": 1.0})
    sampler.advance(24)
    found = [record["epoch/a"] for record in records(config) if record["step"] >= 3]
    assert found == [pytest.approx(sampler.passes()["a"])] * 4, "weight 0 is set at step 3 again"
    assert "dropping the live change data.mix.a.weight = 0.0" in log_text(config)


def test_a_resumed_run_on_other_ranks_draws_what_is_next(pools: Pools, tmp_path: Path) -> None:
    config = mixture_config(tmp_path, run={"steps": 3})
    pools(2).run(run_in_world, config)
    later = mixture_config(tmp_path, run={"steps": 6})
    pools(1).run(run_in_world, later)
    sampler = MixtureSampler({"a": 20, "b": 50}, {"a": 1.0, "b": 3.0})
    expected = []
    for draws in (8, 8, 8, 4, 4, 4):
        sampler.advance(draws)
        expected.append(sampler.passes())
    found = [{name: r[f"epoch/{name}"] for name in ("a", "b")} for r in records(later)]
    assert found == [pytest.approx(passes) for passes in expected]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"mix": {"c": {}}}}, r"data.mix: weights of \['a', 'b', 'c'\], but the sources"),
        ({"data": {"sampler": "ordered"}}, "mix needs sampler = 'random'"),
        ({"data": {"mix": {"a": {"weight": 0}, "b": {"weight": 0}}}}, "every weight is 0"),
        ({"task": {"args": {"sources": {"a": 0, "b": 5}}}}, "the source 'a' has no items"),
        ({"task": {"path": str(ROOT / "tests/tasks/tiny_task.py")}}, "expected a dict of datasets"),
    ],
)
def test_a_wrong_mixture_is_known_before_step_1(
    pools: Pools, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    try:
        config = mixture_config(tmp_path, **overrides)
    except ValueError as error:
        found = str(error)
    else:
        found = pools(1).run(error_of, config)[0]
    assert re.search(message, found)


@laws
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=3))
def test_dropped_draws_are_left_out_and_all_others_stay(
    world_size: int, parts: list[tuple[int, int]]
) -> None:
    """Each part is of what the ones before have left; a state remembers them."""
    expected = drawn(200, 1)
    spans = [(0, start, start + count) for start, count in parts]
    one = sampler()
    for number, (_, start, stop) in enumerate(spans):
        one.drop(spans[:number])
        assert one.drawn_in([spans[number]]) == expected[start:stop]
        del expected[start:stop]
    ranks = [sampler(rank=rank, world_size=world_size) for rank in range(world_size)]
    found: list[int] = []
    for rank in ranks:
        rank.drop(spans)
    for _ in range(3):
        streams = [rank.stream() for rank in ranks]
        found += [next(stream) for _ in range(12) for stream in streams]
        for rank in ranks:
            rank.advance(12)
        states = [rank.state_dict() for rank in ranks]
        assert states == states[:1] * world_size
        ranks = [sampler(rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(states[0])
    assert found == expected[: len(found)]

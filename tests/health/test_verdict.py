"""When a phase takes too long, and which rank is to blame, in tables."""

import math
from dataclasses import replace
from typing import Any

import pytest

from harness.config.health_section import TimeoutsConfig
from harness.health.phases import PHASES, Phase
from harness.health.stacks import place_in, waits_for_others
from harness.health.verdict import ENDLESS, FLOORS, Report, Verdict, bound_of, judge, narrowed, told

TIMEOUT_S = 1800.0
FIRST_S = 0.95 * TIMEOUT_S


def test_every_phase_has_a_floor_and_a_key() -> None:
    assert set(FLOORS) == set(PHASES)
    assert {*TimeoutsConfig.model_fields, *ENDLESS} == set(PHASES)


@pytest.mark.parametrize(
    ("phase", "longest", "times", "chosen", "bound"),
    [
        ("forward", 0.0, 0, None, FIRST_S),  # may compile
        ("forward", 0.0, 1, None, FIRST_S),
        ("forward", 0.4, 2, None, 300.0),  # the floor
        ("forward", 50.0, 9, None, 500.0),  # ten times the longest
        ("forward", 500.0, 9, None, FIRST_S),
        ("save", 20.0, 9, None, 900.0),
        ("start", 0.0, 0, None, FIRST_S),
        ("end", 0.0, 0, None, 300.0),
        ("paused", 0.0, 9, None, math.inf),
        ("upload", 0.0, 9, None, math.inf),
        ("forward", 50.0, 9, 20.0, 20.0),
        ("forward", 0.0, 1, 20.0, FIRST_S),
        ("forward", 0.0, 1, 7200.0, 7200.0),  # chosen, so run.timeout_s is no limit
        ("forward", 0.0, 9, 7200.0, 7200.0),
        ("start", 0.0, 0, 60.0, 60.0),
        ("forward", 50.0, 9, 0.0, math.inf),
        ("forward", 0.0, 0, 0.0, math.inf),
    ],
)
def test_bounds(
    phase: Phase, longest: float, times: int, chosen: float | None, bound: float
) -> None:
    assert bound_of(phase, longest, times, TIMEOUT_S, {phase: chosen}) == bound


def test_floors_never_exceed_the_timeout_of_collectives() -> None:
    for phase in set(PHASES) - {*ENDLESS}:
        assert bound_of(phase, 0.5, 9, 60.0, {}) == 0.95 * 60


def report(rank: int, count: int, seconds: float = 400.0, **others: Any) -> Report:
    facts: dict[str, Any] = {"host": "node1", "phase": "backward", "step": 12, "bound": 300.0}
    return Report(rank=rank, count=count, seconds=seconds, **(facts | others))


@pytest.mark.parametrize(
    ("reports", "kind", "guilty"),
    [
        ([report(0, 80, 1), report(1, 80, 1)], None, []),
        ([report(0, 80), report(1, 79), report(2, 80)], "hang", [1]),
        ([report(0, 80), report(1, 80)], "hang", [0, 1]),
        ([report(0, 80), report(1, 79, bound=900.0)], None, []),  # it may take longer
        ([report(0, 80), report(1, 79, 301.0)], "hang", [1]),
        ([report(0, 80), report(1, 79, is_debugged=True)], None, []),
        ([report(0, 80), report(1, 80, is_stopped=True)], "hang", [1]),
        ([report(0, 80), report(1, 81)], "hang", [0]),
    ],
)
def test_the_ranks_that_are_furthest_behind_are_to_blame(
    reports: list[Report], kind: str | None, guilty: list[int]
) -> None:
    found = judge(reports, {})
    assert (found and found.kind) == kind
    assert [r.rank for r in found.guilty] == guilty if found else guilty == []


def test_ranks_that_do_not_answer() -> None:
    """Their node, or the network, is gone."""
    gone = {2: report(2, 0, host="node2", phase="start", step=0)}
    found = judge([report(0, 80), report(1, 80)], gone)
    assert found == Verdict("lost_rank", [gone[2]], [report(0, 80), report(1, 80)])
    assert judge([report(0, 80, 1.0), report(1, 80, 1.0)], gone) is None


def test_the_words_of_a_verdict() -> None:
    guilty = report(1, 79, phase="forward", bound=300.0, host="node2")
    waiting = [report(rank, 80) for rank in (0, 2, 3, 4, 5, 6, 7, 8)]
    places = {1: "read (my_task.py:12)"} | dict.fromkeys((0, 2, 3, 4, 5, 6, 7), "all_reduce")
    places[8] = "reduce_scatter"
    assert told(Verdict("hang", [guilty], waiting), places, "Stacks: S.") == (
        "the run hangs: rank 1 on node2: no sign of life for 400 s in phase forward of step 12, in "
        "read (my_task.py:12) (its bound is 300 s); ranks 0, 2, 3, 4, 5, 6 and 1 more wait in "
        "phase backward of step 12, in all_reduce; rank 8 waits in phase backward of step 12, in "
        "reduce_scatter. Stacks: S."
    )
    stopped = told(Verdict("hang", [replace(guilty, is_stopped=True)], []), {}, "Stacks: S.")
    assert "in phase forward of step 12, stopped (SIGSTOP) (its bound is 300 s)" in stopped
    lost = told(Verdict("lost_rank", [guilty], []), {}, "Stacks: S.")
    assert lost == (
        "the run has lost a rank: rank 1 on node2: no answer; last in phase forward of step 12. "
        "Stacks: S."
    )


def test_the_place_in_a_stack() -> None:
    library = "/v/lib/python3.11/site-packages/torch/distributed/"
    stack = f"""Thread 0x00007f1 (most recent call first):
  File "/home/me/my_task.py", line 1 in elsewhere

Current thread 0x00007f2 (most recent call first):
  File "{library}distributed_c10d.py", line 3000 in all_reduce
  File "{library}c10d_logger.py", line 81 in wrapper
  File "/home/me/my_task.py", line 12 in feed
  File "/home/me/harness/trainer.py", line 150 in step
"""
    assert place_in(stack) == "all_reduce of feed (my_task.py:12)"
    assert place_in(stack.replace("distributed_c10d.py", "other.py")) == "feed (my_task.py:12)"
    assert place_in("") == ""


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        (["site-packages/torch/distributed/distributed_c10d.py all_reduce"], True),
        (
            [
                "site-packages/deepspeed/utils/nvtx.py wrapped_fn",
                "site-packages/deepspeed/runtime/zero/partition_parameters.py wait",
            ],
            True,
        ),
        (["harness/distributed/step_vector.py wait"], True),
        (["lib/python3.11/multiprocessing/connection.py wait"], False),  # for a worker
        (["site-packages/torch/nn/modules/linear.py forward"], False),
        ([], False),
    ],
)
def test_a_rank_in_a_collective_is_not_to_blame(frames: list[str], waits: bool) -> None:
    """At ZeRO stage 3 the others wait in the phase of the one that hangs."""
    lines = [f'  File "/v/{f.split()[0]}", line 1 in {f.split()[1]}' for f in frames]
    outer = [
        '  File "/home/me/my_task.py", line 12 in feed',
        '  File "/v/site-packages/torch/distributed/elastic.py", line 1 in main',
    ]
    stack = "\n".join(["Current thread 0x1 (most recent call first):", *lines, *outer])
    assert waits_for_others(stack) == waits


def test_the_guilty_are_not_in_a_collective() -> None:
    both = judge([report(0, 80), report(1, 80)], {})
    assert both is not None
    assert [r.rank for r in narrowed(both, {1}).guilty] == [0]
    assert [r.rank for r in narrowed(both, {1}).waiting] == [1]
    assert narrowed(both, {0, 1}) == narrowed(both, set()) == both

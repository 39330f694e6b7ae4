"""What is a spike after the steps before."""

import json
import math
import random
import statistics

import pytest

from harness.health.spikes import LAG, WINDOW, Spike, Spikes, SpikeWarnings, bound_of


def noise(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(3.0, 0.1) for _ in range(count)]


def filled(steps: int) -> Spikes:
    spikes = Spikes()
    for step, (loss, norm) in enumerate(zip(noise(steps), noise(steps, 1), strict=True), 1):
        spikes.add(step, "net", loss, norm, [])
    return spikes


def test_the_bound_is_six_standard_deviations_above_the_median() -> None:
    values = noise(WINDOW)
    assert bound_of(values) == pytest.approx(3.6, abs=0.2)
    deviations = [abs(value - statistics.median(values)) for value in values]
    expected = statistics.median(values) + 6 * 1.4826 * statistics.median(deviations)
    assert bound_of(values) == pytest.approx(expected)
    assert bound_of([*values[:-9], *[1000.0] * 9]) == pytest.approx(expected, rel=0.05)
    assert bound_of(values[: WINDOW // 2 - 1]) == math.inf
    assert bound_of([2.0] * WINDOW) == pytest.approx(2.12)  # it may change by 1 % of itself


def test_a_spike_is_found_once_and_does_not_hide_the_next() -> None:
    spikes = filled(100)
    assert spikes.found == []
    assert spikes.add(101, "net", 3.0, 5.0, [(0, 8, 16)]) == 1
    assert spikes.add(102, "net", 3000.0, 3.0, []) == 2
    assert spikes.add(103, "net", 3.0, 3.0, []) == 2
    assert spikes.add(103, "other", 1e9, 1e9, []) == 0
    first, second = spikes.take()
    assert (first.step, first.engine, first.spans) == (101, "net", [(0, 8, 16)])
    assert first.text.startswith("gradient norm 5, above 3.")
    assert second.text.startswith("loss 3000, above 3.")
    assert spikes.take() == []


def test_numbers_that_are_not_finite_do_not_count() -> None:
    spikes = filled(100)
    before = spikes.state_dict()
    for loss, norm in ((math.nan, math.inf), (3.0, math.inf), (math.nan, 3.0)):
        spikes.add(101, "net", loss, norm, [])
    assert spikes.state_dict() == before


def test_the_bound_of_a_step_does_not_depend_on_what_is_known_early() -> None:
    """As after a save, which waits for the numbers of all steps."""
    late, early = filled(150), filled(150 + LAG - 1)
    step = 150 + LAG
    assert late.largest_norm(step, "net") == early.largest_norm(step, "net") < math.inf
    assert late.largest_norm(step, "net") != early.largest_norm(step + 1, "net")
    assert late.largest_norm(step, "other") == math.inf


def test_the_state_is_plain_and_complete() -> None:
    spikes = filled(200)
    spikes.add(201, "net", 9.0, 9.0, [(0, 8, 16)])
    again = Spikes()
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert json.dumps(again.state_dict()) == json.dumps(spikes.state_dict())
    for one in (spikes, again):
        one.add(202, "net", 9.0, 9.0, [])
    assert again.largest_norm(203, "net") == spikes.largest_norm(203, "net")
    assert [s.step for s in again.take()] == [201, 202]


def test_the_log_warns_of_a_spike_in_ten_minutes_and_counts_the_others() -> None:
    warnings, told = SpikeWarnings(), []
    for step in range(1, 93):  # every 6.6 seconds
        told.append(warnings.text(Spike(step, "net", "loss 3, above 2", []), 6.6 * step))
    assert [text for text in told if text] == [
        "step 1: engine 'net': a spike: loss 3, above 2",
        "step 92: engine 'net': a spike: loss 3, above 2 (and 90 more spikes since step 1)",
    ]
    assert warnings.text(Spike(92, "other", "loss 3, above 2", []), 608.0).startswith("step 92: ")
    again = warnings.text(Spike(300, "net", "loss 3, above 2", []), 9e9)
    assert again == "step 300: engine 'net': a spike: loss 3, above 2"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_a_spike_is_decided_by_the_bound_of_the_steps_before(seed: int) -> None:
    """Also where that is found out without computing the bound, and after a resume."""
    generator = random.Random(seed)
    spikes, losses, norms, expected = Spikes(), [], [], 0
    for step in range(1, 400):
        loss = generator.choice([2.0, generator.gauss(2, 0.01), generator.gauss(2, 0.2)])
        norm = generator.choice([math.nan, -1.0, generator.lognormvariate(0, 0.3), 9.0])
        pairs = ((loss, losses), (norm, norms))
        expected += any(v > bound_of(before[-WINDOW:]) for v, before in pairs if math.isfinite(v))
        assert spikes.add(step, "net", loss, norm, []) == expected
        if math.isfinite(norm):
            losses.append(loss)
            norms.append(norm)
        if step % 150 == 0:
            state, spikes = spikes.state_dict(), Spikes()
            spikes.load_state_dict(state)
    assert expected

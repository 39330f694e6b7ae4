"""The laws of codebook patterns, and the published tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.pattern import Pattern, coarse_first, delay, from_steps, parallel, unrolled

EMPTY = -1


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    codebooks = draw(st.integers(1, 5))
    timesteps = draw(st.integers(1, 9))
    numbers = st.lists(st.integers(0, 4), min_size=codebooks, max_size=codebooks)
    late = draw(st.none() | numbers)
    match draw(st.integers(0, 4)):
        case 0:
            return parallel(codebooks, timesteps)
        case 1:
            return delay(codebooks, timesteps, late)
        case 2:
            return unrolled(codebooks, timesteps, draw(st.none() | numbers), late)
        case 3:
            return coarse_first(codebooks, timesteps, late)
        case _:  # any order, several codebooks at a step, steps without a token
            steps = [
                draw(st.permutations(range(1, timesteps + 4)))[:timesteps] for _ in range(codebooks)
            ]
            return Pattern(torch.tensor(steps))


def tokens_for(pattern: Pattern, batch: int = 2) -> Tensor:
    """Tokens that are all different, from 1 on."""
    shape = (batch, pattern.codebooks, pattern.timesteps)
    return 1 + torch.arange(batch * pattern.codebooks * pattern.timesteps).reshape(shape)


def by_the_step(pattern: Pattern, tokens_BKT: Tensor) -> tuple[Tensor, Tensor]:
    """What `build` means, one token after the other."""
    step_KT = pattern.step_KT().tolist()
    mask_KS = torch.zeros(pattern.codebooks, pattern.steps, dtype=torch.bool)
    sequence_BKS = torch.full((len(tokens_BKT), *mask_KS.shape), EMPTY)
    for codebook, steps in enumerate(step_KT):
        for timestep, step in enumerate(steps):
            sequence_BKS[:, codebook, step] = tokens_BKT[:, codebook, timestep]
            mask_KS[codebook, step] = True
    return sequence_BKS, mask_KS


@given(patterns())
def test_every_token_occurs_once_and_is_inverted(pattern: Pattern) -> None:
    tokens_BKT = tokens_for(pattern)
    sequence_BKS, mask_KS = pattern.build(tokens_BKT, EMPTY)
    expected_BKS, expected_KS = by_the_step(pattern, tokens_BKT)
    assert torch.equal(sequence_BKS, expected_BKS) and torch.equal(mask_KS, expected_KS)
    assert sorted(sequence_BKS[:, mask_KS].flatten().tolist()) == tokens_BKT.flatten().tolist()
    assert (sequence_BKS[:, ~mask_KS] == EMPTY).all() and not mask_KS[:, 0].any()
    found_BKT, found_KT = pattern.revert(sequence_BKS, EMPTY)
    assert torch.equal(found_BKT, tokens_BKT) and found_KT.all()


@given(patterns(), st.data())
def test_an_incomplete_sequence_is_inverted(pattern: Pattern, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, pattern.steps))
    tokens_BKT = tokens_for(pattern)
    sequence_BKS, mask_KS = pattern.build(tokens_BKT, EMPTY)
    found_BKT, found_KT = pattern.revert(sequence_BKS[..., :steps], EMPTY)
    assert int(found_KT.sum()) == int(mask_KS[:, :steps].sum())
    assert torch.equal(found_BKT, tokens_BKT.where(found_KT, EMPTY))


@given(patterns())
def test_logits_are_reverted_to_the_tokens_that_they_predict(pattern: Pattern) -> None:
    tokens_BKT = tokens_for(pattern)
    vocabulary = int(tokens_BKT.max()) + 1
    sequence_BKS, _ = pattern.build(tokens_BKT, 0)
    perfect_BKSV = torch.nn.functional.one_hot(sequence_BKS[..., 1:], vocabulary).float()
    logits_BKTV, mask_KT = pattern.revert_logits(perfect_BKSV)
    assert torch.equal(logits_BKTV.argmax(-1), tokens_BKT) and mask_KT.all()
    logits_BKTV, mask_KT = pattern.revert_logits(perfect_BKSV[..., :-1, :], float("nan"))
    assert torch.equal(mask_KT, pattern.step_KT() < pattern.steps - 1)
    assert torch.equal(logits_BKTV.isnan().all(-1), ~mask_KT.expand(2, -1, -1))


@given(patterns())
def test_time_increases_in_the_named_patterns(pattern: Pattern) -> None:
    named = [
        parallel(pattern.codebooks, pattern.timesteps),
        delay(pattern.codebooks, pattern.timesteps),
        unrolled(pattern.codebooks, pattern.timesteps),
        coarse_first(pattern.codebooks, pattern.timesteps),
    ]
    for known in named:
        assert (known.step_KT().diff(dim=1) > 0).all()  # no token before an earlier one
        assert (known.step_KT().diff(dim=0) >= 0).all()  # nor before a coarser one


def table(pattern: Pattern) -> list[str]:
    """The timestep of each token, from 1 on, by codebook and step; "." where there is none."""
    timesteps_1KT = torch.arange(1, pattern.timesteps + 1).expand(1, pattern.codebooks, -1)
    sequence_1KS, _ = pattern.build(timesteps_1KT.contiguous(), 0)
    return ["".join(str(t or ".") for t in row) for row in sequence_1KS[0].tolist()]


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        (parallel(4, 4), [".1234", ".1234", ".1234", ".1234"]),
        (delay(4, 4), [".1234...", "..1234..", "...1234.", "....1234"]),
        (delay(3, 4, [0, 1, 1]), [".1234.", "..1234", "..1234"]),
        (unrolled(3, 3), [".1..2..3..", "..1..2..3.", "...1..2..3"]),
        (unrolled(4, 3, [0, 1, 1, 1]), [".1.2.3.", "..1.2.3", "..1.2.3", "..1.2.3"]),
        (unrolled(2, 3, [0, 1], [0, 2]), [".1.2.3....", "......1.2.3"[:11]]),
        (coarse_first(3, 3), [".123...", "....123", "....123"]),
        (coarse_first(3, 3, [0, 0, 1]), [".123....", "....123.", ".....123"]),
    ],
)
def test_published_tables(pattern: Pattern, rows: list[str]) -> None:
    """Figure 1 of the MusicGen paper: parallel, delay, partial delay, flattening, partial
    flattening, VALL-E; and delays on top."""
    width = max(map(len, rows))
    assert table(pattern) == [row.ljust(width, ".") for row in rows]


def test_every_pattern_can_be_built_from_steps() -> None:
    pattern = from_steps([[(0, 0)], [], [(1, 0), (0, 1)], [(1, 1)]])
    assert table(pattern) == [".1.2.", "...12"]
    same = from_steps([[(0, 0), (0, 1)], [(1, 1), (1, 0)]])
    assert torch.equal(same.step_KT(), parallel(2, 2).step_KT())


def test_a_pattern_is_cached() -> None:
    assert delay(4, 100) is delay(4, 100, [0, 1, 2, 3])
    assert delay(4, 100).step_KT("cpu") is delay(4, 100).step_KT()


def test_tokens_keep_their_integer_dtype() -> None:
    sequence_BKS, _ = delay(2, 3).build(torch.ones(1, 2, 3, dtype=torch.int16), 7)
    assert sequence_BKS.dtype == torch.int16
    assert delay(2, 3).revert(sequence_BKS, 7)[0].dtype == torch.int16


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: delay(3, 4, [0, 1]), "delays: expected 3 numbers >= 0, found [0, 1]"),
        (lambda: unrolled(2, 4, [0, -1]), "flattening: expected 2 numbers >= 0"),
        (
            lambda: Pattern(torch.ones(2, 2)),
            "found torch.float32 [2, 2], expected a non-empty int64 tensor",
        ),
        (
            lambda: Pattern(torch.zeros(1, 1, dtype=torch.int64)),
            "found step 0, expected steps >= 1",
        ),
        (lambda: Pattern(torch.tensor([[1, 2], [3, 3]])), "step 3 has more than one token of co"),
        (lambda: from_steps([[(0, 0)], [(0, 0)]]), "timestep 0 of codebook 0 has two steps"),
        (lambda: from_steps([[(0, 0)], [(1, 1)]]), "timestep 1 of codebook 0 has no step"),
        (lambda: delay(2, 3).build(torch.ones(1, 2, 4), 0), "[1, 2, 4], expected [batch, 2, 3]"),
        (
            lambda: delay(2, 3).revert(torch.ones(1, 2, 6), 0),
            "[1, 2, 6], expected [batch, 2, at most 5",
        ),
        (
            lambda: delay(2, 3).revert_logits(torch.ones(1, 2, 5, 1)),
            "expected [batch, 2, at most 4",
        ),
    ],
)
def test_invalid_arguments_are_reported(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError) as caught:
        make()
    assert told in str(caught.value)

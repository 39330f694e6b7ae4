"""Codebook patterns: the order in which a model sees the tokens of several codebooks.

An audio codec produces K tokens per timestep. A pattern assigns each token to a step of a
sequence, which a language model then predicts step by step. The idea, and the names, are from
Copet et al., "Simple and Controllable Music Generation" (MusicGen), 2023; "coarse first" is the
order of VALL-E (Wang et al., "Neural Codec Language Models are Zero-Shot Text to Speech
Synthesizers", 2023).

    sequence_BKS, mask_KS = delay(codebooks, timesteps).build(tokens_BKT, empty=1024)

Tensor names end in their shape: B batch, K codebooks, T timesteps, S steps of the sequence, V
vocabulary. Step 0 is empty for all codebooks: the first tokens are predicted from it.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

CACHED = 256
"""Number of patterns cached by arguments, since every batch needs one."""


class Pattern:
    """The step of each token, by codebook and timestep.

    The indices are cached on each device that uses the pattern.
    """

    def __init__(self, step_KT: Tensor):
        """`step_KT`: the step of each token, int64, at least 1.

        Raises ValueError for a step < 1, or one with two tokens of the same codebook.
        """
        if step_KT.dim() != 2 or step_KT.dtype != torch.int64 or not step_KT.numel():
            raise ValueError(
                f"found {step_KT.dtype} {list(step_KT.shape)}, expected a non-empty int64 tensor "
                "[codebooks, timesteps]"
            )
        if (first := int(step_KT.min())) < 1:
            raise ValueError(f"found step {first}, expected steps >= 1, since step 0 is empty")
        self.codebooks, self.timesteps = step_KT.shape
        self.steps = int(step_KT.max()) + 1
        """The length of a complete sequence, step 0 included."""
        counts_KS = torch.zeros(self.codebooks, self.steps, dtype=torch.int64)
        counts_KS.scatter_add_(1, step_KT.cpu(), torch.ones_like(step_KT, device="cpu"))
        if int(counts_KS.max()) > 1:
            codebook, step = (counts_KS > 1).nonzero()[0].tolist()
            raise ValueError(f"step {step} has more than one token of codebook {codebook}")
        self._step_KT = {torch.device("cpu"): step_KT.cpu()}
        self._mask_KS = {torch.device("cpu"): counts_KS > 0}

    def step_KT(self, device: torch.device | str = "cpu") -> Tensor:
        """The step of each token, int64."""
        return _cached_on(self._step_KT, torch.device(device))

    def mask_KS(self, device: torch.device | str = "cpu") -> Tensor:
        """True where a sequence has tokens, bool; elsewhere it is empty."""
        return _cached_on(self._mask_KS, torch.device(device))

    def build(self, tokens_BKT: Tensor, empty: int) -> tuple[Tensor, Tensor]:
        """`(sequence_BKS, mask_KS)`: the tokens at their steps, and `empty` where there are none.

        Raises ValueError for another number of codebooks or timesteps.
        """
        batch, *shape = tokens_BKT.shape
        if shape != [self.codebooks, self.timesteps]:
            raise ValueError(
                f"found tokens of shape {list(tokens_BKT.shape)}, expected "
                f"[batch, {self.codebooks}, {self.timesteps}]"
            )
        sequence_BKS = tokens_BKT.new_full((batch, self.codebooks, self.steps), empty)
        step_1KT = self.step_KT(tokens_BKT.device)[None]
        sequence_BKS.scatter_(2, step_1KT.expand_as(tokens_BKT), tokens_BKT)
        return sequence_BKS, self.mask_KS(tokens_BKT.device)

    def revert(self, sequence_BKS: Tensor, empty: int) -> tuple[Tensor, Tensor]:
        """`(tokens_BKT, mask_KT)`: the inverse of `build`.

        The sequence may have only the first steps: the missing tokens are `empty`, and False in the
        mask. Raises ValueError for another number of codebooks, or too many steps.
        """
        return self._revert(sequence_BKS, 0, empty)

    def revert_logits(self, logits_BKSV: Tensor, empty: float = 0.0) -> tuple[Tensor, Tensor]:
        """`(logits_BKTV, mask_KT)`, for a model that predicts the next step at each step.

        The model's input is all steps but the last, `sequence_BKS[..., :-1]`, or fewer: the missing
        logits are `empty`, and False in the mask. Raises as `revert` does.
        """
        return self._revert(logits_BKSV, 1, empty)

    def _revert(self, values: Tensor, shift: int, empty: float) -> tuple[Tensor, Tensor]:
        """The values at each token's step minus `shift`; `values` is [B, K, steps, ...]."""
        batch, codebooks, steps, *rest = values.shape
        complete = self.steps - shift
        if codebooks != self.codebooks or steps > complete:
            raise ValueError(
                f"found shape {list(values.shape)}, expected "
                f"[batch, {self.codebooks}, at most {complete}, ...]"
            )
        step_KT = self.step_KT(values.device) - shift
        mask_KT = step_KT < steps
        if steps < complete:  # missing values are read from an extra, empty step
            values = torch.cat([values, values.new_full((batch, codebooks, 1, *rest), empty)], 2)
            step_KT = step_KT.where(mask_KT, steps)
        row_K1 = torch.arange(codebooks, device=values.device)[:, None]
        return values[:, row_K1, step_KT], mask_KT


def _cached_on(cache: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in cache:
        cache[device] = cache[torch.device("cpu")].to(device)
    return cache[device]


def parallel(codebooks: int, timesteps: int) -> Pattern:
    """All codebooks of a timestep at one step."""
    return regular(timesteps, (0,) * codebooks)


def delay(codebooks: int, timesteps: int, delays: Sequence[int] | None = None) -> Pattern:
    """Codebook k is delayed by `delays[k]` steps; default: k."""
    delays = _one_per_codebook("delays", range(codebooks) if delays is None else delays, codebooks)
    return regular(timesteps, delays)


def unrolled(
    codebooks: int,
    timesteps: int,
    flattening: Sequence[int] | None = None,
    delays: Sequence[int] | None = None,
) -> Pattern:
    """Each timestep as several steps: codebook k at inner step `flattening[k]` (default: k), and
    delayed by `delays[k]` timesteps. [0, 1, 1, 1] is the paper's partial flattening."""
    inner = range(codebooks) if flattening is None else flattening
    inner = _one_per_codebook("flattening", inner, codebooks)
    late = _one_per_codebook("delays", (0,) * codebooks if delays is None else delays, codebooks)
    stride = max(inner) + 1
    starts = tuple(i + stride * d for i, d in zip(inner, late, strict=True))
    return regular(timesteps, starts, stride)


def coarse_first(codebooks: int, timesteps: int, delays: Sequence[int] | None = None) -> Pattern:
    """All of codebook 0, then the others in parallel, codebook k delayed by `delays[k]` steps."""
    late = _one_per_codebook("delays", (0,) * codebooks if delays is None else delays, codebooks)
    return regular(timesteps, (late[0], *(timesteps + d for d in late[1:])))


@lru_cache(CACHED)
def regular(timesteps: int, starts: tuple[int, ...], stride: int = 1) -> Pattern:
    """Codebook k at step `1 + starts[k]` and every `stride`-th step after it."""
    starts_K1 = torch.tensor(starts, dtype=torch.int64)[:, None]
    return Pattern(1 + starts_K1 + stride * torch.arange(timesteps))


def from_steps(steps: Sequence[Collection[tuple[int, int]]]) -> Pattern:
    """Any pattern: `steps[s]` lists the `(timestep, codebook)` of the tokens at step s + 1.

    Raises ValueError if a token is missing, or has two steps.
    """
    step_of = {}
    for step, coordinates in enumerate(steps, start=1):
        for timestep, codebook in coordinates:
            if (codebook, timestep) in step_of:
                raise ValueError(f"timestep {timestep} of codebook {codebook} has two steps")
            step_of[codebook, timestep] = step
    codebooks, timesteps = (1 + max(numbers) for numbers in zip(*step_of, strict=True))
    step_KT = torch.zeros(codebooks, timesteps, dtype=torch.int64)
    for (codebook, timestep), step in step_of.items():
        step_KT[codebook, timestep] = step
    if (missing := (step_KT == 0).nonzero()).numel():
        codebook, timestep = missing[0].tolist()
        raise ValueError(f"timestep {timestep} of codebook {codebook} has no step")
    return Pattern(step_KT)


def _one_per_codebook(what: str, numbers: Sequence[int], codebooks: int) -> tuple[int, ...]:
    if len(numbers) != codebooks or min(numbers, default=0) < 0:
        raise ValueError(f"{what}: expected {codebooks} numbers >= 0, found {list(numbers)}")
    return tuple(numbers)

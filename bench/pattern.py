"""The cost of a codebook pattern per batch, compared with a Python loop and a plain copy.

    python -m bench.pattern [--codebooks 8] [--timesteps 1500] [--batch 8] [--vocabulary 128]

Each builds a delayed sequence, reverts its tokens and reverts logits, in turn, in one process;
medians. The loop copies one timestep of all samples at a time; a copy of the result is the lower
bound.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.rows import tell_pair
from harness.pattern import Pattern, delay

ROUNDS = 9
EMPTY = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("codebooks", 8), ("timesteps", 1500), ("batch", 8), ("vocabulary", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pattern = delay(args.codebooks, args.timesteps)
    shape = (args.batch, args.codebooks, args.timesteps)
    tokens_BKT = torch.randint(1, args.vocabulary, shape)
    sequence_BKS, _ = pattern.build(tokens_BKT, EMPTY)
    logits_BKSV = torch.randn(*sequence_BKS[..., 1:].shape, args.vocabulary)
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "build": (
            lambda: pattern.build(tokens_BKT, EMPTY)[0],
            lambda: loop_build(pattern, tokens_BKT),
        ),
        "revert": (
            lambda: pattern.revert(sequence_BKS, EMPTY)[0],
            lambda: loop_revert(pattern, sequence_BKS, 0),
        ),
        "revert_logits": (
            lambda: pattern.revert_logits(logits_BKSV)[0],
            lambda: loop_revert(pattern, logits_BKSV, 1),
        ),
    }
    write(f"{list(shape)}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = ("ours, ms", "loop, ms", "copy, ms", "loop/ours", "copy/ours")
    write(" " * 14 + "".join(f"{head:>10}" for head in heads))
    for name, (ours, loop) in cases.items():
        result = ours()
        assert torch.equal(result, loop())
        times: tuple[list[float], ...] = ([], [], [])
        for _ in range(ROUNDS):
            for function, seconds in zip((ours, loop, result.clone), times, strict=True):
                started = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - started)
        milliseconds = [[1e3 * s for s in each] for each in times]
        for against, other in zip(("a loop", "a copy"), milliseconds[1:], strict=True):
            tell_pair(f"patterns: {name}", "ms", milliseconds[0], against, other)
        ours_s, loop_s, copy_s = map(statistics.median, times)
        figures = f"{ours_s * 1e3:9.3f} {loop_s * 1e3:9.3f} {copy_s * 1e3:9.3f}"
        write(f"{name:>14} {figures} {loop_s / ours_s:9.1f} {copy_s / ours_s:9.2f}")


def loop_build(pattern: Pattern, tokens_BKT: Tensor) -> Tensor:
    sequence_BKS = tokens_BKT.new_full((*tokens_BKT.shape[:2], pattern.steps), EMPTY)
    for codebook, steps in enumerate(pattern.step_KT().tolist()):
        for timestep, step in enumerate(steps):
            sequence_BKS[:, codebook, step] = tokens_BKT[:, codebook, timestep]
    return sequence_BKS


def loop_revert(pattern: Pattern, steps_BKSX: Tensor, shift: int) -> Tensor:
    shape = (*steps_BKSX.shape[:2], pattern.timesteps, *steps_BKSX.shape[3:])
    values_BKTX = steps_BKSX.new_empty(shape)
    for codebook, steps in enumerate(pattern.step_KT().tolist()):
        for timestep, step in enumerate(steps):
            values_BKTX[:, codebook, timestep] = steps_BKSX[:, codebook, step - shift]
    return values_BKTX


def write(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

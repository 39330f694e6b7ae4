"""How much the ranks differ: least, mean and greatest time and memory, and who has the greatest."""

import statistics
from collections.abc import Mapping, Sequence

from harness.distributed.rank_numbers import RankNumbers
from harness.health.stragglers import SHARE, Times
from harness.metrics.step_clock import NAMES, StepClock


class ByRank:
    """The times and the memory of all ranks, told to rank 0 in a vector of sums."""

    def __init__(self) -> None:
        self._numbers = RankNumbers()
        self._clock: StepClock | None = None
        self._memory: Mapping[str, int] = {}
        self._is_memory_new = False
        self.times: Sequence[Times] = ()
        """By rank, on rank 0 after a step that has ended a round: of what a rank does alone, as far
        as that is known. None of what a GPU has done in a phase with collectives is."""

    def tell(self, clock: StepClock, memory: Mapping[str, int]) -> Sequence[float]:
        """This rank's numbers of a step, to be summed: its clock, and the last sample of its
        memory."""
        self._clock = clock
        if memory is not self._memory:
            self._memory, self._is_memory_new = memory, True
        return self._numbers.tell([*clock.alone(), clock.seconds(), *memory.values()])

    def hear(self, sums: Sequence[float]) -> dict[str, float]:
        """The metrics of the step that was last told of; on rank 0, if it has ended a round.

        `slowest_rank`, `step_time_..._s`, `own_time_..._s`; of phases in which the ranks differ by
        a tenth of the step `own_data_time_..._s` and so on; and the memory if it was sampled.
        """
        self.times = ()
        if not (by_rank := self._numbers.hear(sums)):
            return {}
        assert self._clock is not None
        *of_phases, steps = list(zip(*by_rank, strict=True))[: len(Times._fields)]
        unseen = self._clock.waits_unseen()
        pairs = list(zip(NAMES, of_phases, strict=True))
        known = [[0.0] * len(steps) if phase in unseen else times for phase, times in pairs]
        self.times = [Times(*of_rank) for of_rank in zip(*known, steps, strict=True)]
        own = [of_rank.own for of_rank in self.times]
        found = {"slowest_rank": own.index(max(own))}
        found |= _spread("step_time", "s", steps) | _spread("own_time", "s", own)
        for phase, times in pairs:
            if max(times) - min(times) > SHARE * steps[0]:
                name = NAMES[phase] if phase in unseen else f"own_{NAMES[phase]}"
                found |= _spread(name, "s", times) | _greatest(name, times)
        return found | self._memory_metrics(by_rank)

    def _memory_metrics(self, by_rank: Sequence[Sequence[float]]) -> dict[str, float]:
        if not self._is_memory_new:
            return {}
        self._is_memory_new = False
        columns = list(zip(*by_rank, strict=True))[len(Times._fields) :]
        found: dict[str, float] = {}
        for name, sizes in zip(self._memory, columns, strict=True):
            name = name.removesuffix("_bytes")
            found |= _spread(name, "bytes", sizes) | _greatest(name, sizes)
        return found


def _spread(name: str, unit: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_min_{unit}": min(values),
        f"{name}_mean_{unit}": statistics.fmean(values),
        f"{name}_max_{unit}": max(values),
    }


def _greatest(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_max_rank": values.index(max(values))}

"""The micro-batches of each step, and how much each of them weighs in it."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from harness import distributed
from harness.data.batches import Batches
from harness.data.sampler import Place, Span
from harness.data.task_loader import TaskLoader
from harness.distributed.rng import seeded
from harness.errors import TaskError
from harness.health import phases

STEPS_REMEMBERED = 8
"""How many of the last steps are known where their data is."""


@dataclass
class Terms:
    """Of how many terms the losses of a step's micro-batches are means, by micro-batch."""

    own: list[float]
    """Of this rank's micro-batches."""
    totals: list[float] = field(default_factory=list)
    """Sums over all ranks; empty until they are known."""
    is_padding: list[bool] = field(default_factory=list)
    """Whether a micro-batch of this rank is there only to keep it in step with the others."""
    ranks: list[int] = field(default_factory=list)
    """How many ranks have a micro-batch that is no padding; empty until they are known."""

    def share(self, number: int, accumulation: int) -> float | None:
        """The factor of micro-batch `number`'s loss, so that the mean gradient over ranks and
        micro-batches, as DeepSpeed takes it, is that of the mean over all terms of the optimizer
        step, which has `accumulation` micro-batches. None if none of them has a term."""
        first = number // accumulation * accumulation
        total = sum(self.totals[first : first + accumulation])
        if not total:
            return None
        return self.own[number] * distributed.world_size() * accumulation / total

    def drop_unequal(self) -> None:
        """Micro-batches that some rank does not have count for nothing on the others, too."""
        for number, ranks in enumerate(self.ranks):
            if ranks < distributed.world_size():
                self.own[number] = self.totals[number] = 0.0
                self.is_padding[number], self.ranks[number] = True, 0


@dataclass
class _Fetched:
    """A step's micro-batches, fetched ahead."""

    micro_batches: list[Any]
    terms: Terms
    position: dict[str, Any]
    """Of the loader, before them."""
    epoch: int
    """After them, as is `passes`."""
    passes: dict[str, float]
    samples: list[Any]
    """Of each of them."""
    spans: list[Span]
    """Where they are in the data."""
    skipped: int
    """Samples that could not be read; once they are known, of all ranks."""
    error: TaskError | None
    """Why this rank has not got them."""
    failed: int = 0
    """How many ranks have not got theirs, once that is known."""

    def numbers(self) -> list[float]:
        """What is summed over the ranks."""
        read = [not is_padding for is_padding in self.terms.is_padding]
        return [*self.terms.own, *read, self.skipped, self.error is not None]

    def take(self, sums: Sequence[float]) -> None:
        """Takes the sums of `numbers`."""
        size = len(self.terms.own)
        self.terms.totals = list(sums[:size])
        self.terms.ranks = [int(ranks) for ranks in sums[size:-2]]
        self.skipped, self.failed = map(int, sums[-2:])


class StepBatches:
    """This rank's micro-batches, step by step; if weighed, a part of the step's vector.

    Weighed micro-batches are fetched one step ahead, and their weights are summed while the step
    before runs, so that the sums are there when the step begins. The random generators are seeded
    for every step that is fetched ahead, and restored: what is drawn while fetching depends on the
    step alone, and the saved position is that of the next step.
    """

    def __init__(
        self, batches: Batches, weigh: Callable[[Any], float] | None = None, seed: int = 0
    ):
        """`seed`: of this rank's fetching ahead."""
        self._batches = batches
        self._weigh = weigh
        self.is_weighed = weigh is not None or batches.skips is not None
        """Whether micro-batches count differently."""
        self._seed = seed
        self._fetched: deque[_Fetched] = deque()
        self._contributed: list[_Fetched] = []
        self._stops = False  # with the first rank that has no more micro-batches in an epoch
        self._epoch: int | None = None
        self._passes: dict[str, float] | None = None
        self.skipped = 0
        """Samples of all ranks that could not be read, up to the step in progress."""
        self._taken = 0  # micro-batches of the step in progress
        self._before: dict[str, Any] | None = None  # position before the step in progress
        self.samples: list[int] | None = None
        """The indices of the samples in the current micro-batch, if they are known."""
        self._start: Place = 0, 0  # of the step in progress
        self._fetched_spans: list[Span] = []  # of the step in progress, if weighed
        self._spans: deque[list[Span]] = deque(maxlen=STEPS_REMEMBERED)  # of the last steps

    @property
    def epoch(self) -> int:
        """Completed passes over the data."""
        return self._batches.epoch if self._epoch is None else self._epoch

    def end_epochs_together(self, uneven: Literal["pad", "stop"]) -> None:
        """Ranks may have more or fewer micro-batches in an epoch: `DataConfig.uneven`."""
        assert isinstance(self._batches, TaskLoader)
        self._batches.ends_together = self.is_weighed = True
        self._stops = uneven == "stop"

    def check_ranks(self) -> None:
        """Before the first step: `Batches.check_ranks`. Collective."""
        self._batches.check_ranks()

    def begin_epoch(self) -> bool:
        """Before a step: whether the epoch has ended on all ranks together. The next one then
        begins, and its steps must be fetched and exchanged."""
        if not (isinstance(self._batches, TaskLoader) and self._batches.ends_together):
            return False
        if any(self._fetched[0].terms.ranks) or self._fetched[0].failed:
            return False
        self._fetched.clear()
        self._batches.begin_epoch()
        return True

    def prefetch(self, step: int, size: int) -> None:
        """If weighed, fetches the next `size` micro-batches, those of step `step`.

        If that fails with a TaskError, as for a rank without any data, all ranks raise it where the
        step begins.
        """
        if not self.is_weighed:
            return
        position, start = deepcopy(self._batches.state_dict()), self._batches.place
        terms = Terms([])
        micro_batches, samples, skipped = [], [], 0
        error = self._fetched[-1].error if self._fetched else None
        try:
            with seeded(self._seed, step), phases.during("data"):
                while error is None and len(micro_batches) < size:
                    micro_batches.append(next(self._batches))
                    samples.append(self._batches.samples)
                    skips = self._batches.skips
                    skipped += 0 if skips is None else skips.count
                    self._add_terms(terms, micro_batches[-1])
        except TaskError as failure:
            error = failure
        if error is not None:
            terms = Terms([0.0] * size, is_padding=[True] * size)
        epoch, passes = self._batches.epoch, self._batches.passes()
        spans = self._batches.spans(start, self._batches.place)
        where = position, epoch, passes, samples, spans
        self._fetched.append(_Fetched(micro_batches, terms, *where, skipped, error))

    def _add_terms(self, terms: Terms, batch: Any) -> None:
        """Those of the last micro-batch."""
        share = self._batches.share
        weigh = self._weigh if share else None
        terms.own.append(share if weigh is None else checked_weight(weigh(batch)))
        terms.is_padding.append(share == 0)

    def next_step(self, size: int) -> tuple[Iterator[Any], Terms | None]:
        """The micro-batches of the next step, and their weights if they are weighed.

        They must then have been prefetched, and the vector exchanged since.
        """
        if not self.is_weighed:
            self._before, self._start = self._batches.quick_state_dict(), self._batches.place
            return self._read(size), None
        self._check_failed(self._fetched[0])
        self._before = self.state_dict()
        fetched = self._fetched.popleft()
        self._fetched_spans = fetched.spans
        self.skipped += fetched.skipped
        assert fetched.terms.totals, "the weights of this step have not been summed"
        self._epoch, self._passes = fetched.epoch, fetched.passes
        return self._give(fetched), fetched.terms

    def _check_failed(self, fetched: _Fetched) -> None:
        """Raises the TaskError of a rank that has not got its micro-batches, on all ranks."""
        if fetched.failed:
            with distributed.raise_on_all_ranks("train_data"):
                if fetched.error is not None:
                    raise fetched.error

    def _give(self, fetched: _Fetched) -> Iterator[Any]:
        for batch, self.samples in zip(fetched.micro_batches, fetched.samples, strict=True):
            yield batch

    def _read(self, size: int) -> Iterator[Any]:
        for _ in range(size):
            phases.enter("data")
            batch = next(self._batches)
            phases.enter("step")
            self._taken += 1
            self.samples = self._batches.samples
            yield batch

    def end_step(self) -> None:
        """Ends the step in progress: the position is that of the next one."""
        self._taken, self._before = 0, None
        if not self.is_weighed:
            self._spans.append(self._batches.spans(self._start, self._batches.place))
        else:
            self._spans.append(self._fetched_spans)

    def spans(self, ago: int) -> list[Span]:
        """Where the data of a recent step is; `ago`: 0 for the last one."""
        return self._spans[-1 - ago]

    def samples_in(
        self, spans: Sequence[Span], rank: int | None = None, number: int | None = None
    ) -> list[Any]:
        """The indices of the samples of all ranks in some spans, in order, or those of one rank's
        micro-batch `number`; empty if unknown."""
        return self._batches.samples_in(spans, rank, number)

    @property
    def dropped(self) -> list[Span]:
        """What `drop` has dropped."""
        return self._batches.dropped

    def drop(self, spans: Sequence[Span]) -> None:
        """Never returns what is in these spans, each in what the ones before have left. Called
        right after `load_state_dict` of a place before them."""
        self._batches.drop(spans)

    @property
    def can_rewind(self) -> bool:
        """Whether the position before the step in progress is known."""
        return self._before is not None or not self._taken

    def contribute(self) -> Sequence[float]:
        """This rank's weights and counts of the steps fetched since the last exchange."""
        self._contributed = [fetched for fetched in self._fetched if not fetched.terms.totals]
        return [number for fetched in self._contributed for number in fetched.numbers()]

    def receive(self, sums: Sequence[float]) -> None:
        """Takes the weights summed over all ranks."""
        start = 0
        for fetched in self._contributed:
            end = start + len(fetched.numbers())
            fetched.take(sums[start:end])
            start = end
            if self._stops:
                fetched.terms.drop_unequal()
        self._contributed = []

    def metrics(self) -> dict[str, float]:
        """How often each source of a mixture has been gone through, and how many samples could not
        be read, if that is no error."""
        passes = self._batches.passes() if self._passes is None else self._passes
        found = {f"epoch/{name}": times for name, times in passes.items()}
        return found if self._batches.skips is None else found | {"skipped_samples": self.skipped}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Other weights of a mixture's sources, from the next step on: what was fetched ahead is
        dropped, and must be fetched again."""
        spans = list(self._spans)
        self.load_state_dict(self.state_dict())
        self._spans.extend(spans)
        self._batches.set_weights(weights)

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The position of the next step, or of the one in progress."""
        if self._before is not None:
            return self._before
        position = self._fetched[0].position if self._fetched else self._batches.state_dict()
        return position if self._batches.skips is None else position | {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position; what was fetched ahead is dropped."""
        self._batches.load_state_dict(state)
        self._restart(state)

    def fit_state_dict(self, state: dict[str, Any]) -> str:
        """`Batches.fit_state_dict`; what was fetched ahead is dropped."""
        text = self._batches.fit_state_dict(state)
        self._restart(state)
        return text

    def _restart(self, state: dict[str, Any]) -> None:
        self.skipped = state.get("skipped", 0)
        self._fetched.clear()
        self._contributed = []
        self._epoch = self._passes = None
        self._taken, self._before = 0, None
        self._spans.clear()


def checked_weight(weight: Any) -> float:
    """What `Task.weigh` returned. Raises TaskError if it is not a finite number >= 0."""
    number = float(weight)
    if not 0 <= number < math.inf:
        raise TaskError(f"Task.weigh returned {number}, expected a finite number >= 0")
    return number

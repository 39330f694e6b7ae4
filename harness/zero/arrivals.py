"""Which gradients reach DeepSpeed in a backward, and in which order.

ZeRO 2 and 3, and ZeRO 1 with overlap_comm, pack gradients into buckets as backward produces them,
and add up the buckets of the ranks (stage_1_and_2.py, stage3.py below `runtime/zero/`). So if ranks
use different parameters in a micro-batch, the gradients of one parameter are added to those of
another, without an error. And where a parameter gets no gradient, ZeRO 3 and optimizer offload step
it with what their buffers contain from an earlier step.

Here a parameter without a gradient gets zeros at the end of every backward. What has arrived is
recorded, for a comparison between the ranks; or it is handed over in one fixed order.
"""

import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from harness.distributed import world_size
from harness.errors import TaskError, first_few
from harness.zero import fetches, reads
from harness.zero.buckets import NOTHING, Numbers, buckets_of
from harness.zero.notes import ByRank, Notes

END_OF_BACKWARD = array("q", [-(1 << 62)])
_ALREADY_REDUCED = re.compile(r"The parameter (\S+) has already been reduced")


class Record(NamedTuple):
    """What must be the same on every rank, as numbers of parameters and modules."""

    gradients: Sequence[Numbers] = ()
    """By bucket, in order: a parameter whose gradient was reduced as `number`, one that got zeros
    as `~number`; `END_OF_BACKWARD` after each backward. Empty at stage 0, where DeepSpeed fills in
    zeros and reduces in the order of the model."""
    modules: Numbers = NOTHING
    """See `fetches.called_modules`."""


class Arrivals:
    """The gradients of one DeepSpeed engine, between backward and the buckets."""

    def __init__(self, ds: Any, in_order: bool):
        """`in_order`: ranks may use different parameters, so gradients are handed over in a fixed
        order, and nothing is recorded."""
        self._ds = ds
        self._in_order = in_order
        self._buckets = buckets_of(ds.optimizer)
        self._queue: _Queue | None = None
        self._twice = _Twice()
        self._arrived: list[Numbers] = []
        """The parameters of this backward whose gradients were reduced, by bucket."""
        self._gradients: list[Numbers] = []
        self._hooks: list[RemovableHandle] = []
        self._modules: tuple[Sequence[nn.Module], Numbers] = (), NOTHING
        """The last order of modules that was recorded, and their numbers."""
        self._calls_modules = bool(fetches.names(ds))
        self._is_first = self._calls_modules and not in_order
        can_note = not in_order and world_size() > 1 and hasattr(os, "memfd_create")  # on Linux
        self._notes = Notes(ds, self._buckets) if can_note else None
        if in_order:
            fetches.allow_different_modules(ds)
        if self._buckets is None:
            return
        if self._buckets.by_arrival:
            self._buckets.before_reduction(self._note)
            if in_order:
                self._queue = _Queue(self._buckets.parameters, self._buckets.give)
                self._buckets.on_gradient(self._queue.arrive)
        allreduce = ds.allreduce_gradients

        def complete_and_allreduce(*args: Any, **kwargs: Any) -> None:
            self._complete()
            allreduce(*args, **kwargs)

        ds.allreduce_gradients = complete_and_allreduce

    def backward(self, loss: Tensor) -> None:
        """Back-propagates the loss of a micro-batch. Collective."""
        if self._buckets is not None:
            self._buckets.prepare(self._ds.is_gradient_accumulation_boundary())
            self._arrived.clear()
            if self._notes is not None:
                self._notes.begin_backward()
            if self._queue is not None and loss.requires_grad:
                self._queue.restart()
                loss.register_hook(self._queue.find_unused)
        with fetches.in_backward(self._ds):
            try:
                self._ds.backward(loss)
            except AssertionError as error:  # of stage 2
                if found := _ALREADY_REDUCED.match(str(error)):
                    is_named = found[1] != "unknown"
                    raise _arrived_twice(
                        f"parameter {found[1]}" if is_named else "a parameter"
                    ) from error
                raise
        if self._arrived and not self._in_order:
            self._gradients += self._arrived
            self._gradients.append(END_OF_BACKWARD)

    def before_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        """Calls `call` with every parameter that a backward gives a gradient, before it is reduced.

        In DeepSpeed's own hooks where it has some: another hook of a parameter takes 3 us.
        """
        if self._buckets is not None:
            self._buckets.before_gradient(call)
            return
        for parameter in self._ds.module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_hook(lambda gradient, of=parameter: call(of))
                self._hooks.append(hook)

    def detach(self) -> None:
        """Takes its own hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def gathered(self) -> AbstractContextManager[None]:
        """To be open while the model is called: ranks may then call different modules of it."""
        return fetches.gathered(self._ds) if self._in_order else nullcontext()

    def reads_refused(self, engine: str) -> AbstractContextManager[None]:
        """To be open in the forward of a micro-batch: in the first one, raises TaskError for what
        reads weights where they are empty."""
        is_first, self._is_first = self._is_first, False
        return reads.refused(engine, self._ds.module) if is_first else nullcontext()

    def take(self) -> Record:
        """The record since the last call; its parts are the same objects if they are the same."""
        gradients, self._gradients = self._gradients, []
        if self._calls_modules:
            modules = fetches.called_modules(self._ds)
            if modules is not self._modules[0] or isinstance(modules, list):  # lists grow
                self._modules = modules, array("q", fetches.numbers(modules))
        return Record(gradients, self._modules[1])

    def describe_difference(self, records: Sequence[Record]) -> str:
        """How records of the same step differ between the ranks, with names; empty if they do not.

        `records`: by rank.
        """
        parameters = self._parameter_names()
        backwards = [_backwards(record.gradients) for record in records]
        for count, per_rank in enumerate(zip_longest(*backwards, fillvalue=[]), 1):
            if text := _difference(per_rank, parameters):
                return f"in micro-batch {count}, {text}"
        return _other_calls(dict(enumerate(r.modules for r in records)), fetches.names(self._ds))

    def describe_failure(self) -> str:
        """How the ranks differ in a micro-batch in which a collective has failed; empty if they do
        not, as far as is known. Blocks for the ranks of other nodes."""
        if self._notes is None:
            return ""
        text = _other_calls(self._notes.modules(), fetches.names(self._ds))
        return text or _other_gradients(self._notes.gradients(), self._parameter_names())

    def _parameter_names(self) -> dict[int, str]:
        parameters = self._buckets.parameters if self._buckets is not None else {}
        paths = {id(p): path for path, p in self._ds.module.named_parameters()}
        return {number: paths[id(p)] for number, p in parameters.items()}

    def _note(self, numbers: Numbers) -> None:
        """Gradients are about to be reduced, which may end this process if the ranks differ."""
        if twice := self._twice.find(self._arrived, numbers):
            names = self._parameter_names()
            raise _arrived_twice(f"parameter {first_few(names[number] for number in twice)}")
        self._arrived.append(numbers)
        if self._notes is not None:
            self._notes.add_gradients(numbers)

    def _complete(self) -> None:
        """Gives zeros to the parameters without a gradient, before the last reduction."""
        assert self._buckets is not None
        if not self._buckets.reduces(self._ds.is_gradient_accumulation_boundary()):
            return
        if self._queue is not None:
            self._queue.finish()
            return
        missing = self._buckets.missing(self._arrived)
        for number in missing:
            self._buckets.give(number)
        if missing and not self._in_order:
            self._gradients.append(array("q", [~number for number in missing]))


class _Twice:
    """Finds the parameters that arrive a second time in a backward."""

    def __init__(self) -> None:
        self._known: list[Numbers] = []
        """The buckets of the last backward, which had none: the same object is not searched."""
        self._seen: set[int] = set()
        self._count = 0
        """Of the buckets in `_seen`."""

    def find(self, arrived: Sequence[Numbers], numbers: Numbers) -> list[int]:
        """Those of `numbers` that occur twice in it, or in the buckets before it."""
        place = len(arrived)
        if place < len(self._known) and self._known[place] is numbers:
            return []
        del self._known[place:]
        if place < self._count or not place:
            self._seen, self._count = set(), 0
        self._seen.update(chain.from_iterable(arrived[self._count :]))
        twice = []
        for number in numbers:
            if number in self._seen:
                twice.append(number)
            self._seen.add(number)
        self._known.append(numbers)
        self._count = place + 1
        return twice


class _Queue:
    """Holds gradients back until it is their turn: from the last parameter to the first, about as
    backward produces them."""

    def __init__(self, parameters: dict[int, nn.Parameter], give: Callable[[int], None]):
        self._order = list(reversed(parameters))
        self._numbers = {id(p): number for number, p in parameters.items()}
        self._parameters = parameters
        self._give = give
        self._ready: set[int] = set()
        self._next = 0

    def restart(self) -> None:
        """Begins a backward."""
        self._ready.clear()
        self._next = 0

    def find_unused(self, gradient: Tensor) -> None:
        """Marks the parameters that the backward in progress will not reach."""
        will_run = torch._C._will_engine_execute_node  # as in DeepSpeed's runtime/utils.py
        for number, parameter in self._parameters.items():
            if not will_run(get_gradient_edge(parameter).node):
                self._ready.add(number)

    def arrive(self, parameter: nn.Parameter) -> None:
        """A gradient is complete: hands over all whose turn it is."""
        number = self._numbers[id(parameter)]
        if number in self._ready:
            raise TaskError(
                "a gradient has reached a parameter that the loss does not lead to: with "
                'unused_parameters = "zeros", activation checkpointing needs use_reentrant=False, '
                "and a custom autograd function must not call backward"
            )
        self._ready.add(number)
        while self._next < len(self._order) and self._order[self._next] in self._ready:
            self._give(self._order[self._next])
            self._next += 1

    def finish(self) -> None:
        """Hands over the rest."""
        for number in self._order[self._next :]:
            self._give(number)
        self.restart()


def _arrived_twice(what: str) -> TaskError:
    return TaskError(
        f"{what} got its gradient twice in one backward, as reentrant "
        "activation checkpointing of a module that is called several times does: ZeRO 2 and 3 "
        "reduce each part when it arrives, and would keep one of them. Use use_reentrant=False (in "
        'transformers: model.gradient_checkpointing_enable({"use_reentrant": False})), or ZeRO 1 '
        "without overlap_comm"
    )


def _backwards(gradients: Sequence[Numbers]) -> list[list[int]]:
    """A record's gradients by micro-batch."""
    found: list[list[int]] = [[]]
    for number in chain.from_iterable(gradients):
        if number == END_OF_BACKWARD[0]:
            found.append([])
        else:
            found[-1].append(number)
    return found


def _difference(per_rank: Sequence[Sequence[int]], names: Mapping[int, str]) -> str:
    unused = [{~number for number in gradients if number < 0} for gradients in per_rank]
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for number in sorted(set().union(*unused)):
        ranks = tuple(rank for rank, without in enumerate(unused) if number not in without)
        if ranks:
            by_ranks.setdefault(ranks, []).append(names[number])
    if by_ranks:
        return "only some ranks had gradients for: " + "; ".join(
            f"{first_few(paths)} (rank {first_few(ranks)})" for ranks, paths in by_ranks.items()
        )
    return _other_gradients(dict(enumerate(per_rank)), names)


def _other_gradients(per_rank: ByRank, names: Mapping[int, str]) -> str:
    what = _first_difference(per_rank, names)
    return what and f"the ranks had the gradients in different orders: gradient {what}"


def _other_calls(per_rank: ByRank, names: Mapping[int, str]) -> str:
    what = _first_difference(per_rank, names)
    return what and f"the ranks called the modules in different orders: call {what}"


def _first_difference(per_rank: ByRank, names: Mapping[int, str]) -> str:
    for count, numbers in enumerate(zip_longest(*per_rank.values()), 1):
        if len(set(numbers)) > 1:
            found = zip(per_rank, (names.get(number, "none") for number in numbers), strict=True)
            return f"{count} is " + first_few(f"{name} on rank {rank}" for rank, name in found)
    return ""

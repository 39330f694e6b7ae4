"""The buckets in which DeepSpeed's ZeRO optimizers collect gradients, at stages 1 to 3.

The attributes are those of zero/stage_1_and_2.py and zero/stage3.py below `runtime/`. Methods of
the optimizer are replaced on the object, for this optimizer alone.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, eq, is_, itemgetter
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

Numbers: TypeAlias = "array[int]"  # of 64 bits
NOTHING: Numbers = array("q")


class Buckets(Protocol):
    """What both optimizers have in common."""

    parameters: dict[int, nn.Parameter]
    """All parameters that get gradients, by a number that is the same on every rank."""
    by_arrival: bool
    """Whether gradients are packed as backward produces them, and not in the optimizer's order."""

    def prepare(self, is_boundary: bool) -> None:
        """Before a backward. `is_boundary`: it is the last one of an optimizer step."""
        ...

    def pending(self, dtype: torch.dtype | None = None) -> Numbers:
        """The parameters in the buckets, or in that of one dtype, in an order that matters: the
        same object as in the step before if they are the same, which is found out faster."""
        ...

    def reduces(self, is_boundary: bool) -> bool:
        """Whether gradients are reduced in this backward; asked once, at its end."""
        ...

    def missing(self, arrived: Sequence[Numbers]) -> list[int]:
        """The parameters that have no gradient to reduce. `arrived`: those that have left the
        buckets, by bucket."""
        ...

    def give(self, number: int) -> None:
        """Hands a parameter's gradient over, or zeros if it has none."""
        ...

    def on_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        """Calls `call` when backward has produced a gradient, which is then not handed over."""
        ...

    def before_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        """Calls `call` when backward has produced a gradient, before it is handed over."""
        ...

    def before_reduction(self, call: Callable[[Numbers], None]) -> None:
        """Calls `call` with the pending parameters each time before their gradients are reduced."""
        ...


def buckets_of(optimizer: Any) -> Buckets | None:
    """The buckets of `ds.optimizer`; None at stage 0 and wherever else DeepSpeed fills in zeros and
    reduces in the order of the model (bf16_optimizer.py)."""
    if hasattr(optimizer, "fp16_partitioned_groups"):
        return _Stage3(optimizer)
    return _Stage1And2(optimizer) if hasattr(optimizer, "ipg_buckets") else None


class _Stage1And2:
    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._receive = optimizer.process_gradients
        self._orders = _Orders(eq)
        trained = [
            (group, parameter)
            for group, parameters in enumerate(optimizer.bit16_groups)
            for parameter in parameters
            if parameter.requires_grad
        ]
        numbers = {
            optimizer.get_param_id(parameter): (group, parameter)
            for group, parameter in trained
            if parameter.numel()
        }
        self.parameters = {number: parameter for number, (_, parameter) in numbers.items()}
        self._groups = {number: group for number, (group, _) in numbers.items()}
        self.by_arrival = optimizer.partition_gradients or optimizer.overlap_comm
        self._hooks = len(trained)
        self._all_ran = False
        """Whether every parameter has had a gradient since the last reduction."""

    def prepare(self, is_boundary: bool) -> None:
        _prepare(self._optimizer, is_boundary)

    def pending(self, dtype: torch.dtype | None = None) -> Numbers:
        found: list[int] = []
        for bucket in _chosen(self._optimizer, dtype):
            found += map(itemgetter(2), bucket.params)
        return self._orders.numbers(found, iter)

    def reduces(self, is_boundary: bool) -> bool:
        self._all_ran |= self._optimizer._hooks_fired_this_backward == self._hooks
        return is_boundary or self._optimizer.partition_gradients

    def missing(self, arrived: Sequence[Numbers]) -> list[int]:
        if self.by_arrival:
            return _not_arrived(self, arrived, self._optimizer)
        all_ran, self._all_ran = self._all_ran, False
        if all_ran:  # it takes a while to look at every parameter
            return []
        gradient = self._optimizer.get_gradient_for_reduction
        return [number for number, p in self.parameters.items() if gradient(p) is None]

    def give(self, number: int) -> None:
        parameter = self.parameters[number]
        if self._optimizer.get_gradient_for_reduction(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
        self._receive(parameter, self._groups[number])

    def on_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        self._optimizer.process_gradients = lambda parameter, group: call(parameter)

    def before_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        receive = self._optimizer.process_gradients

        def call_and_receive(parameter: nn.Parameter, group: int) -> None:
            call(parameter)
            receive(parameter, group)

        self._optimizer.process_gradients = call_and_receive

    def before_reduction(self, call: Callable[[Numbers], None]) -> None:
        reduce = self._optimizer.reduce_ipg_grads

        def note_and_reduce(comm_dtype: torch.dtype | None = None) -> None:
            call(self.pending(comm_dtype))
            reduce(comm_dtype)

        self._optimizer.reduce_ipg_grads = note_and_reduce


class _Stage3:
    by_arrival = True

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._receive = optimizer.reduce_ready_partitions_and_remove_grads
        self._orders = _Orders(_are_identical)
        self.parameters = {
            parameter.ds_id: parameter
            for parameters in optimizer.fp16_groups
            for parameter in parameters
            if parameter.requires_grad and parameter.ds_numel
        }

    def prepare(self, is_boundary: bool) -> None:
        _prepare(self._optimizer, is_boundary)

    def pending(self, dtype: torch.dtype | None = None) -> Numbers:
        found: list[nn.Parameter] = []
        for bucket in _chosen(self._optimizer, dtype):
            found += bucket.params
        return self._orders.numbers(found, self._order)

    def _order(self, parameters: Iterable[nn.Parameter]) -> Iterable[int]:
        numbers = map(attrgetter("ds_id"), parameters)
        return sorted(numbers) if self._optimizer.reduce_scatter else numbers

    def reduces(self, is_boundary: bool) -> bool:
        return True

    def missing(self, arrived: Sequence[Numbers]) -> list[int]:
        return _not_arrived(self, arrived, self._optimizer)

    def give(self, number: int) -> None:
        parameter: Any = self.parameters[number]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # empty while the parameter is sharded
            parameter.grad.data = parameter.grad.new_zeros(parameter.ds_shape)
        self._receive(parameter)

    def on_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        self._optimizer.reduce_ready_partitions_and_remove_grads = call

    def before_gradient(self, call: Callable[[nn.Parameter], None]) -> None:
        receive = self._optimizer.reduce_ready_partitions_and_remove_grads

        def call_and_receive(parameter: nn.Parameter) -> None:
            call(parameter)
            receive(parameter)

        self._optimizer.reduce_ready_partitions_and_remove_grads = call_and_receive

    def before_reduction(self, call: Callable[[Numbers], None]) -> None:
        name = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
        reduce = getattr(self._optimizer, name)

        def note_and_reduce(dtype: torch.dtype) -> None:
            call(self.pending(dtype))
            reduce(dtype)

        setattr(self._optimizer, name, note_and_reduce)


def _prepare(optimizer: Any, is_boundary: bool) -> None:
    """What DeepSpeed does in its engine's forward, which a feeder need not call: it may call the
    module. Without it, ZeRO 3 would replace the gradients of earlier micro-batches."""
    optimizer.set_gradient_accumulation_boundary(is_boundary)
    if optimizer._epilogue_ran_this_backward:
        optimizer.clear_backward_seen_flag()
    optimizer._hooks_fired_this_backward = 0


def _chosen(optimizer: Any, dtype: torch.dtype | None) -> list[Any]:
    buckets = optimizer.ipg_buckets
    return list(buckets.values()) if dtype is None else [buckets[dtype]]


def _not_arrived(buckets: Buckets, arrived: Sequence[Numbers], optimizer: Any) -> list[int]:
    count = sum(map(len, arrived))
    for bucket in optimizer.ipg_buckets.values():
        count += len(bucket.params)
    if count == len(buckets.parameters):  # in a backward each arrives once
        return []
    found = {*buckets.pending()}.union(*arrived)
    return [number for number in buckets.parameters if number not in found]


class _Orders:
    """The numbers of what is in a bucket, which are made anew only if there is something else."""

    def __init__(self, is_same: Callable[[list[Any], list[Any]], bool]) -> None:
        self._is_same = is_same
        self._known: dict[int, tuple[list[Any], Numbers]] = {}
        """By the first object in the bucket."""

    def numbers(self, found: list[Any], number: Callable[[list[Any]], Iterable[int]]) -> Numbers:
        """`number(found)`."""
        if not found:
            return NOTHING
        known, numbers = self._known.get(id(found[0]), ([], NOTHING))
        if len(known) != len(found) or not self._is_same(known, found):
            numbers = array("q", number(found))
            self._known[id(found[0])] = found, numbers
        return numbers


def _are_identical(some: list[Any], others: list[Any]) -> bool:
    """Whether equally long lists are of the same objects; a tensor's `==` is of its elements."""
    return all(map(is_, some, others))

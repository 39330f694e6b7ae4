"""Which modules' weights ZeRO 3 gathers, and how ranks may use different ones.

A rank gathers the shards of a module's weights when it calls the module, and expects all ranks to
do the same at that moment (zero/partitioned_param_coordinator.py): if they call different modules,
they get each other's shards, or wait for each other.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import nn

from harness.distributed.shared_numbers import SharedNumbers

HOLDERS = "ds_active_sub_modules"
"""The attribute of a sharded parameter with the modules that use it, and need it complete."""
ALL_RANKS = -1
"""Among the modules that use a weight: no module, but all ranks at once."""

_SHAPE_ERROR = re.compile(r"invalid gradient|must be a matrix|[Mm]ismatch|\(0\)|\[0\]|0x0|range")


def called_modules(ds: Any) -> Sequence[nn.Module]:
    """The modules of the last micro-batch, forward and backward, in order: the same object while
    nothing changes. Empty below stage 3, and after a micro-batch that was unlike the one before."""
    coordinator = _coordinator(ds)
    if coordinator is None:
        return ()
    return coordinator._PartitionedParameterCoordinator__submodule_order


def numbers(modules: Iterable[nn.Module]) -> list[int]:
    """DeepSpeed's numbers of modules, the same on every rank."""
    return [cast(int, module.ds_id) for module in modules]


def names(ds: Any) -> dict[int, str]:
    """The names of the modules that are fetched, by number; empty below stage 3."""
    if _coordinator(ds) is None:
        return {}
    modules: Iterable[tuple[str, Any]] = ds.module.named_modules()
    return {m.ds_id: path or "model" for path, m in modules if hasattr(m, "ds_id")}  # no leaf's


def note_calls(ds: Any, notes: SharedNumbers) -> None:
    """Notes down modules before they are fetched, as long as DeepSpeed has no complete order of
    them: after that the notes stay true. At stage 3."""
    coordinator = _coordinator(ds)
    fetch, invalidate, reset = (
        getattr(coordinator, name)
        for name in ("fetch_sub_module", "_invalidate_trace", "reset_step")
    )

    def note_and_fetch(module: Any, forward: bool) -> None:
        notes.add([module.ds_id])
        fetch(module, forward=forward)

    def keep_begin_and_invalidate() -> None:
        """A module is called that is not the next one in order."""
        count = coordinator._PartitionedParameterCoordinator__step_id
        notes.clear()
        notes.add(numbers(called_modules(ds)[:count]))
        coordinator.fetch_sub_module = note_and_fetch
        invalidate()

    def begin_and_reset() -> None:
        notes.next_round()
        reset()
        if coordinator.is_complete_trace():
            coordinator.fetch_sub_module = fetch
        else:
            notes.clear()
            coordinator.fetch_sub_module = note_and_fetch

    coordinator._invalidate_trace = keep_begin_and_invalidate
    coordinator.reset_step = begin_and_reset


def allow_different_modules(ds: Any) -> None:
    """Makes DeepSpeed record no order of modules, which it would compare between the ranks.

    For a model that is `gathered` in every micro-batch; there is then nothing to prefetch.
    """
    coordinator = _coordinator(ds)
    if coordinator is not None:
        coordinator.reset_step = coordinator._clean_inflight_param_registry


@contextmanager
def gathered(ds: Any) -> Iterator[None]:
    """In the block the whole model is gathered, and no module releases its weights. Collective."""
    coordinator = _coordinator(ds)
    if coordinator is None:
        yield
        return
    coordinator._clean_inflight_param_registry()
    sharded = [p for p in ds.module.parameters() if p.ds_status.name == "NOT_AVAILABLE"]
    if sharded:
        sharded[0].all_gather(sharded)
    everything = list(ds.module.parameters())
    for parameter in everything:
        parameter.ds_active_sub_modules.add(ALL_RANKS)
    try:
        yield
    except BaseException:  # in a module, which still has its weights
        for parameter in everything:
            parameter.ds_active_sub_modules.clear()
        raise
    finally:
        for parameter in everything:
            parameter.ds_active_sub_modules.discard(ALL_RANKS)
        if sharded:
            sharded[0].partition(sharded)


def is_missing(parameter: Any) -> bool:
    """Whether it has elements, but not on this rank at this moment."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE" and parameter.ds_numel > 0


def is_held(parameter: Any) -> bool:
    """Whether it is `gathered` on all ranks."""
    return ALL_RANKS in getattr(parameter, HOLDERS, ())


@contextmanager
def as_sharded(ds: Any) -> Iterator[None]:
    """In the block the model is sharded again, if it was `gathered`. Collective."""
    held = list(filter(is_held, ds.module.parameters()))
    for parameter in held:
        parameter.ds_active_sub_modules.discard(ALL_RANKS)
    complete = [p for p in held if not p.ds_persist]
    if complete:
        complete[0].partition(complete)
    try:
        yield
    finally:
        if complete:
            complete[0].all_gather(complete)
        for parameter in held:
            parameter.ds_active_sub_modules.add(ALL_RANKS)


@contextmanager
def releasing(ds: Any) -> Iterator[None]:
    """After the block, in which a loss may go through the model, no module of it holds its weights.

    DeepSpeed counts a module's inputs anew in each forward, so one that was called several times is
    not released after its backward. It looks for such modules after an engine's own backward, and
    not after another engine's that goes through the model.
    """
    try:
        yield
    finally:
        offload = getattr(ds.optimizer, "parameter_offload", ds.optimizer)  # itself, of a teacher
        if hasattr(offload, "get_param_coordinator"):
            offload.get_param_coordinator().release_backward_leftovers()


def explain(error: Exception, engine: str, ds: Any) -> None:
    """Adds to an error of torch's at stage 3 that comes from weights which are not gathered."""
    if _coordinator(ds) is not None and _SHAPE_ERROR.search(str(error)):
        error.add_note(
            f"engine {engine!r}: at ZeRO 3 a weight is empty outside of the module that has it. A "
            "loss that reads weights elsewhere, like a penalty on all of them, needs "
            f'engines.{engine}.unused_parameters = "zeros", which gathers the model for each '
            "micro-batch, or ZeRO 2"
        )


class Backward:
    """Whether the backward of a loss is running, of any engine."""

    is_running = False


@contextmanager
def in_backward(ds: Any) -> Iterator[None]:
    """To be open in the backward of a loss. Collective.

    If a gradient was computed in the forward before it, as for a penalty, this backward may go
    through that one, which needs weights outside of the modules that fetch them: so the whole model
    is gathered.
    """
    coordinator = _coordinator(ds)
    is_differentiated = getattr(coordinator, "is_differentiated", False)
    Backward.is_running = True
    try:
        with gathered(ds) if is_differentiated else nullcontext():
            yield
    finally:
        Backward.is_running = False
        if coordinator is not None:
            coordinator.is_differentiated = False


def _coordinator(ds: Any) -> Any:
    offload = getattr(ds.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()

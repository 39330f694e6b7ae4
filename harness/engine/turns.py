"""Turns of several engines, and how one of them uses the model of another.

A loss may go through the model of another engine, as a generator's goes through the discriminator.
DeepSpeed does not support that: depending on stage and order, it silently pollutes the other
engine's gradients, or fails with unhelpful errors (DeepSpeed #399, #4923). The bare module with
frozen parameters is correct at every stage; everything else raises an error here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from harness.errors import TaskError

BeforeGradient = Callable[[Callable[[nn.Parameter], None]], None]


class Peers(Protocol):
    """The engines of the run, as a feeder sees them: `engine.engines.Engines`."""

    def lend(self, name: str) -> AbstractContextManager[nn.Module]:
        """Another engine's bare model, frozen, for a loss that goes through it."""
        ...

    def __getitem__(self, name: str, /) -> Any: ...


class Turn:
    """Which engine has its turn: from its forward to the end of its backward."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._is_edit_allowed = False
        self._loans = ExitStack()

    @contextmanager
    def of(self, name: str, begins_step: bool = False) -> Iterator[None]:
        """The turn of an engine. Lent models stay frozen until it ends, since a backward may run
        parts of a forward again (activation checkpointing).

        `begins_step`: no gradient has been accumulated yet, so weights may be edited.
        """
        with ExitStack() as loans:
            self.name, self._loans = name, loans
            self._is_edit_allowed = begins_step
            try:
                yield
            finally:
                self.name = None

    @contextmanager
    def lend(
        self, name: str, module: nn.Module, loan: AbstractContextManager[None] | None = None
    ) -> Iterator[nn.Module]:
        """`module` of engine `name`, frozen, and `loan` entered for as long. Outside of any turn,
        for the `with` block only.

        Raises TaskError for the engine whose turn it is: it would get no gradients.
        """
        if name == self.name:
            raise TaskError(
                f"engine {name!r} cannot be lent in its own turn: it would get no gradients: call "
                "engine(...) instead"
            )
        with ExitStack() as block:
            loans = block if self.name is None else self._loans
            loans.enter_context(loan or nullcontext())
            loans.enter_context(frozen(module))
            yield module

    def check(self, name: str, verb: str) -> None:
        """Raises TaskError if engine `name` is used in another's turn. `verb`: like "called"."""
        if self.name not in (None, name):
            raise TaskError(
                f"engine {name!r} was {verb} in the turn of engine {self.name!r}: that would mix "
                f"up their gradients. {_remedy(name)}"
            )
        self._is_edit_allowed = False

    def check_edit(self, name: str) -> None:
        """Raises TaskError if the weights of engine `name` must not be edited now."""
        if self.name is None or (self.name == name and self._is_edit_allowed):
            return
        raise TaskError(
            f"the weights of engine {name!r} were edited in the turn of engine {self.name!r}, "
            "during a step or an evaluation: edit them in a command of the task (`event COMMAND "
            f"every 1`), or in the turn of {name!r}, at the first micro-batch of a step, before "
            "engine(...) is called"
        )

    def guard(self, name: str, module: nn.Module, before_gradient: BeforeGradient) -> None:
        """Raises TaskError when a gradient reaches a parameter of `module`, of engine `name`, in
        another engine's turn, before it is reduced. `before_gradient`: of its `Arrivals`."""

        def refuse(parameter: nn.Parameter) -> None:
            if self.name is None or self.name == name:
                return
            path = next(path for path, p in module.named_parameters() if p is parameter)
            raise TaskError(
                f"the loss of engine {self.name!r} would give a gradient to {path!r} of engine "
                f"{name!r}, whose turn it is not. {_remedy(name)}"
            )

        before_gradient(refuse)


def _remedy(name: str) -> str:
    return (
        "To use another engine's model in a loss: `with engine.peers.lend"
        f"({name!r}) as model: ... model(...)`"
    )


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """`module` with no parameter that needs gradients.

    `requires_grad` and the training mode of every submodule are restored in any case.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for submodule, is_training in modes:
            submodule.training = is_training


@contextmanager
def zero_gradients(module: nn.Module) -> Iterator[None]:
    """Within the context, every gradient that reaches a parameter is replaced by zeros."""
    hooks = [p.register_hook(torch.zeros_like) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

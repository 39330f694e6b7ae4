"""What an entry of the zoo is, the layouts that it trains in, and the registry of all entries."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, TypeVar

from torch import Generator, Tensor, nn

from harness.utils import to_device

Build = Callable[[], nn.Module | dict[str, nn.Module]]
Batch = Callable[[Generator, int], Any]
"""`(generator, number)`: a micro-batch. `number` counts them from 0, the same on all ranks."""
Feeder = Callable[[Any, Any], tuple[Tensor, dict[str, Any]]]

STEPS = 4
SEED = 0
STAGES = (0, 1, 2, 3)


class Layout(NamedTuple):
    """How one run is laid out. `precision`: "fp32", "bf16", or "autocast" (DeepSpeed's
    `torch_autocast` with fp32 weights)."""

    stage: int
    precision: str
    ranks: int
    accumulation: int

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"ZeRO {self.stage}, {self.precision}, {ranks}, accumulation {self.accumulation}"


LAYOUTS = [Layout(*each) for each in product(STAGES, ("fp32", "bf16"), (1, 2), (1, 2))]
AUTOCAST_LAYOUTS = [Layout(*each) for each in product(STAGES, ("autocast",), (1, 2), (1, 2))]


def call(engine: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """A feeder for models whose forward returns the loss, or something with the loss in `loss`."""
    batch = to_device(batch, engine.device, engine.dtype)
    output = engine(**batch) if isinstance(batch, Mapping) else engine(*batch)
    return output if isinstance(output, Tensor) else output.loss, {}


ADAMW = {"name": "torch.optim:AdamW", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
"""With an eps above the rounding errors: some gradients are zero but for rounding, like that of the
bias of an attention's keys, and Adam would turn that into full steps."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model or several, their data and their loss, and how closely a run must follow."""

    name: str
    build: Build
    """The models: one for the engine "net", or a dict by engine."""
    batch: Batch
    feeder: Feeder = call
    optimizer: Mapping[str, Any] = field(default_factory=lambda: ADAMW)
    """The optimizer of all trained engines; its name is an import path."""
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further settings of an engine, as in its table of the config."""
    clip: float = 1.0
    """Gradient clipping; 0: none."""
    weigh: Callable[[Any], float] | None = None
    """`Task.weigh`."""
    fp32: float = 2e-5
    """Tolerance in fp32: see `compare.Difference`."""
    bf16: float = 5e-2
    """Tolerance in bf16, also under autocast, where gradients are averaged in 16 bits."""
    autocast: bool = False
    """Whether it is also trained under `torch_autocast`."""

    def models(self) -> dict[str, nn.Module]:
        """The models by engine."""
        built = self.build()
        return built if isinstance(built, dict) else {"net": built}

    def tolerance(self, precision: str) -> float:
        """The tolerance in that precision."""
        return self.fp32 if precision == "fp32" else self.bf16

    def layouts(self) -> list[Layout]:
        """All layouts that it trains in."""
        return LAYOUTS + AUTOCAST_LAYOUTS * self.autocast


ZOO: dict[str, Entry] = {}
"""All entries by name; `tests.zoo.models` fills it."""


B = TypeVar("B", bound=Build)


def entry(batch: Batch, **settings: Any) -> Callable[[B], B]:
    """Registers a class of models, or a function that returns them, under its name."""

    def register(build: B) -> B:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", build.__name__).replace("_", " ").lower()
        assert name not in ZOO, name
        ZOO[name] = Entry(name=name, build=build, batch=batch, **settings)
        return build

    return register

"""Bytes of memory per rank, by part, and of a checkpoint: DeepSpeed's layouts, from shapes.

Each number is that of the rank with the most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from harness.config.engine_sections import OptimizerConfig
from harness.optim.apollo import memory as apollo
from harness.optim.build import build_optimizer
from harness.optim.matrices import memory as matrices
from harness.sizing.activations import Activations
from harness.sizing.setting import Setting
from harness.zero.partition import partition_size, shards_numel

EXACT_RANKS = 8
"""Up to so many ranks the state of APOLLO, Muon and SOAP is computed rank by rank; above, it is
estimated as the state on this many ranks, divided."""
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements: allocated whatever the model's size."""
LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters, in elements."""
PARTITIONED = {1: 1, 2: 1}
"""ZeRO stages 1 and 2 have one layout."""
ON_HOST = {
    "none": (),
    "optimizer": ("masters", "optimizer"),
    "all": ("weights", "masters", "optimizer"),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parts: Mapping[str, int]
    """weights, gradients, masters, optimizer, activations, buckets, gathered, and the fp32
    gradients of the step."""
    on_host: tuple[str, ...]
    """The parts in host memory."""

    @property
    def device(self) -> int:
        """At the peak: backward and the step do not need their own parts at the same time."""
        here = {name: size for name, size in self.parts.items() if name not in self.on_host}
        step = here.pop("step", 0)
        backward = here.pop("activations", 0) + here.pop("gathered", 0)
        return sum(here.values()) + max(step, backward)

    @property
    def host(self) -> int:
        """In host memory."""
        return sum(self.parts[name] for name in self.on_host)


def elements_per_rank(sizes: Sequence[Mapping[str, int]], stage: int, world: int) -> int:
    """Elements that a rank steps, padding included. `sizes`: parameters by name, per group."""
    if stage == 0:
        return sum(sum(group.values()) for group in sizes)
    if stage == 3:
        return sum(shards_numel(sizes=group, world=world) for group in sizes)
    return sum(partition_size(numel=sum(group.values()), world=world) for group in sizes)


def model_parts(sizes: Sequence[Mapping[str, int]], setting: Setting) -> dict[str, int]:
    """Bytes of weights, gradients and masters."""
    total = elements_per_rank(sizes, 0, 1)
    own = elements_per_rank(sizes, setting.stage, setting.ranks)
    return {
        "weights": setting.itemsize * (own if setting.stage == 3 else total),
        "gradients": setting.itemsize * (own if setting.stage >= 2 else total),
        "masters": 4 * own if setting.has_masters else 0,
    }


def fixed_bytes(model: nn.Module, setting: Setting) -> int:
    """Bytes of what is not trained: frozen parameters, which stage 3 divides, too, and buffers."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if not p.requires_grad}
    own = sum(sizes.values())
    if setting.stage == 3:
        own = shards_numel(sizes=sizes, world=setting.ranks)
    return setting.itemsize * own + sum(b.numel() * b.element_size() for b in model.buffers())


def adamw_bytes(sizes: Sequence[Mapping[str, int]], setting: Setting) -> int:
    """Bytes of AdamW's two moments, fp32."""
    return 2 * 4 * elements_per_rank(sizes, setting.stage, setting.ranks)


def _largest_matrix(groups: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of SOAP's state for the largest matrix, all of which its owner has."""
    shapes = {}  # one parameter of each shape
    for group in (group for group in groups if not group["dense"]):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            shapes[parameter.shape] = {**group, "params": [parameter], "param_names": [name]}
    return max((matrices.state_bytes([one], 0, 1)[0] for one in shapes.values()), default=0)


class Footprint:
    """The memory of a model under any setting; what settings have in common is computed once."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig | None = None, keeps_ema: bool = False
    ):
        """`config`: of a run's optimizer, whose options and groups are used for that optimizer.
        `keeps_ema`: in the optimizer's state. The model may be on the meta device."""
        self._model, self._config, self._keeps_ema = model, config, keeps_ema
        self._optimizers: dict[str, Optimizer] = {}
        self._states: dict[tuple[str, int, int], int] = {}  # optimizer, layout, ranks

    def optimizer(self, name: str) -> Optimizer:
        """The optimizer of this name, for the model's parameters."""
        if name not in self._optimizers:
            config = self._config
            if config is None or config.name != name:
                config = OptimizerConfig(name=name)
            self._optimizers[name] = build_optimizer(self._model, config)
        return self._optimizers[name]

    def sizes(self, setting: Setting) -> list[dict[str, int]]:
        """Elements of each parameter, per group of the optimizer."""
        groups = self.optimizer(setting.optimizer).param_groups
        return [{str(n): p.numel() for n, p in enumerate(group["params"])} for group in groups]

    def memory(self, setting: Setting, activations: Activations | None) -> Memory:
        """What a rank needs. `activations`: of one micro-batch, None where they are not known."""
        sizes = self.sizes(setting)
        parts = model_parts(sizes, setting) | {"optimizer": self._optimizer_bytes(setting)}
        parts["weights"] += fixed_bytes(self._model, setting)
        if self._keeps_ema:  # of the shards of the fp32 masters
            parts["optimizer"] += 4 * elements_per_rank(sizes, setting.stage, setting.ranks)
        kept = activations and (
            activations.checkpointed if setting.checkpointing else activations.total
        )
        parts["activations"] = kept or 0
        parts["buckets"] = BUCKET * setting.itemsize if setting.stage else 0
        total = elements_per_rank(sizes, 0, 1)
        parts["gathered"] = setting.itemsize * min(total, LIVE) if setting.stage == 3 else 0
        is_copied = (
            setting.has_masters and setting.precision != "fp32" and setting.offload == "none"
        )
        parts["step"] = parts["masters"] if is_copied else 0
        return Memory(parts, ON_HOST[setting.offload])

    def _optimizer_bytes(self, setting: Setting) -> int:
        """Of its state."""
        name, world = setting.optimizer, min(setting.ranks, EXACT_RANKS)
        if name == "adamw":
            return adamw_bytes(self.sizes(setting), setting)
        key = name, PARTITIONED.get(setting.stage, setting.stage), world
        groups = self.optimizer(name).param_groups
        if key not in self._states:
            room = apollo if name.startswith("apollo") else matrices
            self._states[key] = max(room.state_bytes(groups, *key[1:]))
        if setting.stage == 0 or world == setting.ranks:
            return self._states[key]
        share = self._states[key] * world // setting.ranks
        return max(share, _largest_matrix(groups)) if name == "soap" else share


def checkpoint_bytes(memory: Memory, sizes: Sequence[Mapping[str, int]], setting: Setting) -> int:
    """Bytes of the files of all ranks."""
    copies = setting.ranks if setting.stage else 1
    stepped = memory.parts["masters"] + memory.parts["optimizer"]
    weights = memory.parts["weights"] * (setting.ranks if setting.stage == 3 else 1)
    return weights + stepped * copies

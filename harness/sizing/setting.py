"""Everything besides the model that decides what a run needs."""

from dataclasses import dataclass
from typing import Literal

from harness.errors import ConfigError, did_you_mean

Precision = Literal["fp32", "bf16", "fp16"]
OPTIMIZERS = ("adamw", "apollo", "apollo-mini", "muon", "soap")
PRECISIONS = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to train a model. Raises ConfigError for values that do not fit together."""

    ranks: int = 1
    stage: int = 0
    """ZeRO stage, 0 to 3."""
    offload: str = "none"
    """What is in host memory: "none", "optimizer" (masters and state), "all" (weights too)."""
    optimizer: str = "adamw"
    precision: str = "bf16"
    seq_len: int = 1024
    micro_batch: int = 1
    """Samples of a rank in a micro-batch."""
    accumulation: int = 1
    """Micro-batches in a step."""
    checkpointing: bool = False
    """Whether a block's activations are computed again in backward."""

    def __post_init__(self) -> None:
        for key in ("ranks", "seq_len", "micro_batch", "accumulation"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} = {getattr(self, key)}: expected at least 1")
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"stage = {self.stage}: expected 0 to 3")
        known = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "offload": OFFLOADS}
        for key, values in known.items():
            if (found := getattr(self, key)) not in values:
                raise ConfigError(
                    f"{key} = {found!r}{did_you_mean(found, values)}: expected one of "
                    f"{', '.join(values)}"
                )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.stage < least:
            raise ConfigError(f"offload = {self.offload!r} needs ZeRO stage {least} or higher")

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the weights that the model computes with."""
        return 4 if self.precision == "fp32" else 2

    @property
    def has_masters(self) -> bool:
        """Whether DeepSpeed keeps a second, fp32 copy of the weights: at stages 1 to 3 even in
        fp32."""
        return self.stage > 0 or self.precision != "fp32"

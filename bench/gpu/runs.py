"""The short runs of the smoke section: what is trained, and what is expected of it."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

DTYPES = {
    "fp32": [],
    "bf16": ["--engines.lm.ds_overrides.bf16={enabled=true}"],
    "fp16": ["--engines.lm.ds_overrides.fp16={enabled=true, initial_scale_power=8}"],
}
OFFLOAD = [
    "--optimizations.unsloth=true",
    "--optimizations.offload.min_bytes=0",
    '--optimizations.offload.budget="all"',
]
LAYERS = "harness.wrapper.layers"
Check = Literal["resumed", "ends", "refused"]


@dataclass(frozen=True)
class Run:
    """A training of a few steps."""

    name: str
    words: list[str]
    check: Check = "resumed"
    """Resumed from its middle with equal losses and weights; only run to its end (kernels whose
    sums have no fixed order); or refused."""
    needs: str = ""
    """A package without which it is left out."""
    task: str = "byte_lm"
    then: list[str] | None = None
    """What the resumed run has instead of `words`: it is then not compared."""

    def is_possible(self) -> bool:
        """Whether what it needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def stage(number: int, dtype: str = "bf16") -> list[str]:
    """Settings of a ZeRO stage."""
    return [f"--engines.lm.ds_config=ds_configs/zero{number}.json", *DTYPES[dtype]]


def optimizer(text: str) -> list[str]:
    """Settings of an optimizer."""
    return [f"--engines.lm.optimizer={{{text}, lr=2e-3}}"]


def replaced(by: str, what: str = "torch.nn:Linear") -> list[str]:
    """Settings that replace all layers of a kind but the head."""
    return [f'--optimizations.replace=[{{what="{what}", by="{LAYERS}.{by}", exclude="head"}}]']


APOLLO = optimizer('name="apollo", rank=16, update_proj_gap=6')


def runs(is_on_gpu: bool) -> Iterator[Run]:
    """All runs, the most important ones first."""
    for number in (2, 0, 3, 1):
        for dtype in DTYPES:
            if dtype == "fp16" and not (number and is_on_gpu):
                continue  # harness refuses it at stage 0, DeepSpeed on a CPU
            for name, words in (("adamw", []), ("apollo", APOLLO)):
                yield Run(f"{name} zero{number} {dtype}", [*stage(number, dtype), *words])
    yield Run("apollo-mini", stage(2) + optimizer('name="apollo-mini"'))
    svd = 'name="apollo", rank=16, projection="svd"'
    yield Run("apollo svd", stage(2) + optimizer(svd))
    if is_on_gpu:
        yield Run("apollo fused", stage(2) + optimizer('name="apollo", rank=16, fused=true'))
    for name in ("muon", "soap"):
        for number in (2, 3):
            yield Run(f"{name} zero{number}", stage(number) + optimizer(f'name="{name}"'))
    yield Run("background save", [*stage(2), "--checkpoint.background=true"])
    yield Run("EMA", [*stage(2), "--engines.lm.ema_decay=0.9"])
    yield Run("workers", [*stage(2), "--data.workers=2"])
    yield Run(
        "accumulation", [*stage(2), "--engines.lm.ds_overrides.gradient_accumulation_steps=2"]
    )
    yield Run("LoRA", [*stage(2), '--engines.lm.lora={targets=".*qkv"}'])
    yield Run("offload inputs", [*stage(2), *OFFLOAD])
    yield Run("offload saved", [*stage(2), *OFFLOAD, '--optimizations.offload.mode="saved"'])
    for task in ("gan", "distill"):
        yield Run(f"engines of {task}", [], task=task, needs="sklearn")
    yield Run("zero2 to zero3", stage(2), then=stage(3))
    yield Run("compile", [*stage(0), "--optimizations.compile=true"])
    yield Run("compile blocks", [*stage(2), '--optimizations.compile="blocks"'])
    for kernel in ("flash", "efficient", "cudnn"):  # a CPU has the first one only, without dropout
        words = [*stage(2), f'--optimizations.attention="{kernel}"', "--task.args.dropout=0"]
        has_it = is_on_gpu or kernel == "flash"
        yield Run(f"attention {kernel}", words, "ends" if has_it else "refused")
    if is_on_gpu:
        words = [*stage(2, "fp32"), '--optimizations.attention="flash"']
        yield Run("attention flash in fp32", words, "refused")
    for number in (0, 2, 3):
        words = stage(number) + optimizer('name="adamw8bit"')
        yield Run(f"adamw8bit zero{number}", words, needs="bitsandbytes")
    words = stage(2) + replaced("bitsandbytes:Int8Linear")
    yield Run("bitsandbytes Int8Linear", words, "ends", needs="bitsandbytes")
    for layer in ("float8_linear", "int8_linear"):
        yield Run(f"torchao {layer}", stage(2) + replaced(f"torchao:{layer}"), "ends", "torchao")

"""Patches of DeepSpeed's classes, so that all ZeRO stages train alike."""

import importlib
from functools import cache
from typing import Any

RUNTIME = "deepspeed.runtime"


@cache
def apply_patches() -> None:
    """Patches DeepSpeed in this process, once it has been imported."""
    _keep_optimizers_fresh()


def _class(module: str, name: str) -> Any:
    """A class of DeepSpeed's runtime."""
    return getattr(importlib.import_module(f"{RUNTIME}.{module}"), name)


def _keep_optimizers_fresh() -> None:
    """The optimizer that an engine starts with is the one that was built.

    The wrappers of 16 bits at stage 0 take a step with zero gradients: steps are counted from 1,
    and weight decay is applied once more. ZeRO replaces an Adagrad by another one, without its
    parameter groups and hooks; and state that an optimizer has from the start, as Adagrad does,
    must follow the parameters to their masters.
    """
    fused = _class("fp16.fused_optimizer", "FP16_Optimizer")
    unfused = _class("fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
    fused.initialize_optimizer_states = lambda self: None
    unfused.initialize_optimizer_states = _hand_state_to_masters
    for module, name in (
        ("zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
        ("zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ):
        kind = _class(module, name)
        kind.initialize_optimizer_states = _keeping_optimizer(kind.initialize_optimizer_states)


def _hand_state_to_masters(wrapper: Any) -> None:
    """Keys state that was made with the optimizer by the masters, in fp32."""
    state = wrapper.optimizer.state
    for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            if made := state.pop(weight, None):
                state[master] = {
                    key: value.to(master.dtype) if getattr(value, "shape", ()) else value
                    for key, value in made.items()
                }


def _keeping_optimizer(initialize: Any) -> Any:
    """`initialize_optimizer_states` that keeps the optimizer, with the state of the new one."""

    def initialize_optimizer_states(self: Any) -> None:
        optimizer = self.optimizer
        initialize(self)
        if self.optimizer is not optimizer:
            optimizer.state, self.optimizer = self.optimizer.state, optimizer

    return initialize_optimizer_states

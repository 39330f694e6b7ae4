"""Refuses models that DeepSpeed cannot train, or would train in another way at another stage, or
that no checkpoint can hold."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness import distributed
from harness.config.deepspeed_rules import half_precision
from harness.config.engine_sections import EngineConfig
from harness.errors import ConfigError, TaskError, first_few


def check_initialized(engine: str, model: nn.Module) -> None:
    """Raises TaskError, which names it, for a parameter that has no shape yet."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TaskError(
                f"engine {engine!r}: parameter {name!r} has no shape yet, as its module is a lazy "
                "one: call the model once with a batch in the task's build, or give the sizes"
            )


def check_trainable(engine: str, model: nn.Module) -> None:
    """Raises ConfigError if nothing in the model is trained, and TaskError, which names the
    parameter, for a gradient that is sparse, complex or in float64."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(f"engines.{engine}: the model has no trainable parameter")
    for name, parameter in trained.items():
        if parameter.dtype.is_complex or parameter.dtype == torch.float64:
            remedy = (
                "keep its real and imaginary parts in a parameter of float32, and use "
                "torch.view_as_complex in forward"
                if parameter.dtype.is_complex
                else "make the model with model.float()"
            )
            raise TaskError(
                f"engine {engine!r}: parameter {name!r} is {parameter.dtype}, expected float32, "
                f"bfloat16 or float16: {remedy}, or freeze it: engines.{engine}.frozen"
            )
    for path, module in model.named_modules():
        is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if is_sparse and module.weight.requires_grad:
            raise TaskError(
                f"engine {engine!r}: parameter {f'{path}.weight'.lstrip('.')!r} "
                f"({module.weight.dtype}) would have sparse gradients, which ZeRO cannot reduce: "
                f"make the {type(module).__name__} with sparse=False, or freeze it: "
                f"engines.{engine}.frozen"
            )


def check_hooked(engine: str, model: nn.Module, config: EngineConfig) -> None:
    """Raises TaskError, which names it, for a module that ZeRO 3 cannot gather the weights of."""
    for path, module in model.named_modules() if config.zero_stage == 3 else ():
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(
                f"engine {engine!r}: module {path or 'model'!r} is compiled by torch.jit and takes "
                "no hooks, so that ZeRO 3 cannot gather its weights: use the module itself, or "
                f"ZeRO 2 (engines.{engine}.ds_config)"
            )


def check_renormed(engine: str, model: nn.Module, config: EngineConfig) -> None:
    """Raises TaskError for a trained embedding with `max_norm`, whose forward changes its weight in
    place, where that is undone by masters, or done by each rank to the rows of its own batch."""
    if config.zero_stage or half_precision(config.deepspeed()):
        why = "with ZeRO or in 16 bits the next step undoes that, by its fp32 masters"
    elif distributed.world_size() > 1:
        why = "every rank does that for its own batch, so that their weights diverge"
    else:
        return
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        if module.weight.requires_grad:
            name = f"{path}.weight".lstrip(".")
            raise TaskError(
                f"engine {engine!r}: parameter {name!r} has max_norm = {module.max_norm}, with "
                f"which every forward changes it in place; {why}: make the "
                f"{type(module).__name__} without max_norm, and begin each step with `with "
                f"engine.edit_weights() as model: model.{name}.data.renorm_"
                f"({module.norm_type:g}, 0, {module.max_norm:g})` (docs/engines.md), or freeze it: "
                f"engines.{engine}.frozen"
            )


def check_storable(engine: str, model: nn.Module) -> None:
    """Raises TaskError, which names it, for a sparse tensor in the model's state dict."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise TaskError(
                f"engine {engine!r}: buffer {name!r} has the layout {tensor.layout}, which no "
                "checkpoint can hold: register it with persistent=False, or make it dense"
            )


def check_loss(engine: str, loss: Tensor, is_second: bool) -> None:
    """Raises TaskError for a loss without a graph, and for the second one of a micro-batch."""
    if is_second:
        raise TaskError(
            f"engine {engine!r}: a second backward in one micro-batch, which ZeRO does not add to "
            "the first: return the sum of the losses from the feeder, without calling "
            "engine.backward"
        )
    if not loss.requires_grad:
        raise TaskError(
            f"engine {engine!r}: the loss does not depend on any trained parameter, or was "
            "computed without a graph: if a micro-batch has nothing to learn from, return the "
            "model's output times 0"
        )


def check_editable(engine: str, role: str) -> None:
    """Raises TaskError for edits of a teacher."""
    if role == "teacher":
        raise TaskError(
            f"engine {engine!r}: the weights of a teacher were edited, which are in no "
            "checkpoint: a resumed run would begin with the first ones. Make it a part of a "
            "trained engine's model, without requires_grad, and edit it there"
        )


class TrainedParameters:
    """Which parameters of an engine's model are trained: the same ones in the entire run."""

    def __init__(self, engine: str, model: nn.Module):
        self._engine = engine
        named = dict(model.named_parameters())
        self._names, self._parameters = list(named), list(named.values())
        self._trained = self._current()

    def check(self) -> None:
        """Raises TaskError, with `requires_grad` restored, if it is not what it was."""
        current = self._current()
        if current == self._trained:
            return
        changed = []
        for name, parameter, trained in zip(
            self._names, self._parameters, self._trained, strict=True
        ):
            if parameter.requires_grad != trained:
                changed.append(name)
                parameter.requires_grad_(trained)
        raise TaskError(
            f"engine {self._engine!r}: requires_grad was changed during the run: "
            f"{first_few(changed)}. DeepSpeed would go on to step what was frozen, by its moments "
            "and weight decay, and never step what was not trained from the start. To freeze "
            "parameters for some steps, give them a group of their own, engines."
            f"{self._engine}.optimizer.groups, and set its learning rate to 0: `lr "
            f"{self._engine}/GROUP 0`"
        )

    def _current(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]

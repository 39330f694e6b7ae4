"""One model under one DeepSpeed engine."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from harness import distributed
from harness.config import EngineConfig
from harness.errors import ConfigError
from harness.optim.build import build_optimizer, check_zero
from harness.optim.lr import build_scheduler

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What an engine has done so far."""

    global_step: int = 0
    """Optimizer steps."""
    micro_step: int = 0
    """Micro-batches of each rank."""
    samples: int = 0
    """Samples of the whole world; exact between steps once the metrics have been drained."""
    tokens: int = 0
    """Tokens of the whole world, likewise."""


class Engine:
    """A model, its optimizer and its schedule under DeepSpeed, by composition.

    `ds` is the DeepSpeed engine and `module` the bare model. A teacher has no optimizer, is in
    eval mode, and its parameters need no gradients. `parameter_names` are those that the optimizer
    was given, by its groups, in its order.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: EngineConfig,
        *,
        micro_batch_size: int,
        total_steps: int,
    ):
        """Wraps `model`, in place. `total_steps`: optimizer steps that the schedule spans.

        Collective. Raises ConfigError if the optimizer or the schedule cannot be built.
        """
        import deepspeed  # late: distributed.init() mends it first

        self.name = name
        self.role = config.role
        self.gradient_accumulation = config.gradient_accumulation
        self.counters = Counters()
        self.peers: Mapping[str, Engine] = {}
        """The engines beside it, by name, itself included."""
        self.last_lr = 0.0
        self.last_grad_norm: torch.Tensor | float = 0.0
        self._held_lr: float | None = None
        self._schedule = repr((config.optimizer, config.scheduler))
        self.parameter_names: list[list[str]] = []
        optimizer: Any = None
        scheduler: Any = None
        with distributed.in_unison(f"engines.{name}"):
            if config.optimizer is None:
                model.requires_grad_(False).eval()
            else:
                if not any(p.requires_grad for p in model.parameters()):
                    raise ConfigError(f"engines.{name}: the model has no trainable parameter")
                check_zero(config.optimizer, config.deepspeed())
                optimizer = build_optimizer(model, config.optimizer)
                chosen = {"lr", *config.optimizer.args}
                self._chosen = [
                    {key: group[key] for key in chosen & group.keys()}
                    for group in optimizer.param_groups
                ]
                names = {parameter: name for name, parameter in model.named_parameters()}
                self.parameter_names = [
                    [names[p] for p in group["params"]] for group in optimizer.param_groups
                ]
                scheduler = build_scheduler(optimizer, config.scheduler, total_steps)
        self.ds: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config={
                "steps_per_print": 2**31,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "train_micro_batch_size_per_gpu": micro_batch_size,
            }
            | config.deepspeed(),
        )[0]

    @property
    def module(self) -> nn.Module:
        """The bare model."""
        return self.ds.module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return distributed.device()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        if self.ds.bfloat16_enabled():
            return torch.bfloat16
        return torch.float16 if self.ds.fp16_enabled() else torch.float32

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self.ds.zero_optimization_stage()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through DeepSpeed."""
        return self.ds(*args, **kwargs)

    def train(self) -> None:
        """Training mode; a teacher stays in eval mode."""
        if self.role == "train":
            self.ds.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.ds.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagates a scalar loss of one micro-batch."""
        self.ds.backward(loss)

    def step(self) -> bool:
        """Ends a micro-batch. True if it was the last of an optimizer step, which is then taken."""
        boundary = self.ds.is_gradient_accumulation_boundary()
        norm = self._plain_grad_norm() if boundary else None
        lr = self.get_lr()
        self.ds.step()
        self.counters.micro_step += 1
        if boundary:
            self.counters.global_step += 1
            self.last_lr = lr
            self.last_grad_norm = self.ds.get_global_grad_norm() if norm is None else norm
            self._apply_held_lr()
        return boundary

    def get_lr(self) -> float:
        """The learning rate of the next step (of the first parameter group)."""
        return self.ds.optimizer.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Holds the learning rate at `lr` from the next step on, whatever the schedule says.

        Other parameter groups keep their ratio to the first.
        """
        self._held_lr = lr
        self._apply_held_lr()

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in fp32 and bf16."""
        if not self.ds.fp16_enabled():
            return 1.0
        # DeepSpeed's fp16 optimizers (stage 0) keep it in a config, those of ZeRO in themselves.
        return float(getattr(self.ds.optimizer, "loss_scale_config", self.ds.optimizer).cur_scale)

    def optimizer_figures(self) -> dict[str, torch.Tensor]:
        """What the optimizer tells of its last step, as APOLLO does; on the device."""
        tell = getattr(self.ds.basic_optimizer, "telemetry", None)
        return tell() if tell is not None else {}

    def gather_attribute(self, name: str, kind: type = object) -> dict[str, Any]:
        """Takes attribute `name` off every submodule that has it: `{module path: value}`.

        Values that are no `kind` stay where they are. Models may leave a `loss` and `stats` on
        their submodules, for the default feeder.
        """
        found = {}
        for path, module in self.module.named_modules():
            if isinstance(vars(module).get(name), kind) and name in vars(module):
                found[path] = vars(module).pop(name)
        return found

    def dispatch_attribute(
        self,
        name: str,
        value: Any,
        where: Callable[[nn.Module], bool] | None = None,
    ) -> int:
        """Sets attribute `name` on every submodule that has it (or for which `where` is true).

        Returns the number of submodules that were set.
        """
        chosen = [m for m in self.module.modules() if (where(m) if where else hasattr(m, name))]
        for module in chosen:
            setattr(module, name, value)
        return len(chosen)

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed's checkpoint does not hold: counters, and where the lr comes from."""
        return {
            "counters": asdict(self.counters),
            "held_lr": self._held_lr,
            "schedule": self._schedule,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. Call it after DeepSpeed's own loading.

        The config has the last word: the optimizer's settings that it names are taken from it, and
        the schedule goes on at its place with the config's learning rate. A held learning rate
        stays, unless optimizer or schedule were changed in the config since.
        """
        self.counters = Counters(**state["counters"])
        if self.role == "teacher":
            return
        scheduler = self.ds.lr_scheduler
        scheduler.base_lrs = [chosen["lr"] for chosen in self._chosen]
        groups = zip(
            self.ds.optimizer.param_groups, self._chosen, scheduler.lr_lambdas, strict=True
        )
        for group, chosen, factor in groups:
            group |= chosen | {"lr": chosen["lr"] * factor(scheduler.last_epoch)}
        self._held_lr = state["held_lr"]
        if state["schedule"] != self._schedule:
            self._held_lr = None
            log.info(
                "engine %s: optimizer or schedule were changed: lr %g", self.name, self.get_lr()
            )
        self._apply_held_lr()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's parameters and persistent buffers on rank 0's CPU; {} elsewhere.

        Collective: at ZeRO stage 3 every parameter is gathered, one at a time.
        """
        import deepspeed

        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if distributed.is_global_leader():
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().cpu().clone()
                    state[name] = copies[id(tensor)]
        return state

    def _apply_held_lr(self) -> None:
        if self._held_lr is None:
            return
        bases = [chosen["lr"] for chosen in self._chosen]
        for group, base in zip(self.ds.optimizer.param_groups, bases, strict=True):
            group["lr"] = self._held_lr * (base / bases[0] if bases[0] else 1.0)

    def _plain_grad_norm(self) -> torch.Tensor | None:
        """The gradients' L2 norm where DeepSpeed does not wrap the optimizer, nor tell it."""
        if self.zero_stage or self.dtype != torch.float32:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

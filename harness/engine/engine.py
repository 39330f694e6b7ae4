"""One model under one DeepSpeed engine."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import distributed
from harness.config.engine_sections import EngineConfig
from harness.engine import ema
from harness.engine.lora import adapt
from harness.engine.turns import Turn
from harness.errors import CheckpointError, CommandError, ConfigError
from harness.offload import OffloadPlan
from harness.optim.apollo.optimizer import Apollo
from harness.optim.build import build_optimizer, check_zero, is_elementwise
from harness.optim.schedules import build_factor, build_scheduler
from harness.wrapper.wrapper import freeze

if TYPE_CHECKING:
    from harness.engine.engines import Engines

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
    eval mode, and its parameters need no gradients. `optimizer` is the import path of the
    optimizer's class, or "none"; `parameter_names` are those that it was given, by its groups, in
    its order.
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
        self.every = config.every
        self.counters = Counters()
        self.peers: Engines
        """The set that it belongs to, itself included."""
        self.turn = Turn()
        """Which engine of the set is at work."""
        self.last_lr = 0.0
        self.last_grad_norm: torch.Tensor | float = 0.0
        self.offloading: OffloadPlan | None = None
        """Which of its activations wait in host memory."""
        self._config = config
        self._held_lr: float | None = None
        self._lr_factor = 1.0
        self._clip: float | None = None
        self._schedule = repr((config.optimizer, config.scheduler))
        self.optimizer = "none"
        self.parameter_names: list[list[str]] = []
        optimizer: Any = None
        scheduler: Any = None
        with distributed.raise_on_all_ranks(f"engines.{name}"):
            if config.optimizer is None:
                model.requires_grad_(False).eval()
            else:
                if config.lora is not None:
                    adapted = adapt(model, config.lora)
                    log.info("engine %s: adapters for %s", name, ", ".join(adapted))
                if frozen := freeze(model, config.frozen):
                    log.info("engine %s: frozen: %s", name, ", ".join(frozen))
                if not any(p.requires_grad for p in model.parameters()):
                    raise ConfigError(f"engines.{name}: the model has no trainable parameter")
                check_zero(config.optimizer, config.deepspeed())
                optimizer = build_optimizer(model, config.optimizer)
                if config.ema_decay and hasattr(optimizer, "eval"):
                    raise ConfigError(
                        f"engines.{name}.ema_decay: optimizer {config.optimizer.name!r} keeps an "
                        "average of its own, which evaluations and exports use: leave one of them "
                        "out"
                    )
                made = type(optimizer)
                self.optimizer = f"{made.__module__}:{made.__qualname__}"
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
        self._configured_clip: float = self.ds.gradient_clipping()
        self._ema = ema.Ema(self.ds.optimizer, config.ema_decay) if config.ema_decay else None

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

    @property
    def is_elementwise(self) -> bool:
        """Whether the optimizer's state can be cut anywhere: see `optim.build.is_elementwise`."""
        assert self._config.optimizer is not None
        offloaded = self.ds.zero_use_cpu_optimizer()
        device = torch.device("cpu") if offloaded else self.device
        return is_elementwise(self._config.optimizer, device)

    @property
    def is_low_rank(self) -> bool:
        """Whether the optimizer is APOLLO, whose state is known by the names of matrices."""
        return isinstance(self.ds.basic_optimizer, Apollo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through DeepSpeed. Raises TaskError in another engine's turn."""
        self.turn.check(self.name, "called")
        return self.ds(*args, **kwargs)

    def train(self) -> None:
        """Training mode; a teacher stays in eval mode."""
        if self.role == "train":
            self.ds.train()
            getattr(self.ds.basic_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Evaluation mode, also of an optimizer that has one (schedule-free ones)."""
        self.ds.eval()
        if self.role == "train":
            getattr(self.ds.basic_optimizer, "eval", lambda: None)()

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagates a scalar loss of one micro-batch."""
        self.turn.check(self.name, "back-propagated")
        self.ds.backward(loss)

    def step(self) -> bool:
        """Ends a micro-batch. True if it was the last of an optimizer step, which is then taken."""
        self.turn.check(self.name, "stepped")
        boundary = self.ds.is_gradient_accumulation_boundary()
        norm = self._plain_grad_norm() if boundary else None
        lr = self.get_lr()
        self.ds.step()
        self.counters.micro_step += 1
        if boundary:
            self.counters.global_step += 1
            self.last_lr = lr
            self.last_grad_norm = self.ds.get_global_grad_norm() if norm is None else norm
            self._apply_lr()
        return boundary

    def get_lr(self) -> float:
        """The learning rate of the next step (of the first parameter group)."""
        return self.ds.optimizer.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Holds the learning rate at `lr` from the next step on, whatever the schedule says.

        Other parameter groups keep their ratio to the first.
        """
        self._held_lr, self._lr_factor = lr, 1.0
        self._apply_lr()

    def scale_lr(self, factor: float) -> None:
        """Multiplies the learning rate, held or scheduled, from the next step on.

        Raises CommandError if that is no finite number.
        """
        if not math.isfinite(factor * self._lr_factor * self.get_lr()):
            raise CommandError(f"engine {self.name!r}: lr x{factor:g} would be infinite")
        self._lr_factor *= factor
        self._apply_lr()

    def follow_schedule(self) -> None:
        """Gives the learning rate back to the schedule, from the next step on."""
        self._held_lr, self._lr_factor = None, 1.0
        self._apply_lr()

    def set_total_steps(self, total_steps: int) -> None:
        """Spans the schedule over another number of optimizer steps, those taken included."""
        factor = build_factor(self._config.scheduler, total_steps)
        scheduler = self.ds.lr_scheduler
        scheduler.lr_lambdas = [factor] * len(scheduler.base_lrs)
        self._apply_lr()

    def set_clip(self, norm: float) -> None:
        """Clips gradients to the L2 norm `norm` from the next step on; 0: not at all."""
        self._clip = norm
        self._apply_clip()

    @property
    def has_loss_scale(self) -> bool:
        """Whether it computes in fp16."""
        return self.ds.fp16_enabled()

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in fp32 and bf16."""
        return float(self._scaler().cur_scale) if self.has_loss_scale else 1.0

    def set_loss_scale(self, scale: float) -> None:
        """Sets the fp16 loss scale; a dynamic one goes on from there."""
        self._scaler().cur_scale = scale

    def overrides(self) -> list[str]:
        """What live commands have changed, in words."""
        found = []
        if self._held_lr is not None:
            found.append(f"lr held at {self._held_lr:g}")
        if self._lr_factor != 1:
            found.append(f"lr x{self._lr_factor:g}")
        if self._clip is not None:
            found.append(f"clip {self._clip:g} (the config says {self._configured_clip:g})")
        return found

    @property
    def has_lora(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return self._config.lora is not None

    @property
    def _lora_alpha(self) -> float | None:
        return self._config.lora.alpha if self._config.lora is not None else None

    @property
    def has_ema(self) -> bool:
        """Whether an average of its weights is kept: `ema_decay` is set."""
        return self._ema is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the average for its weights, if one is kept and a step was taken.

        Collective, and for the time between steps only. Nothing is left of it afterwards.
        """
        with self._ema.in_place() if self._ema else nullcontext():
            yield

    def optimizer_metrics(self) -> dict[str, torch.Tensor]:
        """What the optimizer tells of its last step, as APOLLO does; on the device."""
        tell = getattr(self.ds.basic_optimizer, "telemetry", None)
        return tell() if tell is not None else {}

    def offload_metrics(self) -> dict[str, float]:
        """What offloading has done on this rank since the last call."""
        return self.offloading.figures() if self.offloading is not None else {}

    def log_offload_stats(self) -> None:
        """Logs what offloading has done in all on this rank."""
        if self.offloading is not None:
            log.info("engine %s: offload: %s", self.name, self.offloading.stats())

    def close(self) -> None:
        """Takes DeepSpeed and offloading off the model; the engine is of no further use."""
        if self.offloading is not None:
            self.offloading.detach()
        self.ds.destroy()

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
        """What DeepSpeed's checkpoint does not hold: counters, and what live commands changed."""
        return {
            "counters": asdict(self.counters),
            "held_lr": self._held_lr,
            "lr_factor": self._lr_factor,
            "schedule": self._schedule,
            "clip": self._clip,
            "configured_clip": self._configured_clip,
            "lora_alpha": self._lora_alpha,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave. Call it after DeepSpeed's own loading.

        The config has the last word: the optimizer's settings that it names are taken from it, and
        the schedule goes on at its place with the config's learning rate. What live commands have
        changed stays, unless the same thing was changed in the config since: optimizer or schedule
        for the learning rate, `gradient_clipping` for the clipping. Raises CheckpointError if the
        config has another rank for APOLLO, or alpha for adapters, than the checkpoint.
        """
        self.counters = Counters(**state["counters"])
        if self.role == "teacher":
            return
        alpha = state.get("lora_alpha", self._lora_alpha)
        if alpha != self._lora_alpha:
            raise CheckpointError(
                f"engine {self.name!r}: lora.alpha = {self._lora_alpha} here, and {alpha} in the "
                "checkpoint: other weights: set it as it was, or start a new run under another "
                "run.name"
            )
        if not self.has_ema:
            ema.forget(self.ds.optimizer)
        self.ds.lr_scheduler.base_lrs = [chosen["lr"] for chosen in self._chosen]
        for group, chosen in zip(self.ds.optimizer.param_groups, self._chosen, strict=True):
            here, there = (settings.get("rank") for settings in (group | chosen, group))
            if self.is_low_rank and here != there:
                raise CheckpointError(
                    f"engine {self.name!r}: rank = {here} here, and {there} in the checkpoint, "
                    "which APOLLO's state cannot follow: set it as it was, or start a new run "
                    "under another run.name"
                )
            group |= chosen
        self._held_lr, self._lr_factor, self._clip = (
            state[key] for key in ("held_lr", "lr_factor", "clip")
        )
        was = self.overrides()
        if state["schedule"] != self._schedule:
            self._held_lr, self._lr_factor = None, 1.0
        if state["configured_clip"] != self._configured_clip:
            self._clip = None
        for text in was:
            if text not in self.overrides():
                log.info(
                    "engine %s: %s, set live, is dropped: the config was changed since",
                    self.name,
                    text,
                )
        self._apply_lr()
        self._apply_clip()

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The whole model's parameters, persistent buffers and extra state, one at a time, by name.

        Copies on rank 0's CPU (tied tensors stay one tensor); None elsewhere. Extra state
        (`Module.get_extra_state`) that is no tensor is logged, and left out. Collective: at ZeRO
        stage 3 every parameter is gathered. Raises HarnessError, on all ranks and after the last
        one, if rank 0 has no room for them.
        """
        import deepspeed

        copies: dict[int, torch.Tensor] = {}
        failure: Exception | None = None
        state = self.module.state_dict(keep_vars=True)
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        if others := sorted(state.keys() - tensors.keys()):
            log.info("engine %s: no tensor, and left out: %s", self.name, ", ".join(others))
        for name, tensor in tensors.items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if distributed.is_global_leader() and id(tensor) not in copies and not failure:
                    try:
                        copies[id(tensor)] = tensor.detach().cpu().clone()
                    except Exception as error:  # the others must not wait for this rank
                        failure = error
            yield name, copies.get(id(tensor))
        with distributed.raise_on_all_ranks(f"cannot gather engine {self.name!r}"):
            if failure is not None:
                raise failure

    def _apply_lr(self) -> None:
        """Writes the next step's learning rate, scheduled or held, into every parameter group."""
        bases = [chosen["lr"] for chosen in self._chosen]
        scheduler = self.ds.lr_scheduler
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(self.ds.optimizer.param_groups, bases, factors, strict=True):
            lr = base * factor
            if self._held_lr is not None:
                lr = self._held_lr * (base / bases[0] if bases[0] else 1.0)
            group["lr"] = lr * self._lr_factor

    def _apply_clip(self) -> None:
        """Writes the clipping norm where DeepSpeed reads it: at fp32 stage 0, and elsewhere."""
        norm = self._configured_clip if self._clip is None else self._clip
        self.ds._config.gradient_clipping = norm
        if hasattr(self.ds.optimizer, "clip_grad"):
            self.ds.optimizer.clip_grad = norm

    def _scaler(self) -> Any:
        """Who has the fp16 loss scale: DeepSpeed's optimizers keep it in a config at stage 0, in
        a scaler above it."""
        return (
            getattr(self.ds.optimizer, "loss_scale_config", None) or self.ds.optimizer.loss_scaler
        )

    def _plain_grad_norm(self) -> torch.Tensor | None:
        """The gradients' L2 norm where DeepSpeed does not wrap the optimizer, nor tell it."""
        if self.zero_stage or self.dtype != torch.float32:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

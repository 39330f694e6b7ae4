"""One model under one DeepSpeed engine."""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from harness import distributed
from harness.config.engine_sections import EngineConfig
from harness.engine import attributes, mixed_dtypes, trainable
from harness.engine.attributes import Choice
from harness.engine.buffers import Buffers
from harness.engine.counters import Counters
from harness.engine.edits import Edits
from harness.engine.ema import Ema, remove_average
from harness.engine.explained import explained
from harness.engine.kept_buffers import KeptBuffers
from harness.engine.lora import adapt, check_alpha
from harness.engine.models import engine_settings, settings_named
from harness.engine.overrides import Overrides
from harness.engine.turns import Peers, Turn, zero_gradients
from harness.errors import CheckpointError, ConfigError, TaskError, config_errors_of
from harness.health.skips import Reason, reason_of
from harness.offload import OffloadPlan
from harness.optim.build import build_optimizer, configured_keys
from harness.optim.scheduler import Schedule, build_scheduler
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.optim.zero_compatibility import can_regroup, check_zero, is_elementwise
from harness.wrapper import freeze
from harness.zero import engine_state, file_trees, leftovers
from harness.zero.arrivals import Arrivals
from harness.zero.initialize import initialize

log = logging.getLogger(__name__)


class Engine:
    """A model, its optimizer and its schedule under DeepSpeed, by composition.

    `ds` is the DeepSpeed engine and `module` the bare model. A teacher has no optimizer, is in
    eval mode, and its parameters need no gradients.
    """

    ds: Any
    """The DeepSpeed engine."""
    optimizer_path: str = "none"
    """Import path of the optimizer's class; "none" for a teacher."""
    parameter_names: list[list[str]]
    """Of the optimizer's parameters, by parameter group, in its order."""
    overrides: Overrides
    """Learning rates and clipping of a trained engine: scheduled, or changed by live commands."""
    buffers: Buffers
    """Those of a trained engine: which ones training changes, and whose they are."""
    peers: Peers
    """All engines of the run, this one included."""

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
        self.name = name
        self.role = config.role
        self.gradient_accumulation = config.gradient_accumulation
        self.train_every = config.train_every
        self.counters = Counters()
        self.parameter_names = []
        self.turn = Turn()
        """Which engine of the run is in its turn."""
        self._is_back_propagated = False  # in this micro-batch
        self.last_lrs: dict[str, float] = {}
        """Of the last step, under their log names: `Overrides.rates`."""
        self.last_grad_norm: torch.Tensor | float = 0.0
        self.largest_norm = math.inf
        """A step whose gradient norm is above it is skipped."""
        self.kept_buffers = KeptBuffers()
        self._losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self.last_skip: Reason | None = None
        """Why the last step was skipped; None if it was applied."""
        self._was_step_applied = False
        self.offloading: OffloadPlan | None = None
        """Which of its activations are kept in host memory."""
        self._config = config
        self._chosen: list[dict[str, Any]] = []
        """The optimizer's settings that are set in the config, by parameter group."""
        self._ema: Ema | None = None
        optimizer = scheduler = schedule = None
        with distributed.raise_on_all_ranks(f"engines.{name}"):
            trainable.check_storable(name, model)
            if self.role == "teacher":
                model.requires_grad_(False).eval()
            else:
                self._choose_parameters(model)
                optimizer = self._build_optimizer(model)
                with config_errors_of(f"engines.{name}"):
                    schedule = Schedule(config.scheduler, total_steps)
                scheduler = build_scheduler(optimizer, schedule)
        kept_in_fp32 = mixed_dtypes.parameters_kept_in_fp32(model)
        self._attributes = leftovers.attributes_of(model)
        self.ds = self._wrap(model, optimizer, scheduler, micro_batch_size)
        if kept_in_fp32 and self.dtype != torch.float32:
            mixed_dtypes.warn_of_cast(name, kept_in_fp32, self.dtype)
        self._submodules = attributes.Submodules(self.module)
        self.arrivals = Arrivals(self.ds, in_order=config.unused_parameters == "zeros")
        self.edits = Edits(name, self.ds, self.collect)
        self._trained = trainable.TrainedParameters(name, model)
        if schedule is not None:
            self.overrides = Overrides(name, self.ds, config, schedule, self._chosen)
            self.buffers = Buffers(name, model, config.buffers)
            if config.ema_decay:
                self._ema = Ema(self.ds, config.ema_decay)

    def _choose_parameters(self, model: nn.Module) -> None:
        """Injects adapters, and freezes what is not trained. Raises ConfigError and TaskError."""
        if self._config.lora is not None:
            adapted = adapt(model, self._config.lora)
            log.info("engine %s: LoRA adapters for %s", self.name, ", ".join(adapted))
        with config_errors_of(f"engines.{self.name}"):
            if frozen := freeze(model, self._config.frozen):
                log.info("engine %s: frozen: %s", self.name, ", ".join(frozen))
        trainable.check_trainable(self.name, model)
        trainable.check_renormed(self.name, model, self._config)

    def _build_optimizer(self, model: nn.Module) -> Optimizer:
        """Builds the optimizer, and records its settings and parameters. Raises ConfigError."""
        settings = self._config.optimizer
        assert settings is not None
        with config_errors_of(f"engines.{self.name}"):
            check_zero(settings, deepspeed := self._config.deepspeed())
            optimizer = build_optimizer(model, settings, deepspeed)
        if self._config.ema_decay and hasattr(optimizer, "eval"):
            raise ConfigError(
                f"engines.{self.name}.ema_decay: optimizer {settings.name!r} keeps its own average "
                "of the weights for evaluations and exports: remove ema_decay, or use another "
                "optimizer"
            )
        kind = type(optimizer)
        self.optimizer_path = f"{kind.__module__}:{kind.__qualname__}"
        keys = configured_keys(settings, optimizer)
        self._chosen = [
            {key: group[key] for key in keys & group.keys()} for group in optimizer.param_groups
        ]
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parameter_names = [
            [names[p] for p in group["params"]] for group in optimizer.param_groups
        ]
        return optimizer

    def _wrap(self, model: nn.Module, optimizer: Any, scheduler: Any, micro_batch_size: int) -> Any:
        """The DeepSpeed engine. Collective."""
        settings = engine_settings(self._config, micro_batch_size)
        with settings_named(self.name, self._config):
            return initialize(model, optimizer, scheduler, settings)

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
        return engine_state.compute_dtype(self.ds)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return engine_state.zero_stage(self.ds)

    @property
    def is_elementwise(self) -> bool:
        """`optim.zero_compatibility.is_elementwise`: its state can be split at any element."""
        assert self._config.optimizer is not None
        return is_elementwise(self._config.optimizer, engine_state.optimizer_device(self.ds))

    @property
    def can_regroup(self) -> bool:
        """`optim.zero_compatibility.can_regroup`: its parameters can change groups at a resume."""
        return can_regroup(type(engine_state.base_optimizer(self.ds)))

    @property
    def sharded_optimizer(self) -> type[ShardedOptimizer] | None:
        """The optimizer's class, if it is one of ours that knows of matrices."""
        kind = type(engine_state.base_optimizer(self.ds))
        return kind if issubclass(kind, ShardedOptimizer) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through DeepSpeed. Raises TaskError in another engine's turn."""
        self.turn.check(self.name, "called")
        with explained(self.name, self.ds):
            return self.ds(*args, **kwargs)

    def train(self) -> None:
        """Training mode; a teacher stays in eval mode."""
        if self.role == "train":
            self.ds.train()
            getattr(engine_state.base_optimizer(self.ds), "train", lambda: None)()

    def eval(self) -> None:
        """Evaluation mode, also of the optimizer if it has one (schedule-free optimizers)."""
        self.ds.eval()
        if self.role == "train":
            getattr(engine_state.base_optimizer(self.ds), "eval", lambda: None)()

    def backward(self, loss: torch.Tensor, share: float = 1.0) -> None:
        """Back-propagates a scalar loss of one micro-batch, times `share`.

        With share 0 every gradient is 0, even of a loss that is NaN, as a mean over no terms is.
        Raises TaskError for a second one in a micro-batch.
        """
        self.turn.check(self.name, "back-propagated")
        trainable.check_loss(self.name, loss, is_second=self._is_back_propagated)
        self._is_back_propagated = True
        if self.counters.micro_step % self.gradient_accumulation == 0:
            self._losses.clear()
        self._losses.append(loss.detach())
        engine_state.start_backward_timers(self.ds)
        without_terms = nullcontext() if share else zero_gradients(self.module)
        with without_terms, explained(self.name, self.ds):
            self.arrivals.backward(loss if share == 1 else loss * share)
        self._submodules.drop_repeated()

    def step(self) -> bool:
        """Ends a micro-batch. True if it was the last of an optimizer step, which is then taken."""
        self.turn.check(self.name, "stepped")
        if self.turn.name is not None:
            raise TaskError(
                f"engine {self.name!r} was stepped in its own turn: return the loss from the "
                "feeder; backward and step follow"
            )
        self._is_back_propagated = False
        self.counters.micro_step += 1
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()
            return False
        self._trained.check()
        self.last_lrs = self.overrides.rates()
        is_finding_scale = engine_state.finds_loss_scale(self.ds)
        self.last_grad_norm = engine_state.take_step(
            self.ds, self.largest_norm, self._config.max_loss_scale
        )
        self._was_step_applied = self.ds.was_step_applied()
        self.last_skip = None
        if not self._was_step_applied:
            self.last_skip = reason_of(self.last_grad_norm, is_finding_scale)
            self.kept_buffers.restore()
        self.counters.stepped(self.last_skip)
        self.overrides.apply_lr()
        self.edits.stepped()
        return True

    def was_step_applied(self) -> bool:
        """Whether the last step changed the weights, optimizer, schedule, EMA and buffers; it is
        skipped if a gradient is not finite."""
        return self._was_step_applied

    def losses_are_finite(self) -> bool:
        """Whether those of this rank were in the last step. Waits for the device."""
        return all(loss.isfinite() for loss in self._losses)

    @property
    def has_loss_scale(self) -> bool:
        """Whether it computes in fp16."""
        return self.ds.fp16_enabled()

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in fp32 and bf16."""
        return engine_state.loss_scale(self.ds)

    def set_loss_scale(self, scale: float) -> None:
        """Sets the fp16 loss scale; a dynamic one continues from there."""
        engine_state.set_loss_scale(self.ds, scale)

    @property
    def has_lora(self) -> bool:
        """Whether only adapters are trained."""
        return self._config.lora is not None

    @property
    def _lora_alpha(self) -> float | None:
        return self._config.lora.alpha if self._config.lora is not None else None

    @property
    def has_ema(self) -> bool:
        """Whether an EMA of its weights is kept: `ema_decay` is set."""
        return self._ema is not None

    def averaged(self) -> AbstractContextManager[None]:
        """The model with its EMA weights, if they are kept and a step was taken.

        Collective; between optimizer steps only. Afterwards everything is restored.
        """
        return self._ema.in_place() if self._ema else nullcontext()

    def edit_weights(self) -> AbstractContextManager[nn.Module]:
        """The model, whose parameters may be changed in place: rank 0's changes, on all ranks.

        Collective; at ZeRO stage 3 all parameters are gathered. Optimizer state and EMA stay as
        they are. Call it between steps, as in a command, or at the start of the engine's turn:
        raises TaskError if a step has begun, in an evaluation, and for a teacher.
        """
        trainable.check_editable(self.name, self.role)
        self.turn.check_edit(self.name)
        return self.edits.block()

    def optimizer_metrics(self) -> dict[str, torch.Tensor]:
        """Metrics of the optimizer's last step (APOLLO has some); on the device."""
        report = getattr(engine_state.base_optimizer(self.ds), "step_metrics", None)
        return report() if report is not None else {}

    def offload_metrics(self) -> dict[str, float]:
        """Metrics of offloading on this rank since the last call."""
        return self.offloading.step_metrics() if self.offloading is not None else {}

    def log_offload_stats(self) -> None:
        """Logs the totals of offloading on this rank."""
        if self.offloading is not None:
            log.info("engine %s: offload: %s", self.name, self.offloading.stats())

    def close(self) -> None:
        """Removes DeepSpeed and offloading from the model; the engine cannot be used afterwards."""
        if self.offloading is not None:
            self.offloading.detach()
        self.arrivals.detach()
        self.ds.destroy()
        leftovers.take_off(self.ds, self._attributes)

    def gather_attribute(self, name: str, kind: type = object) -> dict[str, Any]:
        """`Submodules.gather` from its model."""
        return self._submodules.gather(name, kind)

    def dispatch_attribute(self, name: str, value: Any, where: Choice | None = None) -> int:
        """`attributes.dispatch` to its model."""
        return attributes.dispatch(self.module, name, value, where)

    def collect(self, for_loading: bool = False) -> file_trees.FileTrees:
        """`file_trees.collect` of this engine. Collective."""
        return file_trees.collect(self.ds, self.name, self.parameter_names, for_loading)

    def weights_are_finite(self) -> bool:
        """Whether all trained weights that this rank keeps are finite. Waits for the device."""
        return engine_state.weights_are_finite(self.ds)

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed's checkpoint does not hold: counters, live changes, some buffers."""
        state = {"counters": asdict(self.counters), "lora_alpha": self._lora_alpha}
        if self.role == "train":
            state |= {"buffers": self.buffers.state_dict()} | self.overrides.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Call it after DeepSpeed's own loading.

        The optimizer's settings in the config take precedence, and the schedule continues at its
        step with the config's learning rate. For live changes see `Overrides.load_state_dict`.
        Raises CheckpointError if a setting that the state depends on, like APOLLO's rank or the
        adapters' alpha, differs from the checkpoint.
        """
        self.counters = Counters(**state["counters"])
        self.edits.forget()
        if self.role == "teacher":
            return
        check_alpha(self.name, self._lora_alpha, state.get("lora_alpha", self._lora_alpha))
        if self._ema is None:
            remove_average(self.ds)
        for group, chosen in zip(self.ds.optimizer.param_groups, self._chosen, strict=True):
            for key in getattr(self.sharded_optimizer, "STATE_SETTINGS", ()):
                setting = (group | chosen).get(key)
                self._check_unchanged(f"optimizer.{key}", setting, group.get(key))
            group |= chosen
        self.overrides.load_state_dict(state)
        self.buffers.load_state_dict(state.get("buffers"))

    def _check_unchanged(self, key: str, configured: Any, saved: Any) -> None:
        """Raises CheckpointError if a setting that the state depends on has changed."""
        if configured != saved:
            raise CheckpointError(
                f"engine {self.name!r}: {key} is {configured} in the config, and {saved} in the "
                "checkpoint, whose state depends on it: restore the old value, or start a new run "
                "under another run.name"
            )

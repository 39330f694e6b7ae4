"""The named set of engines, stepped, saved, exported and resumed together."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from harness import distributed
from harness.data.step_batches import Terms
from harness.distributed.network import is_lost_rank
from harness.engine import buffers
from harness.engine.engine import Engine
from harness.engine.explained import explained
from harness.engine.gradient_check import GradientCheck, explain_failure
from harness.engine.turns import Turn
from harness.errors import TaskError, did_you_mean
from harness.health import phases
from harness.health.skips import Reason, Skip, Skips
from harness.health.spikes import Spikes
from harness.task import Stats, Task, checked_stats, feed
from harness.zero import fetches

log = logging.getLogger(__name__)
log_on_leader = distributed.global_leader_only(log.info)


SeeLoss = Callable[[torch.Tensor], None]


class Engines(Mapping[str, Engine]):
    """Engines by name, in the config's order.

    A step of the run is as many micro-batches as it takes for every trained engine to end an
    optimizer step together: the least common multiple of their gradient accumulations. An engine
    with `train_every = n` is trained only at the steps n, 2n, ...
    """

    def __init__(self, engines: Mapping[str, Engine], task: Task, to_close: ExitStack):
        """`to_close`: closes the engines."""
        self._engines = dict(engines)
        self._to_close = to_close
        self.task = task
        self._turn = Turn()
        self.gradient_check = GradientCheck()
        """Whether all ranks gave gradients to the same parameters; a part of the step's vector."""
        self.skips = Skips()
        """The steps that changed nothing; a part of the step's vector."""
        self.trained = [engine for engine in engines.values() if engine.role == "train"]
        for engine in engines.values():
            engine.peers, engine.turn = self, self._turn
        for engine in self.trained if len(self.trained) > 1 else ():
            self._turn.guard(engine.name, engine.module, engine.arrivals.before_gradient)
        self.gradient_accumulation = math.lcm(*(e.gradient_accumulation for e in self.trained))
        self.spikes = Spikes()
        """The losses and norms of the last steps, and what was far above them."""
        self.global_step = 0
        self.rollbacks = 0
        """How often the run has returned to an earlier step."""
        self.finished_at = -1
        """The step at which the run has been complete, with all that follows its last step."""

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def step(
        self, batch: Any, terms: Terms | None = None, number: int = 0
    ) -> dict[str, torch.Tensor | float]:
        """Feeds one micro-batch to each engine that is due, in turn. Returns losses and stats.

        The optimizer of an engine steps when its gradient accumulation is full. With `terms`,
        losses are weighted by those of the step's micro-batch `number`, and an optimizer step
        without any term is skipped on all ranks.
        """
        report: dict[str, torch.Tensor | float] = {}
        for engine in self.due(self.global_step + 1):
            share = 1.0 if terms is None else terms.share(number, engine.gradient_accumulation)
            if share is None:
                if number % engine.gradient_accumulation == 0:
                    engine.counters.skipped += 1
                    log_on_leader(
                        "step %d: engine %s: skipped, as no rank has a term (%d so far)",
                        *(self.global_step + 1, engine.name, engine.counters.skipped),
                    )
                continue
            loss, stats = self._feed(engine, batch, share)
            phases.enter("step")
            if engine.step() and engine.last_skip is not None:
                self._record_skip(engine, engine.last_skip)
            report |= self.label(engine, {"loss": loss.detach(), **stats})
        return report

    def _feed(
        self, engine: Engine, batch: Any, share: float, see: SeeLoss | None = None
    ) -> tuple[torch.Tensor, Stats]:
        """An engine's turn: forward and backward of a micro-batch. Its loss and stats."""
        begins_step = engine.counters.micro_step % engine.gradient_accumulation == 0
        if begins_step:
            engine.kept_buffers.begin_step(engine.buffers)
        with self._gathered(), self._turn.of(engine.name, begins_step):
            phases.enter("forward")
            with (
                engine.arrivals.reads_refused(engine.name),
                engine.edits.watching(),
                explained(engine.name, engine.ds),
            ):
                loss, stats = feed(self.task, engine, batch)
            if see is not None:
                see(loss)
            phases.enter("backward")
            engine.backward(loss, share)
        return loss, stats

    def feed_again(
        self, engine: Engine, batch: Any, terms: Terms | None, number: int, see: SeeLoss
    ) -> None:
        """A micro-batch of one engine that `step` has had. Nothing is recorded; `see` is called
        with the loss before its backward."""
        share = 1.0 if terms is None else terms.share(number, engine.gradient_accumulation)
        if share is not None:
            self._feed(engine, batch, share, see)
            engine.step()

    def _record_skip(self, engine: Engine, reason: Reason) -> None:
        skip = Skip(
            self.global_step + 1,
            engine.name,
            reason,
            norm=float(engine.last_grad_norm),
            count=engine.counters.skipped,
            in_a_row=engine.counters.skipped_in_a_row,
            loss_scale=engine.loss_scale,
            is_own_loss_finite=engine.losses_are_finite(),
        )
        self.skips.record(skip)

    def sync_buffers(self, search: bool = False) -> None:
        """Makes the buffers that training changes rank 0's on every rank: before every step, and
        with `search` before anything else that reads them (see buffers.py). Collective."""
        buffers.sync([engine.buffers for engine in self.trained], self.global_step, search)

    def log_own_buffers(self, what: str) -> None:
        """Logs that `what` was done with buffers that differ by rank, for engines with such."""
        for engine in self.trained:
            engine.buffers.log_own(what)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> dict[str, Stats]:
        """The losses and stats of every trained engine, by name, on one held-out batch."""
        reports: dict[str, Stats] = {}
        for engine in self.trained:
            with self._gathered(), self._turn.of(engine.name), explained(engine.name, engine.ds):
                if self.task.evaluate is not None:
                    stats = checked_stats(self.task.evaluate(engine, batch), "Task.evaluate")
                else:
                    loss, others = feed(self.task, engine, batch)
                    stats = {"loss": loss, **others}
            reports[engine.name] = stats
        return reports

    def end_step(self) -> None:
        """Ends a step of the run, once all its micro-batches have been fed."""
        self.global_step += 1
        phases.at_step(self.global_step)
        self.gradient_check.record(self.global_step, self.due(self.global_step))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises GradientError for a collective that fails because the ranks use different
        parameters."""
        try:
            yield
        except Exception as error:
            step = self.global_step + 1
            if is_lost_rank(error) and (reason := explain_failure(step, self.trained)):
                raise reason from error
            raise

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """The models whose parts may be used on some ranks only, complete. Collective."""
        with ExitStack() as stack:
            for engine in self.trained:
                stack.enter_context(engine.arrivals.gathered())
            yield

    def lend(self, name: str) -> AbstractContextManager[nn.Module]:
        """Another engine's bare model, frozen, for a loss that goes through it.

        Correct at every ZeRO stage: at stage 3 each submodule's forward and backward gather what
        they need. In an engine's turn the model stays frozen until its backward is over; outside of
        one, for the `with` block. Raises TaskError for an unknown engine, and in its own turn.
        """
        if name not in self:
            hint = did_you_mean(name, self)
            raise TaskError(
                f"there is no engine {name!r} to lend{hint}; the engines are {', '.join(self)}"
            )
        borrower, module = self._turn.name, self[name].module
        if borrower not in (None, name) and module.training and self[name].role == "train":
            self[borrower].kept_buffers.keep(self[name].buffers)
        return self._turn.lend(name, module, fetches.releasing(self[name].ds))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Every engine that keeps EMA weights with these in place. Collective; between steps."""
        with ExitStack() as stack:
            for engine in self.trained:
                stack.enter_context(engine.averaged())
            yield

    def train(self) -> None:
        """Training mode for every trained engine."""
        for engine in self.values():
            engine.train()

    def eval(self) -> None:
        """Evaluation mode for every engine."""
        for engine in self.values():
            engine.eval()

    def chosen(self, name: str | None) -> list[Engine]:
        """The trained engine of that name, or all of them."""
        return [engine for engine in self.trained if name in (None, engine.name)]

    def due(self, step: int) -> list[Engine]:
        """The engines that are trained at a step of the run."""
        return [engine for engine in self.trained if step % engine.train_every == 0]

    def set_total_steps(self, steps: int) -> None:
        """Spans every schedule over that many steps of the run."""
        for engine in self.trained:
            micro_batches = steps // engine.train_every * self.gradient_accumulation
            engine.overrides.set_total_steps(micro_batches // engine.gradient_accumulation)

    def describe_overrides(self) -> list[str]:
        """What live commands have changed, a line for each thing."""
        return [f"{e.name}: {text}" for e in self.trained for text in e.overrides]

    def groups(self) -> list[str]:
        """The parameter groups, as ENGINE/GROUP, of trained engines that have several."""
        return [
            f"{engine.name}/{group}"
            for engine in self.trained
            for group in engine.overrides.groups
            if len(engine.overrides.groups) > 1
        ]

    def await_evaluation(self, every: int) -> bool:
        """Whether the next step depends on an evaluation at this step that is missing: at the
        beginning of a run, or if the run was ended in the middle of it. `every`: as `evaluated`."""
        if not every or self.global_step % every:
            return False
        return any(engine.overrides.awaits_evaluation(self.global_step) for engine in self.trained)

    def evaluated(self, metrics: Mapping[str, float], every: int) -> bool:
        """Lets schedules react to an evaluation. Returns whether that changed their state.

        `every`: as `trainer.eval_every`. Evaluations at other steps, on command or at the end, do
        not count, so that the learning rate does not depend on them. Collective; raises ConfigError
        if a schedule's metric is missing.
        """
        if not every or self.global_step % every:
            return False
        with distributed.raise_on_all_ranks("evaluation"):
            changed = [e.overrides.evaluated(self.global_step, metrics) for e in self.trained]
        return any(changed)

    def rates(self) -> dict[str, torch.Tensor | float]:
        """Learning rates, loss scale and steps skipped so far, at the last step, under their log
        names."""
        report: dict[str, torch.Tensor | float] = {}
        for engine in self.due(self.global_step):
            rates = {**engine.last_lrs, "loss_scale": engine.loss_scale}
            report |= self.label(engine, rates | {"skipped": engine.counters.skipped})
        return report

    def step_metrics(self) -> dict[str, torch.Tensor | float]:
        """The last step's gradient norms, and metrics of optimizers and offloading, under their log
        names."""
        report: dict[str, torch.Tensor | float] = {}
        for engine in self.due(self.global_step):
            metrics = {
                "grad_norm": engine.last_grad_norm,
                **engine.optimizer_metrics(),
                **engine.offload_metrics(),
            }
            report |= self.label(engine, metrics)
        return report

    def count(self, step: int, samples: int, tokens: int) -> None:
        """Adds a step's samples and tokens, over all ranks, to the counters."""
        for engine in self.due(step):
            engine.counters.samples += samples
            engine.counters.tokens += tokens

    def label(self, engine: Engine, stats: Stats) -> dict[str, torch.Tensor | float]:
        """The stats under their log names: with the prefix `NAME/` if there are several engines."""
        if len(self) == 1:  # a key may be no text
            return {f"{key}": value for key, value in stats.items()}
        return {f"{engine.name}/{key}": value for key, value in stats.items()}

    def close(self) -> None:
        """Removes DeepSpeed and offloading from the models; the engines are unusable afterwards."""
        self._to_close.close()

    def state_dict(self) -> dict[str, Any]:
        """The run's step, and each engine's state besides DeepSpeed's."""
        engines = {engine.name: engine.state_dict() for engine in self.values()}
        return {
            "global_step": self.global_step,
            "engines": engines,
            "rollbacks": self.rollbacks,
            "finished_at": self.finished_at,
            "spikes": self.spikes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.global_step = state["global_step"]
        phases.at_step(self.global_step)
        self.rollbacks = state.get("rollbacks", 0)
        self.finished_at = state.get("finished_at", self.global_step)  # not in older checkpoints
        self.skips.clear()
        self.spikes.load_state_dict(state.get("spikes", {}))
        for name, engine in self.items():
            engine.load_state_dict(state["engines"][name])

"""Experiment trackers: W&B, MLflow and trackio, each behind the same few methods.

None of them can drop steps that it has, as TensorBoard can: a run that goes back to an earlier step
opens a new run of the tracker, in the same group. Where it is, and who may write to it, is what the
tracker's own environment variables say.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

SECONDS_TO_FINISH = 20.0
"""For what W&B has left to send when a run ends; by default it waits for ever."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it opens one of its own."""

    project: str
    group: str
    """The name of the run, over all its starts."""
    step: int
    """Where it begins."""
    config: Mapping[str, Any]
    """As in config.toml."""
    directory: Path
    """For what the tracker writes to this machine."""

    @property
    def name(self) -> str:
        """The group, with the step from which a run goes on."""
        return f"{self.group}-from-{self.step}" if self.step else self.group


class Tracker(Protocol):
    """A library. It is made, and so imported, before the run starts; all else happens on one
    thread, which may wait for a network, and every method may raise whatever the library does."""

    def open(self, run: TrackedRun) -> None:
        """Opens a new run."""
        ...

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        """Metrics, each with their `step`."""
        ...

    def log_event(self, step: int, event: str, text: str) -> None:
        """What happened after a step."""
        ...

    def log_folder(self, path: Path) -> None:
        """An artifact."""
        ...

    def close(self) -> None:
        """Ends the run, once what was logged is stored."""
        ...


class WandbTracker:
    """Weights & Biases. Steps are a metric of their own: W&B's must not decrease, and an event may
    come before the metrics of its step."""

    def __init__(self) -> None:
        self._wandb: Any = import_module("wandb")

    def open(self, run: TrackedRun) -> None:
        """Raises RuntimeError without a key, for which W&B would ask on the terminal."""
        wandb = self._wandb
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key: `wandb login`, or WANDB_MODE=offline to sync later")
        self._run = wandb.init(
            project=run.project,
            group=run.group,
            name=run.name,
            config=dict(run.config),
            dir=run.directory,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                quiet=True,
                finish_timeout=SECONDS_TO_FINISH,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            self._run.log(dict(record))

    def log_event(self, step: int, event: str, text: str) -> None:
        self._run.log({"step": step, f"event/{event}": text})

    def log_folder(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"{self._run.group}-{path.name}", type="model")
        artifact.add_dir(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Raises TimeoutError if its server does not take what is left; W&B keeps all on disk."""
        directory = Path(self._run.dir).parent
        try:
            self._run.finish()
        except TimeoutError:
            raise TimeoutError(
                f"the server has not taken all within {SECONDS_TO_FINISH:.0f} s; "
                f"`wandb sync --include-online {directory}` sends it once the server is there"
            ) from None


class MlflowTracker:
    """MLflow: by default in the folder `mlruns` of the run directory."""

    def __init__(self) -> None:
        self._entities: Any = import_module("mlflow.entities")
        self._tracking: Any = import_module("mlflow.tracking")

    def open(self, run: TrackedRun) -> None:
        uri = (
            os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / "mlruns").absolute().as_uri()
        )
        if uri.startswith("file:"):  # else MLflow wants a database
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = self._tracking.MlflowClient(uri)
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        )
        tags = {"group": run.group, "step": str(run.step)}
        opened = self._client.create_run(experiment_id, tags=tags, run_name=run.name)
        self._id, self._events = opened.info.run_id, ""
        param = self._entities.Param
        params = [param(key, str(value)[:6000]) for key, value in _flat(run.config)]
        for chunk in _chunks(params, 100):  # of a request, as the lengths are
            self._client.log_batch(self._id, params=chunk)

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        metrics = [
            self._entities.Metric(name, value, int(1000 * record["time"]), int(record["step"]))
            for record in records
            for name, value in _metrics(record)
        ]
        for chunk in _chunks(metrics, 1000):
            self._client.log_batch(self._id, metrics=chunk)

    def log_event(self, step: int, event: str, text: str) -> None:
        self._events += f"step {step}: {event}: {text}\n"
        self._client.log_text(self._id, self._events, "events.txt")

    def log_folder(self, path: Path) -> None:
        self._client.log_artifacts(self._id, str(path), path.name)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class TrackioTracker:
    """trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def __init__(self) -> None:
        self._trackio: Any = import_module("trackio")

    def open(self, run: TrackedRun) -> None:
        self._run = self._trackio.init(
            project=run.project,
            group=run.group,
            name=f"{run.name}-{time.time():.0f}",  # which another start must not have
            config=dict(run.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            metrics = {
                name: value for name, value in record.items() if name not in ("step", "time")
            }
            self._run.log(metrics, step=int(record["step"]))

    def log_event(self, step: int, event: str, text: str) -> None:
        self._run.log({f"event/{event}": text}, step=step)

    def log_folder(self, path: Path) -> None:
        self._run.log_artifact(str(path), name=f"{self._run.group}-{path.name}", type="model")

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}


def _metrics(record: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name not in ("step", "time")]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]

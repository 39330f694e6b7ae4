"""The table [metrics] of a config file."""

from typing import Literal

from pydantic import Field, field_validator

from harness.config.sections import Section, importable


class MetricsConfig(Section):
    """[metrics] where to report metrics, besides metrics.jsonl."""

    progress: bool = True
    """Show a progress bar on rank 0."""
    tensorboard: bool = False
    """Write TensorBoard events to the run directory (needs tensorboard)."""
    trackers: list[Literal["mlflow", "trackio", "wandb"]] = Field(default=[])
    """Experiment trackers to send metrics and events to (docs/trackers.md)."""
    project: str = Field(default="harness", min_length=1)
    """The trackers' project or experiment. `run.name` is the group of a run's starts in it."""
    track_exports: bool = False
    """Send exports to the trackers as artifacts."""

    @field_validator("tensorboard")
    @classmethod
    def _installed(cls, wanted: bool) -> bool:
        if wanted and not importable("tensorboard"):
            raise ValueError("tensorboard is not installed: pip install tensorboard")
        return wanted

    @field_validator("trackers")
    @classmethod
    def _trackers_installed(cls, wanted: list[str]) -> list[str]:
        for name in wanted:
            if not importable(name):
                package = {"mlflow": "mlflow-skinny"}.get(name, name)
                raise ValueError(f"{name} is not installed: pip install {package}")
        return list(dict.fromkeys(wanted))

"""An entry trained by harness: the config of a layout, the task, and what the run has left."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from harness import distributed
from harness.config import Config
from harness.config.sections import merge
from harness.errors import HarnessError
from harness.io.stored import read_tensor
from harness.run import run_in_world
from harness.task import Task
from harness.zero.reader import SavedEngine
from tests.support.helpers import ROOT, checkpoint, exported, records
from tests.zoo.data import Batches
from tests.zoo.entry import SEED, STEPS, Entry, Layout
from tests.zoo.models import ZOO
from tests.zoo.plain import Trained
from tests.zoo.refused import REFUSED

ENTRIES = ZOO | {entry.name: entry for entry, _ in REFUSED}

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def config_of(entry: Entry, layout: Layout, directory: Path) -> Config:
    """The config of a run."""
    engines = {}
    for name in entry.models():
        settings: dict[str, Any] = dict(entry.engines.get(name, {}))
        is_teacher = settings.get("role") == "teacher"
        stage = 0 if is_teacher and layout.stage in (1, 2) else layout.stage
        ds = {
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": entry.clip,
            "zero_optimization": {"stage3_param_persistence_threshold": 0} if stage == 3 else {},
        } | PRECISIONS[layout.precision]
        settings["ds_config"] = ROOT / f"ds_configs/zero{stage}.json"
        settings["ds_overrides"] = merge(ds, settings.get("ds_overrides", {}))
        if not is_teacher:
            settings["optimizer"] = {**entry.optimizer, **settings.get("optimizer", {})}
        engines[name] = settings
    stem = "-".join(map(str, (entry.name.replace(" ", "_"), *layout)))
    return Config.model_validate(
        {
            "run": {"name": stem, "dir": directory, "steps": STEPS, "seed": SEED, "timeout_s": 30},
            "task": {
                "path": "tests.zoo.under_harness",
                "args": {"entry": entry.name, "layout": list(layout)},
            },
            "engines": engines,
            "control": {"stdin": False, "socket": False},
            "metrics": {"progress": False},
        }
    )


def build(config: Config) -> Task:
    """The task of an entry."""
    entry, layout = ENTRIES[config.task.args["entry"]], Layout(*config.task.args["layout"])
    weigh: dict[str, Any] = {} if entry.weigh is None else {"weigh": entry.weigh}
    return Task(
        models=entry.models(),
        train_data=Batches(entry, layout, distributed.global_rank()),
        feeder=entry.feeder,
        **weigh,
    )


def run_all(configs: list[Config]) -> list[str]:
    """Runs them one after the other on this rank. Returns the error of each, or ""."""
    return [_run(config) for config in configs]


def _run(config: Config) -> str:
    linear = F.linear
    try:
        run_in_world(config)
    except HarnessError as error:
        if not error.on_all_ranks and distributed.world_size() > 1:
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        F.linear = linear  # ZeRO 3 leaves one that rounds the product before it adds the bias
    return ""


def result(config: Config, names: Iterable[str]) -> Trained:
    """What a run has left in its directory; of its tensors those with these names."""
    losses = []
    (only, *others) = config.engines
    for record in records(config):
        found = {k.partition("/")[0]: v for k, v in record.items() if k.endswith("/loss")}
        losses.append(found if others else {only: record["loss"]})
    directory = checkpoint(config, config.run.steps)
    tensors = {}
    for name in names:
        engine, _, path = name.partition("/")
        if engine.endswith(".ema"):
            tensors[name] = exported(config, file=f"{engine}.sft")[path]
        else:
            saved = SavedEngine(directory / engine)
            stored = saved.master(path) if path in saved.shapes else saved.weight(path)
            tensors[name] = read_tensor(stored)
    return Trained(losses, tensors)

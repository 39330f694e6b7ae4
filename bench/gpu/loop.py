"""A step of harness's loop beside one of a bare loop on DeepSpeed, with the same model, data and
optimizer: in turn in one process, until the device has done them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from bench.gpu.section import Section, config_of, median_step_s, run_section
from harness import distributed
from harness.config import Config
from harness.engine.models import engine_settings
from harness.optim.build import build_optimizer
from harness.run import run_in_world
from harness.task import load_task
from harness.trainer import Trainer
from harness.utils import to_device
from harness.zero.startup import join

SIZES = {
    "4 layers of 128, 8 x 256": {},
    "8 layers of 512, 8 x 512": {"dim": 512, "layers": 8, "heads": 8, "seq_len": 512},
}
WARM_UP = 10


def measure(section: Section) -> None:
    distributed.init(300, join)
    steps = 14 if section.small else 60 if section.quick else 200
    for name, size in SIZES.items():
        for stage in (0, 2) if not (section.small and size) else ():
            tables = {"task": {"args": size}}
            config = partial(config_of, section, stage, "bf16", steps, **tables)
            section.try_to(f"{name}, zero{stage} bf16", partial(compared, section, config))
    distributed.shutdown()


def compared(section: Section, config: Callable[[], Config]) -> dict[str, Any]:
    """Milliseconds of a step, the best of two rounds each."""
    times: dict[str, list[float]] = {"bare": [], "harness": [], "harness, as step_time_s": []}
    for _ in range(1 if section.small else 2):
        times["bare"].append(bare(section, config()))
        made = config()
        times["harness"].append(ours(section, made))
        times["harness, as step_time_s"].append(median_step_s(made) or 0.0)
    found: dict[str, Any] = {way: round(1e3 * min(seconds), 3) for way, seconds in times.items()}
    return found | {"x bare": round(found["harness"] / found["bare"], 3)}


def ours(section: Section, config: Config) -> float:
    """Seconds of a step, from WARM_UP to the last."""
    marks: list[float] = []
    plain = Trainer.step

    def step(self: Trainer) -> None:
        if self.engines.global_step in (WARM_UP, config.run.steps - 1):
            section.settle()
            marks.append(time.perf_counter())
        plain(self)

    Trainer.step = step
    try:
        run_in_world(config)
    finally:
        Trainer.step = plain
    return (marks[1] - marks[0]) / (config.run.steps - 1 - WARM_UP)


def bare(section: Section, config: Config) -> float:
    """The same by DeepSpeed alone, its timer off as well."""
    import deepspeed

    task = load_task(config)
    model: Any = task.models["lm"]
    model = model if isinstance(model, nn.Module) else model()
    settings = config.engines["lm"]
    assert settings.optimizer is not None
    engine: Any = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, settings.optimizer),
        config=engine_settings(settings, config.data.micro_batch_size),
    )[0]

    def batches() -> Any:
        while True:
            yield from DataLoader(
                task.train_data,
                config.data.micro_batch_size,
                shuffle=True,
                drop_last=True,
                collate_fn=task.collate,
                pin_memory=section.is_on_gpu,
            )

    source, times = batches(), []
    for number in range(config.run.steps):
        if number in (WARM_UP, config.run.steps - 1):
            section.settle()
            times.append(time.perf_counter())
        bytes_BT = to_device(next(source), section.device).long()
        logits = engine(bytes_BT[:, :-1])
        targets = bytes_BT[:, 1:]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        (logits.detach().argmax(-1) == targets).float().mean()
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return (times[1] - times[0]) / (config.run.steps - 1 - WARM_UP)


if __name__ == "__main__":
    run_section(measure)

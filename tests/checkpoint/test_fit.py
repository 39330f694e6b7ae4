"""A run that resumes with another model or other data: `run.resume_changed = "fit"`."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import Callback, distributed
from harness.checkpoint import resume
from harness.checkpoint.commit import write_files
from harness.config import Config
from harness.data.sampler import RandomSampler
from harness.io.stored import materialize, read_tensor
from harness.run import run_in_world
from harness.wrapper import freeze
from harness.zero.reader import SavedEngine
from tests.support.helpers import (
    Pools,
    checkpoint,
    error_of,
    exported,
    log_text,
    losses,
    tiny_config,
)
from tests.support.quick import quick
from tests.tasks.fit_task import Notes, build

TASK = str(Path(__file__).parents[1] / "tasks/fit_task.py")
BATCH, SAVED, STEPS = 8, 4, 8


def config_of(
    directory: Path,
    stage: int,
    args: Any = None,
    steps: int = SAVED,
    ranks: int = 2,
    engine: Any = None,
    **run: Any,
) -> Config:
    return tiny_config(
        directory,
        stage,
        run={"steps": steps} | run,
        task={"path": TASK, "args": args or {}},
        engines={"net": engine or {}},
        data={"micro_batch_size": BATCH // ranks},
    )


def fit(directory: Path, stage: int, args: Any = None, **others: Any) -> Config:
    return config_of(directory, stage, args, STEPS, resume_changed="fit", **others)


class Plain:
    """The same training in a plain loop, with AdamW and clipping to 1 as in the tiny run."""

    def __init__(self, config: Config):
        distributed.seed_everything(config.run.seed)
        self.model = build(config).models["net"]
        assert isinstance(self.model, nn.Module)
        self.losses: list[float] = []
        freeze(self.model, config.engines["net"].frozen)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    def train(self, batches: Iterator[Any], steps: int) -> None:
        for _ in range(steps):
            points, classes = next(batches)
            self.model(points, classes)
            loss: Any = self.model.loss
            self.optimizer.zero_grad()
            loss.backward()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.losses.append(loss.item())

    def take_over(self, other: "Plain") -> None:
        """What fits of another model: its entries, moments, and number of steps."""
        theirs = dict(other.model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                entry = other.model.state_dict().get(name)
                if entry is not None and entry.shape == tensor.shape:
                    tensor.copy_(entry)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(float(SAVED))
            old = theirs.get(name)
            if old is not None and old.shape == parameter.shape and old in other.optimizer.state:
                state |= other.optimizer.state[old]
            self.optimizer.state[parameter] = state


def batches(samples: int = 96) -> Iterator[tuple[Tensor, Tensor]]:
    data, order = Notes(samples, None), RandomSampler(samples).stream()
    while True:
        items = [data[next(order)] for _ in range(BATCH)]
        yield torch.stack([p for p, _ in items]), torch.stack([c for _, c in items])


BEFORE = {"engine": {"frozen": ["first"]}, "args": {"layers": 1}}
AFTER = {"engine": {"frozen": ["layers.0"]}, "args": {"layers": 2, "classes": 5}}
"""A layer more, another one frozen, one that is not any more, and a resized head."""


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    quick(
        [(stage, *pair) for stage in range(4) for pair in [(BEFORE, AFTER), (AFTER, BEFORE)]],
        (2, AFTER, BEFORE),
        (3, BEFORE, AFTER),
    ),
)
def test_what_fits_is_kept_as_a_plain_loop_would(
    pools: Pools, tmp_path: Path, stage: int, before: Any, after: Any
) -> None:
    pools(2).run(run_in_world, config_of(tmp_path, stage, **before))
    config = fit(tmp_path, stage, **after)
    pools(2).run(run_in_world, config)

    data, plain = batches(), Plain(config_of(tmp_path, stage, **before))
    plain.train(data, SAVED)
    changed = Plain(config)
    changed.take_over(plain)
    changed.train(data, STEPS - SAVED)
    expected = plain.losses + changed.losses
    assert losses(config) == pytest.approx(expected, abs=2e-6)
    weights = exported(config)
    for name, tensor in changed.model.state_dict().items():
        assert torch.allclose(weights[name], tensor, atol=1e-5), name


def test_what_does_not_fit_is_refused_with_a_hint_or_listed(pools: Pools, tmp_path: Path) -> None:
    before = {"events": str(tmp_path / "events")}
    after = before | {"classes": 5, "samples": 128}
    pools(1).run(run_in_world, config_of(tmp_path, 0, before, ranks=1))
    refused: list[str] = []
    for args in (after, before | {"samples": 128}):
        refused += pools(1).run(error_of, config_of(tmp_path, 0, args, STEPS, ranks=1))
    assert "'head.weight' has the shape (5, 8) in this run, and (3, 8) in the che" in refused[0]
    assert "length is 96 in the state, but 128 in the sampler" in refused[1]
    assert all("run.resume_changed = 'fit'" in text for text in refused)

    config = fit(tmp_path, 0, after, ranks=1)
    pools(1).run(run_in_world, config)
    (event,) = (e for e in (tmp_path / "events").read_text().split("\n\n") if "resume" in e)
    for text in (event, log_text(config)):
        assert "kept (7): calls, first.weight, first.bias, " in text
        assert "reset to the task's own values (2): head.weight ((5, 8) in this run, (3, 8)" in text
        assert "the data has 128 samples, and had 96: epoch 0 ends with the 96 samples" in text
    # It is then a checkpoint like any other.
    again = config_of(tmp_path, 0, after, STEPS + 1, ranks=1)
    assert pools(1).run(error_of, again) == [""]


def unwell_once(config: Config) -> list[tuple[int, float]]:
    """A run whose loss is once not a number, at step 8: the losses as they are known, by step."""
    known: list[tuple[int, float]] = []
    fed: list[int] = []

    class Known(Callback):
        def on_step(self, run: Any, metrics: Any) -> None:
            known.append((metrics["step"], metrics["loss"]))

    def feed(engine: Any, batch: Any) -> tuple[Tensor, Any]:
        engine(*batch)
        fed.append(engine.counters.global_step + 1)
        is_bad = fed[-1] == 8 and fed.count(8) == 1
        return engine.module.loss * (torch.nan if is_bad else 1.0), {}

    def unwell(given: Config) -> Any:
        return replace(build(given), feeder=feed, callbacks=[Known()])

    assert run_in_world(config, build=unwell) == 0
    return known


def test_a_rollback_after_a_change_returns_to_the_new_model(pools: Pools, tmp_path: Path) -> None:
    """All that has changed since the resume is restored, too: the new layer and head."""
    pools(1).run(run_in_world, config_of(tmp_path, 0, ranks=1))
    config = fit(tmp_path, 0, {"layers": 2, "classes": 5, "samples": 128}, ranks=1)
    health = config.health.model_copy(update={"nonfinite": "rollback"})
    (known,) = pools(1).run(unwell_once, config.model_copy(update={"health": health}))
    before, again = known[:-4], known[-4:]
    assert [step for step, _ in again] == [5, 6, 7, 8]
    assert before and before == again[: len(before)]
    assert {"step-00000004", "step-00000004-fitted"} <= set(saved_names(config))


def saved_names(config: Config) -> list[str]:
    return [path.name for path in (config.run_dir / "checkpoints").iterdir()]


def test_no_sample_of_data_that_grew_is_lost(pools: Pools, tmp_path: Path) -> None:
    """20 samples, of which 16 are drawn; then 30: 4 are left of the epoch."""
    notes = tmp_path / "notes"
    args = {"samples": 20, "notes": str(notes)}
    pools(2).run(run_in_world, config_of(tmp_path, 0, args, steps=2))
    pools(2).run(run_in_world, fit(tmp_path, 0, args | {"samples": 30}))
    drawn = Counter(map(int, notes.read_text().split()))
    assert sum(drawn.values()) == 64  # 20 + 30 + 14 of the next epoch
    assert all(drawn[index] >= 1 + (index < 20) for index in range(30)), drawn


OPTIMIZERS: dict[str, Any] = {
    "apollo": {"optimizer": {"name": "apollo", "lr": 1e-2, "rank": 4}},
    "apollo svd": {"optimizer": {"name": "apollo", "lr": 1e-2, "rank": 4, "projection": "svd"}},
    "muon": {"optimizer": {"name": "muon", "lr": 1e-2}},
    "soap": {"optimizer": {"name": "soap", "lr": 1e-2}},
    "ema": {"ema_decay": 0.5},
}


@pytest.mark.parametrize(
    ("name", "stage"),
    quick(
        [(name, stage) for name in OPTIMIZERS for stage in (1, 2, 3)],
        ("apollo", 3),
    ),
)
def test_every_stage_fits_alike(pools: Pools, tmp_path: Path, name: str, stage: int) -> None:
    """Saved on 1 rank at stage 0, and resumed there and on 2 ranks, with another model."""
    engine, change = OPTIMIZERS[name], {"layers": 2, "classes": 5}
    saved = config_of(tmp_path / "saved", 0, ranks=1, engine=engine)
    pools(1).run(run_in_world, saved)
    found = []
    for ranks, at in ((1, 0), (2, stage)):
        config = fit(tmp_path / f"{ranks}", at, change, ranks=ranks, engine=engine)
        shutil.copytree(saved.run_dir, config.run_dir)
        pools(ranks).run(run_in_world, config)
        found.append((losses(config), exported(config)))
    (expected, weights), (got, others) = found
    assert got == pytest.approx(expected, abs=2e-5)
    for key, weight in weights.items():
        assert torch.allclose(others[key], weight, atol=1e-4), key


def resumed(config: Config) -> None:
    """A run that writes what it has resumed into `resumed/`, before its next step."""
    restore = resume.restore

    def and_dump(directory: Path, engines: Any, *others: Any) -> str:
        text = restore(directory, engines, *others)
        write_files(config.run_dir / "resumed", engines["net"].collect())
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "restore", and_dump)
        (config.run_dir / "resumed").mkdir(exist_ok=True)
        run_in_world(config)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3), (4, 2)), ((2, 2), (1, 3)), ((1, 0), (2, 1))],
)
@pytest.mark.slow
def test_masters_of_bf16_are_kept_to_the_bit(
    pools: Pools, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    engine = {"ds_overrides": {"bf16": {"enabled": True}}, "frozen": ["first"]}
    saved = config_of(tmp_path, before[1], ranks=before[0], engine=engine)
    config = fit(
        tmp_path,
        after[1],
        {"layers": 2},
        ranks=after[0],
        engine=engine | {"frozen": ["hidden"]},
    )
    pools(before[0]).run(run_in_world, saved)
    pools(after[0]).run(resumed, config)
    old = SavedEngine(checkpoint(saved, SAVED) / "net")
    new = SavedEngine(config.run_dir / "resumed/net")
    distributed.seed_everything(0)
    built: Any = build(config).models["net"]
    for name in new.shapes:
        master = read_tensor(new.master(name))
        if name.startswith("layers.1"):
            new_weight = built.get_parameter(name).bfloat16().float()  # as in a new run
            assert torch.equal(master, new_weight), name
        elif name.startswith("first"):
            assert torch.equal(master, read_tensor(old.weight(name)).float()), name
        else:
            assert torch.equal(master, read_tensor(old.master(name))), name
    assert torch.equal(
        read_tensor(new.weight("hidden.weight")).bfloat16(),
        read_tensor(old.master("hidden.weight")).bfloat16(),
    )


@pytest.mark.parametrize("name", quick(["apollo", "soap"], "soap"))
def test_the_state_of_matrices_is_kept_by_name(pools: Pools, tmp_path: Path, name: str) -> None:
    engine = OPTIMIZERS[name]
    saved = config_of(tmp_path, 0, ranks=1, engine=engine)
    config = fit(tmp_path, 0, {"layers": 2, "hidden": 12}, ranks=1, engine=engine)
    pools(1).run(run_in_world, saved)
    pools(1).run(resumed, config)
    before = states(checkpoint(saved, SAVED) / "net")
    after = states(config.run_dir / "resumed/net")
    for key in ("first.weight", "layers.0.weight", "first.bias"):
        assert all(torch.equal(after[key][k], v) for k, v in before[key].items()), key
    for key, alike in (("layers.1.weight", "first.weight"), ("hidden.bias", "first.bias")):
        assert after[key]["step"] == after[alike]["step"]
        assert not after[key]["exp_avg"].any() and not after[key]["exp_avg_sq"].any()


def states(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter at stage 0; of numbers as tensors."""
    saved = SavedEngine(directory)
    return {
        flat.segments[0].name: {
            key: torch.as_tensor(value) for key, value in materialize(flat.state).items()
        }
        for flat in saved.flats[0]
    }


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    quick(
        [
            (stage, *pair)
            for stage in range(4)
            for pair in [(None, 4), (4, None), (4, 2), ("wide", 4)]
        ],
        (3, None, 4),
    ),
)
def test_adapters_come_and_go_next_to_the_weights(
    pools: Pools, tmp_path: Path, stage: int, before: Any, after: Any
) -> None:
    pytest.importorskip("peft")
    pools(2).run(run_in_world, config_of(tmp_path, stage, engine=lora(before)))
    saved = SavedEngine(checkpoint(config_of(tmp_path, stage), SAVED) / "net")
    config = fit(tmp_path, stage, engine=lora(after))
    pools(2).run(resumed, config)
    found = SavedEngine(config.run_dir / "resumed/net")
    for layer in ("first", "hidden", "head"):
        for key in ("weight", "bias"):
            old, new = (weight_in(engine, layer, key) for engine in (saved, found))
            assert torch.equal(old, new), (layer, key)
    adapters = [name for name in found.weights if "lora_" in name]
    was_kept = before == "wide"
    for name in adapters:
        assert found.weight(name).shape[0 if "lora_A" in name else 1] == after
        if "lora_B" in name:
            assert bool(read_tensor(found.weight(name)).any()) == was_kept, name
    assert bool(adapters) == (after is not None)


def lora(kind: Any) -> dict[str, Any]:
    if kind is None:
        return {}
    targets = "first|hidden|head" if kind == "wide" else "first|hidden"
    return {"lora": {"targets": targets, "rank": 4 if kind == "wide" else kind}}


def weight_in(engine: SavedEngine, layer: str, key: str) -> Tensor:
    adapted = f"{layer}.base_layer.{key}"
    return read_tensor(engine.weight(adapted if adapted in engine.weights else f"{layer}.{key}"))

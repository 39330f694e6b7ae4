"""Commands to complete runs: executed by all ranks after the same step, each answered once."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import distributed
from harness.checkpoint.snapshot import Snapshots
from harness.config import Config
from harness.control import signals
from harness.control.bus import Bus
from harness.control.client import Client
from harness.control.commands import Save, SetLr
from harness.control.grammar import Grammar
from harness.control.signals import Signals
from harness.control.wire import SOCKET
from harness.errors import HarnessError
from harness.io import load
from harness.run import run_in_world
from harness.testing.faults import fail_at, io_error
from harness.testing.pool import RankError, RankPool
from harness.trainer import Trainer
from tests.support.commanded import History, commanded, recorded
from tests.support.helpers import ROOT, records, tiny_config
from tests.support.quick import quick

STAGES = [0, 1, 2, 3]


def stdin_config(directory: Path, stage: int = 0, **overrides: Any) -> Config:
    return tiny_config(directory, stage, control={"stdin": True}, **overrides)


def audit(config: Config) -> list[dict[str, Any]]:
    lines = (config.run_dir / "commands.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ends(config: Config) -> list[tuple[str, str, str]]:
    """`(command, done or failed or rejected, result)`, in the order in which they ended."""
    return [
        (record["text"], record["state"], record["result"])
        for record in audit(config)
        if record["state"] not in ("queued", "agreed")
    ]


def poll_often(lines: list[str], polls: int) -> list[list[Any]]:
    bus = Bus(Grammar(["net"], {}), Signals(), lambda query: (str(query), None), None)
    vector = distributed.StepVector()
    vector.add(bus)
    received = []
    for number in range(polls):
        if distributed.is_global_leader() and number < len(lines):
            bus.submit(lines[number], "test", "", lambda answer: None)
        vector.exchange()
        received.append([ticket.command for ticket in bus.poll(number)])
        time.sleep(0.002)
    vector.wait()
    bus.close()
    return received


def test_all_ranks_receive_the_same_commands_at_the_same_poll(three_ranks: RankPool) -> None:
    lines = ["save", "nonsense", "lr 0.5", "status", "lr x"]
    seen = three_ranks.run(poll_often, lines, 30)
    assert seen[0] == seen[1] == seen[2]
    assert [command for poll in seen[0] for command in poll] == [Save(), SetLr(0.5)]


def test_a_run_executes_in_order_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, run={"steps": 5000})
    text = "lr 1e-4\nlr bad\nsave\nstatus\neval\nexport pt\nquit\nsave as late\n"
    found = two_ranks.run(commanded, config, text)
    assert found[0][0] == found[1][0]
    assert [(front, text) for _, front, text in found[0][0]] == [
        ("stdin", text) for text in ("lr 1e-4", "save", "eval", "export pt", "quit")
    ]
    assert "'lr bad': RATE: a learning rate is" in found[0][1] and "lr bad" not in found[1][1]
    assert "status: step 0 of 5000, training" in found[0][1]
    last = records(config)[-1]["step"]
    assert (config.run_dir / f"checkpoints/step-{last:08d}/manifest.json").exists()
    exports = config.run_dir / f"exports/step-{last:08d}"
    assert (exports / "net.sft").exists()
    assert ends(config)[0][0] == "lr bad"
    assert {text: state for text, state, _ in ends(config)} == {
        "lr bad": "rejected",
        "lr 1e-4": "done",
        "save": "done",
        "eval": "done",
        "export pt": "done",
        "quit": "done",
        "save as late": "failed",
    }
    config = tiny_config(tmp_path, run={"steps": last + 3})
    two_ranks.run(run_in_world, config)
    assert [record["lr"] for record in records(config)][-3:] == [1e-4] * 3


def test_quit_unsaved_leaves_nothing_and_eval_quit_evaluates(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    unsaved = stdin_config(tmp_path / "unsaved", run={"steps": 5000})
    two_ranks.run(commanded, unsaved, "quit!\n")
    assert not (unsaved.run_dir / "checkpoints").exists()
    assert not (unsaved.run_dir / "exports").exists()
    evaluated = stdin_config(tmp_path / "evaluated", run={"steps": 5000})
    two_ranks.run(commanded, evaluated, "eval_quit\n")
    assert len(records(evaluated, "eval/")) == 1
    assert list((evaluated.run_dir / "checkpoints").glob("step-*"))


def scheduled(stage: int, **overrides: Any) -> dict[str, Any]:
    engine: dict[str, Any] = {"scheduler": {"name": "cosine", "warmup": 3}}
    return {"engines": {"net": engine}} | overrides


def cosine(step: int, steps: int, warmup: int = 3) -> float:
    """The schedule's learning rate of a step, counted from 1, by its formula."""
    warm = min(1.0, step / warmup)
    done = min(1.0, max(0.0, (step - 1 - warmup) / (steps - warmup)))
    return 1e-2 * (warm * ((1 + math.cos(math.pi * done)) / 2))


@pytest.mark.parametrize("stage", quick(STAGES, 0, 3))
def test_a_halved_rate_outlives_kill_9_and_auto_returns_to_the_schedule(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    undisturbed = tiny_config(tmp_path / "plain", stage, **scheduled(stage), run={"steps": 12})
    two_ranks.run(run_in_world, undisturbed)
    plain = [record["lr"] for record in records(undisturbed)]
    assert plain == pytest.approx([cosine(step, 12) for step in range(1, 13)], rel=1e-8)
    config = stdin_config(tmp_path, stage, **scheduled(stage), run={"steps": 12})
    text = "lr x0.5@4\nsave@6\nlr auto@9\n"
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(killed_at_step_8, config, text)
    two_ranks.run(run_in_world, config)
    rates = [record["lr"] for record in records(config)]
    assert rates[:4] + rates[9:] == plain[:4] + plain[9:]
    assert rates[4:9] == pytest.approx([lr * 0.5 for lr in plain[4:9]], rel=1e-8)
    log = (config.run_dir / "log.txt").read_text()
    assert "step-00000006" in log and "restored live change: net: lr x0.5" in log
    assert "restored live change: event 3: lr auto@9" in log


def killed_at_step_8(config: Config, text: str) -> None:
    """A commanded run that dies after its eighth step."""
    step = Trainer.step

    def and_die(self: Trainer) -> None:
        step(self)
        if self.engines.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", and_die)
        commanded(config, text)


def test_a_run_with_events_resumes_to_the_bit(two_ranks: RankPool, tmp_path: Path) -> None:
    """An event saves amid others of the same step: the resumed run executes those after it."""
    text = "lr x0.5@4\nsave@4\nlr x0.5@4\nclip 0.1@4\nevent lr x0.9 every 2\n"
    uninterrupted = stdin_config(tmp_path / "uninterrupted", 2, run={"steps": 9})
    two_ranks.run(commanded, uninterrupted, text)
    resumed = stdin_config(tmp_path / "resumed", 2, run={"steps": 9})
    with pytest.raises(RankError, match="died with exit code -9"):
        two_ranks.run(killed_at_step_8, resumed, text)
    names = [path.name for path in (resumed.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["latest", "step-00000004"]
    two_ranks.run(run_in_world, resumed)
    keys = ("lr", "loss", "grad_norm")
    numbers = [
        [[r[key] for key in keys] for r in records(config)] for config in (resumed, uninterrupted)
    ]
    assert numbers[0] == numbers[1]
    assert numbers[0][8][0] == pytest.approx(1e-2 * 0.25 * 0.9**4)


def test_a_held_rate_is_scaled_and_steps_move_the_schedules_end(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = stdin_config(tmp_path, 1, **scheduled(1), run={"steps": 8})
    text = "lr 1e-3@2\nlr x0.5@3\nlr auto@4\nsteps 12@5\n"
    two_ranks.run(commanded, config, text)
    rates = [record["lr"] for record in records(config)]
    expected = [cosine(1, 8), cosine(2, 8), 1e-3, 5e-4, cosine(5, 8)]
    expected += [cosine(step, 12) for step in range(6, 13)]
    assert rates == pytest.approx(expected, rel=1e-8)
    two_ranks.run(run_in_world, config)  # the longer run is the complete one, also after a resume
    assert len(records(config)) == 12
    longer = tiny_config(tmp_path, 1, **scheduled(1), run={"steps": 14})
    two_ranks.run(run_in_world, longer)  # the config takes precedence
    assert len(records(config)) == 14
    log = (config.run_dir / "log.txt").read_text()
    shorter, now = cosine(13, 12), cosine(13, 14)
    assert f"engine net: lr {shorter:.4g} in the checkpoint, {now:.4g} from here on: the " in log
    assert log.count("from here on") == 1 and "(run.steps = 14)" in log


@pytest.mark.parametrize("stage", quick(STAGES, 1, 3))
def test_clipping_can_be_changed_and_outlives_a_resume(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """SGD moves the weights by lr * clip: the distance shows the norm that was used."""
    sgd = {"net": {"optimizer": {"name": "torch.optim:SGD", "lr": 0.5, "weight_decay": 0.0}}}
    config = stdin_config(tmp_path, stage, engines=sgd, run={"steps": 4})
    two_ranks.run(commanded, config, "clip 1e-2@2\nexport@2\nexport@3\nsave@3\n")
    longer = tiny_config(tmp_path, stage, engines=sgd, run={"steps": 5})
    two_ranks.run(run_in_world, longer)
    assert all(record["grad_norm"] > 3e-2 for record in records(config))  # it is pre-clip
    for before, after in ((2, 3), (3, 4), (4, 5)):
        assert moved(config, before, after) == pytest.approx(0.5 * 1e-2, rel=1e-3)
    clip = {"net": {**sgd["net"], "ds_overrides": {"gradient_clipping": 2e-2}}}
    changed = tiny_config(tmp_path, stage, engines=clip, run={"steps": 6})
    two_ranks.run(run_in_world, changed)  # the config, changed since, takes precedence
    assert moved(config, 5, 6) == pytest.approx(0.5 * 2e-2, rel=1e-3)


def moved(config: Config, before: int, after: int) -> float:
    """How far two exports are apart; tied weights count once."""
    one, other = (
        load(config.run_dir / f"exports/step-{step:08d}/net.sft") for step in (before, after)
    )
    parameters = {one[name].data_ptr(): name for name in one if name != "scale"}.values()
    squares = sum(float((one[n].double() - other[n].double()).square().sum()) for n in parameters)
    return math.sqrt(squares)


def test_a_paused_run_executes_commands_but_no_step(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, run={"steps": 5})
    text = "pause\neval\nlr 0.125\nsave as here\nsteps 4\nprofile 1\nresume\nresume\n"
    found = two_ranks.run(commanded, config, text)
    assert found[0][0] == found[1][0]
    (step,) = {step for step, _, text in found[0][0]}
    assert [record["lr"] for record in records(config)][step:] == [0.125] * (4 - step)
    results = {text: (state, result) for text, state, result in ends(config)}
    path = config.run_dir / f"checkpoints/step-{step:08d}-here/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["pinned"] == "here" and "eval/loss" in manifest["metrics"]
    assert results["profile 1"] == ("done", f"traced {config.run_dir}/traces/step-{step + 1:08d}")
    assert ("resume", "failed", "the run is not paused") in ends(config)
    for rank in range(2):
        trace = config.run_dir / f"traces/step-{step + 1:08d}/rank-{rank:05d}.json"
        assert json.loads(trace.read_text())["traceEvents"]


def test_settings_change_live_and_outlive_a_resume(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, run={"steps": 4}, trainer={"save_every": 100})
    text = "set trainer.save_every 2\nset checkpoint.keep_last 1\nset trainer.eval_every 3\n"
    two_ranks.run(commanded, config, text)
    names = [path.name for path in (config.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["best", "latest", "step-00000004"]
    assert [record["step"] for record in records(config, "eval/")] == [3, 4]
    longer = tiny_config(tmp_path, run={"steps": 7}, trainer={"save_every": 100})
    two_ranks.run(run_in_world, longer)
    log = (config.run_dir / "log.txt").read_text()
    assert "saved " + str(config.run_dir / "checkpoints/step-00000006") in log
    assert "restored live change: trainer.save_every = 2 (config: 100)" in log


def test_an_invalid_setting_is_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, task={"args": {"eval_samples": 0}})
    text = "set trainer.eval_every 2\nset checkpoint.keep_best 1\nsteps 1\nloss_scale 2\nsave@1\n"
    two_ranks.run(commanded, config, text)
    results = {text: (state, result) for text, state, result in ends(config)}
    assert {state for text, (state, _) in results.items() if "save" not in text} == {"failed"}
    assert "the task has no eval_data" in results["set trainer.eval_every 2"][1]
    assert "need keep_last" in results["set checkpoint.keep_best 1"][1]
    assert "the run is already at step 1" in results["steps 1"][1]
    assert "computes in fp32" in results["loss_scale 2"][1]
    assert len(records(config)) == 6


def test_what_fails_on_one_rank_has_failed_and_the_run_continues(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    task = {"path": str(ROOT / "tests/tasks/commanded_task.py")}
    config = stdin_config(tmp_path, task=task, run={"steps": 9}, trainer={"save_at_end": False})
    text = "greet you\nnumber\nfail 1\nfail 0\ngreet\nset task.args {}\neval@2\nsave@3\nsave@4\n"
    found = two_ranks.run(failing, config, text)
    assert found[0] == found[1]
    results = {text: (state, result) for text, state, result in ends(config)}
    assert results["greet you"] == ("done", "hello you, from net")
    assert results["number"] == ("done", "tensor([1.])")
    for rank in (0, 1):
        state, result = results[f"fail {rank}"]
        assert state == "failed" and f"rank {rank}: 'fail {rank}':" in result
        assert f"RuntimeError: rank {rank} has failed" in result
    assert results["greet"][0] == "failed" and "missing 1 required" in results["greet"][1]
    assert results["set task.args {}"][0] == "rejected"
    assert results["eval"][0] == "failed" and "rank 1: evaluation:" in results["eval"][1]
    saves = [(state, result) for text, state, result in ends(config) if text == "save"]
    assert [state for state, _ in saves] == ["failed", "done"]
    assert "rank 1: OSError: [Errno 5] Input/output error" in saves[0][1]
    assert len(records(config)) == 9
    # The evaluation at the end fails as well, and ends the run; no step is lost.
    assert "saving a checkpoint before the run ends" in (config.run_dir / "log.txt").read_text()
    names = [path.name for path in (config.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["latest", "step-00000004", "step-00000009"]


def failing(config: Config, text: str) -> History:
    with (
        recorded() as history,
        fail_at("file", step=3, rank=1, kind=io_error),
        pytest.raises(HarnessError, match="it cannot be read"),
    ):
        commanded(config, text)
    return history


def test_what_fails_on_one_rank_alone_hangs_no_other(two_ranks: RankPool, tmp_path: Path) -> None:
    """Rank 0 has no room for the weights, rank 1 none for a copy, and no profiler."""
    config = stdin_config(
        tmp_path,
        run={"steps": 12},
        checkpoint={"background": True},
        trainer={"export_at_end": False},
    )
    found = two_ranks.run(without_room, config, "export\nsave as one\nprofile 1\nlr 0.5\n")
    assert found[0] == found[1]
    results = {text: (state, result) for text, state, result in ends(config)}
    for command in ("export", "save as one", "profile 1"):
        assert results[command][0] == "failed", results
    assert "rank 0: cannot gather engine 'net'" in results["export"][1]
    assert "rank 1: cannot save" in results["save as one"][1]
    assert "MemoryError: no room" in results["save as one"][1]
    assert results["lr 0.5"][0] == "done"
    assert len(records(config)) == 12
    assert not list(config.run_dir.glob("checkpoints/*one*"))


def without_room(config: Config, text: str) -> History:
    """A commanded run whose rank 0 cannot export, and whose rank 1 cannot save once."""
    rank, take, exported = distributed.global_rank(), Snapshots.take, Trainer.export
    tried: list[Any] = []

    def export(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(torch.Tensor, "clone", no_room)
            return exported(*arguments)

    def no_room(*_: Any) -> Any:
        raise MemoryError("no room")

    def once(self: Snapshots, tree: Any) -> Any:
        tried.append(tree)
        return no_room() if rank == 1 and len(tried) == 1 else take(self, tree)

    with recorded() as history, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots, "take", once)
        patch.setattr(Trainer, "export", export)
        if rank == 1:
            patch.setattr("harness.metrics.trace.profile", no_room)
        commanded(config, text)
    return history


def test_a_named_checkpoint_is_never_overwritten(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, run={"steps": 90}, checkpoint={"keep_last": 1})
    text = "pause\nsave as one\nsave as two\nlr x0.5\nquit\n"
    two_ranks.run(commanded, config, text)
    (end,) = (config.run_dir / "checkpoints").glob("step-????????")
    names = {None: end, **{n: end.with_name(f"{end.name}-{n}") for n in ("one", "two")}}
    for name, path in names.items():
        assert json.loads((path / "manifest.json").read_text())["pinned"] == name
    longer = tiny_config(tmp_path / "other", run={"steps": 92, "resume": str(names["one"])})
    two_ranks.run(run_in_world, longer)
    assert records(longer)[-1]["lr"] == 1e-2  # as it was before
    two_ranks.run(run_in_world, tiny_config(tmp_path, run={"steps": 92}))
    assert records(config)[-1]["lr"] == 5e-3


def test_commands_at_the_end_of_a_run(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path / "a", run={"steps": 6}, task={"args": {"eval_samples": 0}})
    two_ranks.run(commanded, config, "eval\npause@6\n")
    assert ("eval", "failed", "the task has no eval_data") in ends(config)
    assert ("pause", "failed", "this was the last step") in ends(config)
    config = stdin_config(tmp_path / "b", run={"steps": 60})
    two_ranks.run(commanded, config, "quit!@5\nsave as x@5\n")
    assert len(records(config)) == 5
    assert not (config.run_dir / "checkpoints").exists()


def test_a_second_save_in_the_background_is_answered_with_the_first(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = stdin_config(tmp_path, run={"steps": 60}, checkpoint={"background": True})
    two_ranks.run(commanded, config, "pause\nsave\nsave\nresume\n")
    saves = [result for text, state, result in ends(config) if text == "save" and state == "done"]
    assert saves[0].startswith("saved /") and saves[1] in (saves[0], "already saved")


def test_a_background_save_is_answered_when_complete(two_ranks: RankPool, tmp_path: Path) -> None:
    config = stdin_config(tmp_path, run={"steps": 300}, checkpoint={"background": True})
    two_ranks.run(commanded, config, "save as one\nsave as two@40\n")
    events = [record for record in audit(config) if record["text"] == "save as one"]
    assert [record["state"] for record in events] == ["queued", "agreed", "done"]
    assert events[1]["step"] <= events[2]["step"]
    assert ends(config)[-1][:2] == ("save as two", "done")


def test_a_signal_ends_an_evaluation(two_ranks: RankPool, tmp_path: Path) -> None:
    """A signal to one rank alone, during a long evaluation: both stop, saved, and soon."""
    config = tiny_config(tmp_path, task={"args": {"eval_samples": 40_000}}, run={"steps": 5000})
    codes = two_ranks.run(signalled_in_evaluation, config)
    assert codes == [128 + signal.SIGTERM] * 2
    assert records(config, "eval/") == []
    last = records(config)[-1]["step"]
    assert (config.run_dir / f"checkpoints/step-{last:08d}/manifest.json").exists()
    assert not (config.run_dir / "exports").exists()
    assert ends(config) == [("SIGTERM", "done", "ending the run")]


def signalled_in_evaluation(config: Config) -> int:
    step = Trainer.step

    def and_evaluate(self: Trainer) -> None:
        step(self)
        if self.engines.global_step == 3:
            if distributed.global_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert self.evaluate() is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", and_evaluate)
        return run_in_world(config)


def test_the_launchers_death_is_not_a_second_stop(two_ranks: RankPool) -> None:
    assert two_ranks.run(stopped_and_orphaned) == [[(signal.SIGTERM, False), (0, False)]] * 2


def stopped_and_orphaned() -> list[tuple[int, bool]]:
    """Ctrl-C and the like reach the launcher as well: it dies, and this rank is still saving."""
    signals = Signals()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.control.signals.is_orphaned", lambda: True)
        patch.setattr("harness.control.signals.SECONDS_BETWEEN_CHECKS", 0.1)
        patch.setattr("harness.control.signals.SECONDS_OF_ONE_STOP", 0.2)
        with signals.installed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            found = [signals.take()]
            time.sleep(0.6)
            return [*found, signals.take()]


def test_a_signal_to_a_forked_process_does_not_reach_the_rank(two_ranks: RankPool) -> None:
    assert two_ranks.run(terminate_a_fork) == [(-signal.SIGTERM, (0, False))] * 2


def terminate_a_fork() -> tuple[int | None, tuple[int, bool]]:
    signals = Signals()
    with signals.installed():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(20)
        time.sleep(0.2)
        return process.exitcode, signals.take()


def test_signals_save_and_end_a_run(two_ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"steps": 5000}, trainer={"save_at_end": False})
    codes = two_ranks.run(signalled, config)
    assert codes == [130, 130]
    assert [text for text, _, _ in ends(config)] == ["SIGUSR1", "SIGINT"]
    assert len(list((config.run_dir / "checkpoints").glob("step-*"))) == 2
    assert two_ranks.run(handlers) == [True, True]


def signalled(config: Config) -> int:
    """USR1 to rank 1, and some steps later INT to all, as by Ctrl-C, with TERM to rank 0."""
    step = Trainer.step

    def and_signal(self: Trainer) -> None:
        step(self)
        rank = distributed.global_rank()
        if self.engines.global_step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.engines.global_step == 20:
            if rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # until the thread has recorded them

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", and_signal)
        return run_in_world(config)


def handlers() -> bool:
    """Whether the handlers from before the run are in place again."""
    return (
        signal.getsignal(signal.SIGTERM) is not signals._do_nothing
        and signal.getsignal(signal.SIGINT) is not signals._do_nothing
    )


# Storms

VALID = (
    *("save", "save as a", "eval", "export", "lr 1e-3", "lr x0.5", "lr net x2", "lr auto"),
    *("clip 0.5", "clip net 0", "steps 1000000", "steps 2000000", "log info", "pause", "resume"),
    *("event lr x0.5@7", "clip 1@1000000", "event lr 1e-3 every 50", "event clear", "lr 0@9"),
    *("set trainer.save_every 40", "set checkpoint.keep_last 2", "set trainer.export_at_end 0"),
    *("loss_scale 8", "event clear 3", "set checkpoint.background true"),
    "set checkpoint.background false",
)
QUERIES = ["status", "time", "time to 500", "help", "event show", "set"]
WRONG = [
    "",
    "lr",
    "lr foo",
    "save now",
    "quit now",
    "\x00",
    "ä\ufffd",
    "@",
    "event x@5",
    "x" * 5000,
]
BURSTS = st.lists(
    st.lists(st.sampled_from([*VALID, *QUERIES, *WRONG]), min_size=1, max_size=12),
    min_size=1,
    max_size=6,
)
FRONTS = st.tuples(BURSTS, BURSTS, BURSTS)  # stdin, and two clients
"""What a storm sends to a run: bursts of lines for each front."""


class Sender(threading.Thread):
    """A client that sends bursts of lines, and then counts the answers."""

    def __init__(self, run_dir: Path, bursts: list[list[str]], seed: int):
        super().__init__()
        self.run_dir, self.bursts, self.random = run_dir, bursts, random.Random(seed)
        self.sent = [line for burst in bursts for line in burst if line.strip()]
        self.answers: list[dict[str, Any]] = []

    def run(self) -> None:
        client = Client(self.run_dir)
        for burst in self.bursts:
            client._socket.sendall("".join(f"{line}\n" for line in burst).encode())
            time.sleep(self.random.choice([0, 0.002, 0.02]))
        while Counter(a["state"] for a in self.answers)["last"] < len(self.sent):
            answer = json.loads(client._lines.readline())
            is_last = answer["state"] in ("done", "failed", "rejected")
            self.answers.append(answer | {"state": "last" if is_last else answer["state"]})
        client.close()


def storm(config: Config, fronts: list[list[list[str]]]) -> Any:
    """A run in a storm of commands: what this rank executed, and on rank 0 also the answers."""
    if not distributed.is_global_leader():
        with recorded() as history:
            run_in_world(config)
        return history, None
    reading, writing = os.pipe()
    old_stdin, sys.stdin = sys.stdin, os.fdopen(reading)
    typed, *others = fronts
    senders: list[Sender] = []

    def send() -> None:
        while not (config.run_dir / SOCKET).exists():
            time.sleep(0.005)
        senders.extend(Sender(config.run_dir, b, n) for n, b in enumerate(others))
        for sender in senders:
            sender.start()
        for burst in typed:
            os.write(writing, "".join(f"{line}\n" for line in burst).encode())
            time.sleep(0.003)
        os.close(writing)
        for sender in senders:
            sender.join()
        while any(thread.name == "stdin" for thread in threading.enumerate()):
            time.sleep(0.005)
        client = Client(config.run_dir)
        list(client.send("event clear"))
        list(client.send("quit!"))
        client.close()

    sender = threading.Thread(target=send)
    sender.start()
    with recorded() as history:
        try:
            run_in_world(config)
        finally:
            sys.stdin = old_stdin
            sender.join()
    return history, [(sender.sent, sender.answers) for sender in senders]


def check_storm(pool: RankPool, directory: Path, fronts: list[list[list[str]]]) -> int:
    """Sends a storm to a run, and checks everything promised. Returns the number of lines sent."""
    config = tiny_config(
        directory, 1, run={"steps": 10**6}, control={"stdin": True, "socket": True}
    )
    found = pool.run(storm, config, fronts)
    histories = [history for history, _ in found]
    assert all(history == histories[0] for history in histories)  # same steps, same order
    answered = found[0][1]
    for sent, answers in answered:
        last = [answer["text"] for answer in answers if answer["state"] == "last"]
        assert Counter(last) == Counter(line.strip() for line in sent)  # each exactly once
    states: dict[int, list[str]] = {}
    for record in audit(config):
        states.setdefault(record["id"], []).append(record["state"])
    for of_one in states.values():
        assert of_one in (
            ["rejected"],
            ["queued", "agreed", "done"],
            ["queued", "agreed", "failed"],
            ["done"],  # events have no queue
            ["failed"],
        ), of_one
    lines = [line.strip() for bursts in fronts for burst in bursts for line in burst]
    expected = [line for line in lines if line and line not in QUERIES]
    texts = {r["id"]: r["text"] for r in audit(config) if not r["front"].startswith("event ")}
    assert Counter(texts.values()) == Counter([*expected, "event clear", "quit!"])
    queued = [r["text"] for r in audit(config) if r["state"] == "queued"]
    executed = [text for _, front, text in histories[0] if not front.startswith("event ")]
    assert executed == queued  # one order for all
    return len(lines)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_storm_of_commands(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path, ranks: int
) -> None:
    """At least 500 commands on each number of ranks, as hypothesis picks them."""
    pool = two_ranks if ranks == 2 else four_ranks
    sent = [0]

    @settings(
        max_examples=4 if ranks == 2 else 12,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(FRONTS)
    def send(fronts: tuple[list[list[str]], ...]) -> None:
        sent.append(check_storm(pool, tmp_path / str(len(sent)), list(fronts)))

    send()
    choice = random.Random(ranks)
    lines = [*VALID, *QUERIES, *WRONG]
    flood = [[choice.choices(lines, k=20) for _ in range(10)] for _ in range(3)]
    sent.append(check_storm(pool, tmp_path / "flood", flood))
    assert sum(sent) >= 500

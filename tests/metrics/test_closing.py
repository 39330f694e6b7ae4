"""What a run says when it ends."""

import json
import time
from pathlib import Path
from typing import Any

from harness.health.outcome import Outcome
from harness.metrics.closing import Closing
from tests.support.helpers import tiny_config


def test_the_last_and_the_best_with_their_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run={"steps": 9}, checkpoint={"best_metric": "eval/loss"})
    run_dir = config.run_dir
    (run_dir / "checkpoints/step-00000004").mkdir(parents=True)
    (run_dir / "checkpoints/step-00000008").mkdir()
    (run_dir / "checkpoints/step-00000008.kept").mkdir()
    first = {"began": time.time() - 961, "time": time.time() - 921, "from": 0, "step": 2}
    again = {"began": first["time"], "time": time.time() - 1, "from": 2, "step": 2}
    starts = [first | {"starting": 1.0}, again | {"starting": 1.0, "waiting": 900.0}]
    (run_dir / "goodput.jsonl").write_text("".join(json.dumps(r) + "\n" for r in starts))
    earlier = [{"step": 1, "loss": 0.1}, {"step": 2, "eval/loss": 0.5, "eval/accuracy": 0.1}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in earlier))
    closing = Closing(config, 2)
    for step, loss in enumerate((3.0, 1.5, 0.9, 2.5, float("nan")), start=3):
        record = {"step": step, "loss": loss, "skipped": int(step > 5), "apollo/skipped": 7}
        closing.write(record | {"spikes": 4, "neuron/spikes": 1.5})
    closing.write({"step": 7, "eval/loss": 0.7, "eval/accuracy": 0.3})
    lines = list(closing.lines(Outcome("quit", 0, step=7)))
    assert lines == [
        "quit: step 7 after 1 min 1 s in 2 starts",
        "eval/loss 0.7, best 0.5 at step 2",
        "eval/accuracy 0.3",
        "loss 2.5, best 0.9 at step 5 (since step 2)",
        "1 step was skipped",
        "4 spikes of loss or gradient norm",
        f"checkpoints: 2, the newest is {run_dir}/checkpoints/step-00000008",
        f"next: harness report {run_dir}; a start with the same run.name resumes it",
    ]
    closing.write({"step": 4, "event": "rollback"})
    best = run_dir / "checkpoints/step-00000004"
    lines = list(closing.lines(Outcome("complete", 0, step=9), best))
    assert lines[1:4] == [
        "eval/loss 0.5, the best",
        "eval/accuracy 0.1",
        "loss 1.5, the best (since step 2)",
    ]
    assert lines[-2:] == [
        f"best saved by eval/loss: {best}",
        f"next: harness report {run_dir}; harness convert {run_dir} {run_dir}.sft --best",
    ]


def test_of_several_engines_the_ranked_one_is_to_be_converted(tmp_path: Path) -> None:
    engine = tiny_config(tmp_path).engines["net"].model_dump()
    teacher = {"role": "teacher", "optimizer": None}
    engines: dict[str, Any] = {"D": engine, "G": engine, "T": engine | teacher, "net": engine}
    for ranked, expected in (("eval/G/loss", "G"), ("eval/loss", "net")):
        config = tiny_config(tmp_path, engines=engines, checkpoint={"best_metric": ranked})
        *_, last = Closing(config, 0).lines(Outcome("complete", 0, step=6))
        assert last.endswith(f".sft --engine {expected}")

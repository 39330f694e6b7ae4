"""Run directories as a run leaves them, written without one."""

import json
from pathlib import Path
from typing import Any

BEGAN = 1_795_904_600.0
CONFIG = """[run]
name = "{name}"
steps = {steps}
[checkpoint]
best_metric = "eval/loss"
best_mode = "min"
[engines.net.optimizer]
lr = {lr}
"""


def write_run(path: Path, steps: int = 400, lr: float = 0.001, ended: bool = True) -> Path:
    """A run of 0.1 s a step with an evaluation every 100 steps, a command at step 100, a rank that
    is lost at step 250, a restart from step 200, and at step 333 a loss that is not finite."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG.format(name=path.name, steps=steps, lr=lr))
    lines = [json.dumps(record) for record in records(1, steps, lr)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    command = {"id": 1, "front": "socket", "text": "lr x0.5", "time": BEGAN + 10}
    lost = {"front": "supervisor", "text": "restart 1 of 10", "state": "done", "step": 250}
    _lines(
        path / "commands.jsonl",
        command | {"state": "agreed", "step": 100, "result": ""},
        command | {"state": "done", "step": 100, "result": "lr 0.0005"},
        {"text": "</script><b>nonsense", "state": "rejected", "step": None, "time": BEGAN + 20},
        lost | {"time": BEGAN + 25, "result": "rank 1 on node1 is lost"},
    )
    (path / "log.txt").write_text(
        "2026-11-28 22:23:31 rank 0 INFO saved runs/x/checkpoints/step-00000200\n"
        "2026-11-28 22:23:32 rank 1 ERROR rank 1 on node1 has ended in step 250\n"
        "Traceback (most recent call last):\n"
        "2026-11-28 22:23:33 rank 0 INFO resumed from runs/x/checkpoints/step-00000200\n"
        "2026-11-28 22:23:34 rank 0 WARNING step 333: the loss is not finite\n"
    )
    _lines(
        path / "goodput.jsonl",
        {"began": BEGAN, "time": BEGAN + 2, "from": 0, "step": 0, "starting": 2.0},
        {"began": BEGAN + 2, "time": BEGAN + 42, "from": 0, "step": steps, "steps": 38.0},
    )
    if ended:
        end = {"kind": "complete", "code": 0, "reason": "all steps are taken", "step": steps}
        (path / "ended.json").write_text(json.dumps(end | {"time": BEGAN + 42}))
    return path


def records(first: int, last: int, lr: float = 0.001) -> list[dict[str, Any]]:
    """The records of some steps, and their evaluations."""
    found = []
    memory = {"host_memory_bytes": 2**30, "host_memory_max_bytes": 2**31}
    memory |= {"host_memory_min_bytes": 2**29}
    for step in range(first, last + 1):
        loss = 5 / (1 + step / 50) + (2 if step == 77 else 0)
        record = {
            "step": step,
            "time": BEGAN + 2 + 0.1 * step,
            "lr": lr if step <= 100 else lr / 2,
            "skipped": int(step >= 333),
            "step_time_s": 0.1,
            "data_time_s": 0.01,
            "forward_time_s": 0.03,
            "backward_time_s": 0.04,
            "optimizer_time_s": 0.02,
            "slowest_rank": step % 4 // 3,
            **({"own_backward_time_max_rank": 1} if step % 4 == 3 else {}),
            **(memory if step == 9 else {}),
            "loss": loss if step != 333 else "nan",
            "grad_norm": 2.0 if step % 2 else 1.0,
            "effective_rank": 3.0 + step % 2,
            "samples": 8 * step,
            "tokens": 512 * step,
            "samples_per_s": 80.0,
            "tokens_per_s": 5120.0 + step % 2,
        }
        found.append(record)
        if step % 100 == 0:
            found.append({"step": step, "time": record["time"], "eval/loss": loss + 0.1})
    return found


def _lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

"""Short runs of the entry point, many at a time on one card: each trains, saves and resumes.

A run takes 20 steps of the default task and saves at 10. Another one continues from there: its
losses and its exported weights must be the first one's, to the bit (math attention, deterministic
cuBLAS).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from bench.gpu.runs import Run, runs
from bench.gpu.section import ROOT, Section, run_section

STEPS, HALF = 20, 10
TIMEOUT_S = 150
SMALL = {"adamw zero2 fp32", "muon zero2", "engines of gan"}
"""Runs of the imitation on a CPU with --quick; without it all, but for those that need a GPU."""


def measure(section: Section) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    jobs = 2 if section.small else max(1, min(8, (os.cpu_count() or 2) - 6))
    is_short = section.small and section.quick
    wanted = [r for r in runs(section.is_on_gpu) if not is_short or r.name in SMALL]
    try:
        with ThreadPoolExecutor(jobs) as pool:
            runs_of = {pool.submit(outcome_of, section, scratch, run): run for run in wanted}
            for outcome in as_completed(runs_of):  # a limit may end the section behind any of them
                section.add(runs_of[outcome].name, outcome.result())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def outcome_of(section: Section, scratch: Path, run: Run) -> str:
    """ "ok", or what went wrong."""
    if not run.is_possible():
        return f"left out: {run.needs} is not installed"
    first, again = (run.name.replace(" ", "-") + end for end in ("", "-again"))
    started = time.monotonic()
    code, output = _train(section, scratch, first, run, run.words)
    if run.check == "refused":
        return "ok, refused" if code == 2 else f"exit code {code}, not 2: {output}"
    if code:
        return f"failed: {output}"
    if run.check == "resumed":
        resume = f"--run.resume={scratch / first}/checkpoints/step-{HALF:08d}"
        words = run.words if run.then is None else run.then
        code, output = _train(section, scratch, again, run, [*words, resume])
        if code:
            return f"resume failed: {output}"
        if run.then is None and (error := _difference(scratch / first, scratch / again)):
            return error
    return f"ok, {time.monotonic() - started:.0f} s"


def _difference(first: Path, again: Path) -> str:
    """What a resumed run has computed otherwise; empty if nothing."""
    whole, rest = _losses(first), _losses(again)
    unequal = [step for step in range(HALF + 1, STEPS + 1) if whole.get(step) != rest.get(step)]
    if unequal:
        return f"resumed with other losses from step {unequal[0]}"
    return "" if _exports(first) == _exports(again) else "resumed with other weights"


def _train(
    section: Section, scratch: Path, name: str, run: Run, words: list[str]
) -> tuple[int | None, str]:
    """Runs it. Its exit code, None without an end in time, and what it printed last."""
    size = ["--task.args.seq_len=32", "--task.args.dim=32", "--task.args.layers=2"]
    language = ["--task.args.dropout=0.1", "--optimizations.attention=math"]
    command = [
        *(sys.executable, "launch/train.py", f"--config=launch/tasks/{run.task}.toml"),
        *(f"--run.dir={scratch}", f"--run.name={name}", f"--run.steps={STEPS}"),
        *(f"--trainer.save_every={HALF}", "--trainer.eval_every=0", "--metrics.progress=false"),
        *("--control.stdin=false", "--control.socket=false"),
        *(language + size * section.small if run.task == "byte_lm" else []),
        *words,
    ]
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | deterministic,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=4 * TIMEOUT_S if section.small else TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, "no end in time"
    return done.returncode, (done.stdout + done.stderr)[-600:]


def _losses(run: Path) -> dict[int, dict[str, float]]:
    """Those of all engines, by step."""
    losses: dict[int, dict[str, float]] = {}
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        found = {key: value for key, value in record.items() if key.endswith("loss")}
        losses.setdefault(record["step"], {}).update(found)
    return losses


def _exports(run: Path) -> dict[str, bytes]:
    files = (run / f"exports/step-{STEPS:08d}").rglob("*.sft")
    return {file.name: file.read_bytes() for file in sorted(files)}


if __name__ == "__main__":
    run_section(measure)

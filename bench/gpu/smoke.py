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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.section import ROOT, Section, run_section

STEPS, HALF = 20, 10
TIMEOUT_S = 150
DTYPES = {
    "fp32": [],
    "bf16": ["--engines.lm.ds_overrides.bf16={enabled=true}"],
    "fp16": ["--engines.lm.ds_overrides.fp16={enabled=true, initial_scale_power=8}"],
}
OPTIMIZERS = {
    "adamw": [],
    "apollo": [
        '--engines.lm.optimizer={name="apollo", lr=2e-3, rank=16, update_proj_gap=6}',
    ],
    "apollo svd": [
        '--engines.lm.optimizer={name="apollo", lr=2e-3, rank=16, projection="svd"}',
    ],
    "apollo-mini": ['--engines.lm.optimizer={name="apollo-mini", lr=2e-3}'],
}
OFFLOAD = ["--optimizations.unsloth=true", "--optimizations.offload.min_bytes=0"]
OTHERS = {
    "background save": ["--checkpoint.background=true"],
    "EMA": ["--engines.lm.ema_decay=0.9"],
    "workers": ["--data.workers=2"],
    "accumulation": ["--engines.lm.ds_overrides.gradient_accumulation_steps=2"],
    "LoRA": ['--engines.lm.lora={targets=".*qkv"}'],
    "offload inputs": [*OFFLOAD, '--optimizations.offload.budget="all"'],
    "offload saved": [
        *OFFLOAD,
        '--optimizations.offload.budget="all"',
        '--optimizations.offload.mode="saved"',
    ],
}


def runs(section: Section) -> dict[str, list[str]]:
    """Settings of every run, by name, the most important ones first."""
    found = {}
    for stage in (2, 0, 3, 1):
        for dtype, words in DTYPES.items():
            if dtype == "fp16" and not (stage and section.is_on_gpu):
                continue  # DeepSpeed: not at stage 0, and not on a CPU
            for name in ("adamw", "apollo"):
                found[f"{name} zero{stage} {dtype}"] = [
                    *OPTIMIZERS[name],
                    *words,
                    f"--engines.lm.ds_config=ds_configs/zero{stage}.json",
                ]
    for name, words in (OPTIMIZERS | OTHERS).items():
        if name not in ("adamw", "apollo"):
            found[f"{name} zero2 bf16"] = [*words, *DTYPES["bf16"]]
    return dict(list(found.items())[:2]) if section.small else found


def measure(section: Section) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    jobs = 2 if section.small else max(1, min(8, (os.cpu_count() or 2) - 6))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            wanted = runs(section)
            outcomes = [
                pool.submit(_outcome, section, scratch, name, words)
                for name, words in wanted.items()
            ]
            for name, outcome in zip(wanted, outcomes, strict=True):
                section.add(name, outcome.result())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _outcome(section: Section, scratch: Path, name: str, words: list[str]) -> str:
    """ "ok", or what went wrong."""
    first, again = (name.replace(" ", "-") + end for end in ("", "-again"))
    started = time.monotonic()
    if error := _train(section, scratch, first, words):
        return f"failed: {error}"
    resume = scratch / first / f"checkpoints/step-{HALF:08d}"
    if error := _train(section, scratch, again, [*words, f"--run.resume={resume}"]):
        return f"resume failed: {error}"
    whole, rest = _losses(scratch / first), _losses(scratch / again)
    unequal = [step for step in range(HALF + 1, STEPS + 1) if whole.get(step) != rest.get(step)]
    if unequal:
        return f"resumed with other losses from step {unequal[0]}"
    if _exports(scratch / first) != _exports(scratch / again):
        return "resumed with other weights"
    return f"ok, {time.monotonic() - started:.0f} s"


def _train(section: Section, scratch: Path, name: str, words: list[str]) -> str:
    """Runs it. What it printed last, if it failed."""
    size = ["--task.args.seq_len=32", "--task.args.dim=32", "--task.args.layers=2"]
    command = [
        *(sys.executable, "launch/train.py", "--config=launch/tasks/byte_lm.toml"),
        *(f"--run.dir={scratch}", f"--run.name={name}", f"--run.steps={STEPS}"),
        *(f"--trainer.save_every={HALF}", "--trainer.eval_every=0", "--task.args.dropout=0.1"),
        *("--optimizations.attention=math", "--metrics.progress=false"),
        *("--control.stdin=false", "--control.socket=false"),
        *(size if section.small else []),
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
        return "no end in time"
    return (done.stdout + done.stderr)[-600:] if done.returncode else ""


def _losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _exports(run: Path) -> dict[str, bytes]:
    files = (run / f"exports/step-{STEPS:08d}").glob("*.sft")
    return {file.name: file.read_bytes() for file in sorted(files)}


if __name__ == "__main__":
    run_section(measure)

"""Out of memory: what is reported; and smaller micro-batches train in the same way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import distributed
from harness.config import Config
from harness.config.overrides import parse_overrides
from harness.config.sections import merge
from harness.engine.engines import Engines
from harness.errors import ConfigError, OutOfMemory, is_out_of_memory, with_notes
from harness.health.oom import check_can_shrink, explained, shrunk
from harness.health.outcome import Outcome
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import Pools, error_of, exported, log_text, losses, tiny_config
from tests.test_weigh import config_of, plain


@pytest.mark.parametrize(
    ("error", "is_oom"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.cuda.OutOfMemoryError("HIP out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 400 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_is_out_of_memory(error: Exception, is_oom: bool) -> None:
    assert is_out_of_memory(error) == is_oom


def test_torchs_own_error_of_the_host_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_error_says_what_uses_memory_and_what_would_help(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(OutOfMemory) as caught, explained(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee there")
    text = str(caught.value)
    assert text.startswith(f"out of memory on rank 0, in {__file__}:"), text
    assert ": CUDA out of memory. Tried to allocate 2.00 GiB.\n" in text and "See there" not in text
    assert "host: this rank" in text and "host: free" in text
    assert "data.micro_batch_size below 4" in text and "a ZeRO stage above 0" in text
    config = tiny_config(tmp_path, 3, data={"micro_batch_size": 1}, optimizations={"unsloth": True})
    with pytest.raises(OutOfMemory) as caught, explained(config):
        raise MemoryError
    assert "MemoryError" in str(caught.value)
    assert "data.micro_batch_size" not in str(caught.value)
    assert "ZeRO" not in str(caught.value) and "unsloth" not in str(caught.value)
    with pytest.raises(KeyError), explained(config):
        raise KeyError


def with_words(config: Config, words: list[str]) -> Config:
    """As if these were added to its command line."""
    return Config.model_validate(merge(config.model_dump(), parse_overrides(words)))


def test_all_trained_engines_accumulate_more(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data={"micro_batch_size": 9}, health={"oom": "shrink"})
    net = config.engines["net"].model_dump()
    teacher = {"ds_config": net["ds_config"], "role": "teacher"}
    more = {"gradient_accumulation_steps": 2}
    engines = {"net": net, "b": net | {"ds_overrides": more}, "c": teacher}
    config = Config.model_validate(config.model_dump() | {"engines": engines})
    words, what = shrunk(config)
    smaller = with_words(config, words)
    assert smaller.data.micro_batch_size == 3
    counts = {name: engine.gradient_accumulation for name, engine in smaller.engines.items()}
    assert counts == {"net": 3, "b": 6, "c": 1}
    assert what == (
        "data.micro_batch_size 9 -> 3, gradient_accumulation_steps of net: 1 -> 3, b: 2 -> 6"
    )
    with pytest.raises(ConfigError, match=r"data\.micro_batch_size is 1"):
        shrunk(with_words(config, ["--data.micro_batch_size=1"]))


def test_micro_batches_that_the_config_does_not_make_cannot_shrink(
    pools: Pools, tmp_path: Path
) -> None:
    batched = tiny_config(tmp_path, data={"sampler": "batched"}, health={"oom": "shrink"})
    with pytest.raises(ConfigError, match=r"data\.sampler = 'batched' makes the micro-batches"):
        check_can_shrink(batched, has_own_loader=False)
    config = config_of(tmp_path, 2, 1, 0, loader=True)
    config = with_words(config, ["--health.oom=shrink"])
    error, _ = pools(2).run(error_of, config)
    assert "health.oom = 'shrink': the task's own loader makes the micro-batches" in error
    check_can_shrink(tiny_config(tmp_path, health={"oom": "shrink"}), has_own_loader=False)


def out_of_memory_at(config: Config, step: int) -> str:
    """Trains until this step's first forward, which fails on all ranks. Returns the error."""
    original = Engines.step

    def limited(self: Engines, *args: Any) -> Any:
        if self.global_step + 1 == step:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutOfMemory) as caught:
        patch.setattr(Engines, "step", limited)
        run_in_world(config)
    return str(caught.value)


def out_of_memory_while_building(config: Config, place: str, ranks: Sequence[int]) -> str:
    """The error, and the outcome that it leads to."""

    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutOfMemory) as caught:
        if distributed.global_rank() in ranks:
            patch.setattr(place, fail)
        run_in_world(config)
    ended = Outcome.of(caught.value)
    return f"{ended.kind} {ended.code} of rank {ended.rank}: {with_notes(caught.value)}"


def test_models_that_do_not_fit_are_explained(two_ranks: RankPool, tmp_path: Path) -> None:
    """Where the ranks agree on errors, and in DeepSpeed. Smaller micro-batches would not help."""
    config = tiny_config(tmp_path, 2)
    args = (out_of_memory_while_building, config)
    agreed = two_ranks.run(*args, "torch.nn.Linear.__init__", [1])  # in the task
    for text in agreed:
        assert text.startswith("oom 75 of rank 1: rank 1: task ")
    alone = two_ranks.run(*args, "harness.engine.build.Engine", [0, 1])
    for rank, text in enumerate(alone):
        assert text.startswith(f"oom 75 of rank {rank}: out of memory on rank {rank}, in "), text
        assert "host: this rank" in text
    for text in (*agreed, *alone):
        assert "Tried to allocate 2.00 GiB" in text
        advice = text.partition("what would need less:")[2]
        assert "a ZeRO stage above 2" in advice and "micro_batch" not in advice, advice


@pytest.mark.parametrize(
    ("ranks", "accumulation", "stage"),
    [
        (2, 1, 0),
        (2, 2, 3),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_shrinks_trains_in_the_same_way(
    pools: Pools, tmp_path: Path, ranks: int, accumulation: int, stage: int
) -> None:
    """From step 5 on with micro-batches of half the size, texts of different lengths: as plain
    PyTorch with all texts at once."""
    empty = [3, 5, 6, 17, 18]
    config = config_of(tmp_path, ranks, accumulation, stage, empty=empty)
    (first, *_) = pools(ranks).run(out_of_memory_at, config, 5)
    assert first.startswith("out of memory on rank 0, in ")
    assert "CUDA out of memory (simulated)" in log_text(config)
    words, _ = shrunk(config)
    smaller = with_words(config, words)
    assert smaller.data.micro_batch_size * 2 == config.data.micro_batch_size
    pools(ranks).run(run_in_world, smaller)
    assert "step-00000004" in log_text(config).partition("resumed from ")[2].partition("\n")[0]
    expected, weights = plain(empty)
    assert losses(config) == pytest.approx(expected, abs=1e-6)
    for name, tensor in exported(config).items():
        assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-6), name

"""Offloading on two real ranks under DeepSpeed: every ZeRO stage, pipelines, whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import distributed, offload
from harness.config import Config
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import error_of, losses, records, tiny_config
from tests.support.offload_models import WIDTH, Model
from tests.support.quick import quick
from tests.test_run import byte_lm_config

STAGES = [0, 1, 2, 3]


class Lora(nn.Module):
    """A frozen linear map and a trained one of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def trained(stage: int, precision: str, lora: bool, mode: offload.Mode | None) -> list[Tensor]:
    """Losses, weights and the random generator after some steps on this rank."""
    import deepspeed

    torch.manual_seed(0)
    model = Model(4)
    if lora:
        for block in model.blocks:
            block.linear = Lora()  # pyright: ignore
    plan = None
    settings: dict[str, Any] = {"fraction": "all", "min_bytes": 0, "host_bytes": 1 << 22}
    if mode is not None and stage % 2:  # before DeepSpeed, and else after it
        plan = offload.attach(model, mode=mode, **settings)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**31,
    }
    if precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    wanted = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(wanted, lr=1e-2), config=config
    )[0]
    if mode is not None and plan is None:
        plan = offload.attach(model, mode=mode, **settings)
    torch.manual_seed(1 + distributed.global_rank())
    found = []
    for _ in range(4):
        x = torch.randn(4, WIDTH).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.detach())
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        found += [p.detach().clone() for p in model.parameters()]
    if plan is not None:
        stats = plan.stats()
        # Two tensors of 3 blocks in 4 forwards; and where all that is saved moves, no parameter.
        size = 4 * WIDTH * (2 if precision == "bf16" else 4)
        assert stats.bytes_out == 4 * 3 * 2 * size if mode == "inputs" else stats.bytes_out > 0
        assert plan.store.pool.leased == 0
        plan.detach()
    engine.destroy()
    return [*found, torch.get_rng_state()]


def equal_offloaded(stage: int, precision: str, lora: bool) -> list[bool]:
    """Whether both modes give what the plain model gives, on this rank."""
    plain = trained(stage, precision, lora, None)
    modes: list[offload.Mode] = ["inputs", "saved"]
    return [all(map(torch.equal, plain, trained(stage, precision, lora, mode))) for mode in modes]


@pytest.mark.parametrize(
    ("stage", "precision", "lora"),
    quick(
        [
            (stage, *how)
            for stage in STAGES
            for how in (("fp32", False), ("bf16", True), ("autocast", True))
        ],
        (0, "bf16", True),
        (1, "autocast", True),
        (2, "fp32", False),
        (3, "bf16", True),
        (3, "fp32", False),
    ),
)
def test_every_zero_stage_is_bit_identical(
    two_ranks: RankPool, stage: int, precision: str, lora: bool
) -> None:
    assert two_ranks.run(equal_offloaded, stage, precision, lora) == [[True, True]] * 2


class Piped(nn.Module):
    """A block as a layer of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(64, 64), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


def piped(way: str) -> list[float]:
    """Losses and the sum of the weights of a pipeline of two stages and six micro-batches."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    arguments: dict[str, Any] = {}
    if way == "checkpoint":
        arguments = {"activation_checkpoint_interval": 1}
        arguments["activation_checkpoint_func"] = offload.checkpoint
    model = PipelineModule(
        [Piped() for _ in range(4)], num_stages=2, loss_fn=nn.MSELoss(), **arguments
    )
    plan = None
    if way == "attach":
        plan = offload.attach(model, Piped, fraction="all", min_bytes=0, host_bytes=1 << 24)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 6,
        "steps_per_print": 2**31,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    generator = torch.Generator().manual_seed(2)
    data = [
        (torch.randn(2, 4096, 64, generator=generator), torch.zeros(2, 4096, 64)) for _ in range(12)
    ]
    torch.manual_seed(3)
    before = offload.stats().bytes_out
    found = [engine.train_batch(iter(data[6 * n : 6 * n + 6])).item() for n in range(2)]  # pyright: ignore
    if way == "checkpoint":
        assert offload.stats().bytes_out > before  # 2 MiB each
    if plan is not None:
        assert plan.stats().bytes_out > 0 and plan.store.pool.leased == 0
        plan.detach()
    found += [p.double().sum().item() for p in model.parameters()]
    return found


def pipelines() -> bool:
    """Whether both ways to offload a pipeline give what it gives without."""
    plain = piped("plain")
    return piped("checkpoint") == plain and piped("attach") == plain


def test_a_pipeline_that_interleaves_forwards_and_backwards() -> None:
    with RankPool(2) as ranks:  # of its own: it leaves its groups behind in DeepSpeed
        assert ranks.run(pipelines) == [True, True]


def with_unsloth(config: Config, **settings: Any) -> Config:
    """The run, offloaded, in another directory."""
    table = config.model_dump()
    table["run"]["dir"] /= "offloaded"
    table["optimizations"] = {"unsloth": True, "offload": settings}
    return Config.model_validate(table)


@pytest.mark.parametrize("steps", quick([4, 20], 4))
def test_the_default_task_has_the_identical_loss_curve(
    two_ranks: RankPool, tmp_path: Path, steps: int
) -> None:
    plain = byte_lm_config(tmp_path, 3, steps)
    two_ranks.run(run_in_world, plain)
    config = with_unsloth(plain, min_bytes=0, fraction="all")
    two_ranks.run(run_in_world, config)
    assert losses(config) == losses(plain)
    assert len(losses(plain)) == steps
    record = records(config)[-1]
    # Of 4 blocks the last is kept; the stream [2, 256, 128] of the others, and cos and sin, go out.
    assert record["offload/bytes_out"] == 4 * (3 * 2 * 256 * 128 + 2 * 256 * 16)
    assert record["offload/bytes_in"] > 0 and record["offload/prefetch_misses"] == 0
    assert record["offload/pins"] == 0 and record["offload/pool_peak_bytes"] > 0
    log = (config.run_dir / "log.txt").read_text()
    assert "engine lm: offload (mode inputs, fraction all): 4 blocks of class Block" in log
    assert "GB out" in log


def test_by_default_a_cpu_offloads_nothing_once_it_has_measured(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = with_unsloth(tiny_config(tmp_path), match="first|middle", min_bytes=0)
    two_ranks.run(run_in_world, config)
    moved = [record["offload/bytes_out"] > 0 for record in records(config)]
    assert moved == [True] * 3 + [False] * 3
    assert "offloading 0 % of the regions" in (config.run_dir / "log.txt").read_text()


def test_several_engines_and_one_without_blocks(two_ranks: RankPool, tmp_path: Path) -> None:
    config = with_unsloth(tiny_config(tmp_path))
    errors = two_ranks.run(error_of, config)
    assert all("offload: Classifier has no nn.ModuleList of one class" in text for text in errors)
    assert not config.run_dir.exists()
    config = with_unsloth(tiny_config(tmp_path), match="first|middle", min_bytes=0, fraction="all")
    plain = tiny_config(tmp_path)
    two_ranks.run(run_in_world, plain)
    two_ranks.run(run_in_world, config)
    assert losses(config) == losses(plain)

"""torch's own DistributedDataParallel, on the ranks of a pool: the measure of synced buffers."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from harness import distributed
from harness.config import Config
from harness.data.sampler import RandomSampler
from harness.task import load_task


def train(config: Config) -> tuple[list[float], float, dict[str, Tensor]]:
    """`(the loss of every step, of the evaluation at the end, the state dict)` of rank 0, whose
    buffers every rank takes before a step. Collective."""
    world, rank = distributed.world_size(), distributed.global_rank()
    settings = config.engines["net"]
    assert settings.optimizer is not None
    distributed.seed_everything(config.run.seed)
    task = load_task(config)
    model = task.models["net"]
    ddp = DistributedDataParallel(model)
    args: dict[str, Any] = settings.optimizer.args | {"lr": settings.optimizer.lr}
    optimizer = torch.optim.AdamW(model.parameters(), **args)
    draws = RandomSampler(len(task.train_data), seed=config.run.seed).stream()
    losses = []
    for _ in range(config.run.steps):
        total = torch.zeros(())
        for micro_batch in range(settings.gradient_accumulation):
            size = config.data.micro_batch_size * world
            samples = [task.train_data[next(draws)] for _ in range(size)]
            is_last = micro_batch == settings.gradient_accumulation - 1
            with nullcontext() if is_last else ddp.no_sync():
                ddp(*default_collate(samples[rank::world]))
                loss: Tensor = model.loss / settings.gradient_accumulation  # type: ignore[assignment]
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    model.eval()
    with torch.no_grad():
        assert task.eval_data is not None
        model(*default_collate([task.eval_data[n] for n in range(len(task.eval_data))]))
    return losses, float(model.loss), dict(model.state_dict())  # type: ignore[arg-type]

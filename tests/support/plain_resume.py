"""Plain DeepSpeed resuming from a checkpoint, on the ranks of a pool."""

from pathlib import Path
from typing import Any

import deepspeed
import torch

from harness import distributed
from tests.support.plain_deepspeed import Odd

Tree = dict[str, Any]


def train(ds: Tree, steps: int, load: Path | None = None, save: Path | None = None) -> list[float]:
    """Loads a checkpoint, trains, and saves one. Collective.

    Returns the loss of every step over the same 8 sequences, whatever the number of ranks.
    """
    torch.manual_seed(1 if load is None else 2)
    model = Odd()
    small = [p for p in model.parameters() if p.requires_grad and p.numel() <= 20]
    large = [p for p in model.parameters() if p.requires_grad and p.numel() > 20]
    groups: Any = [{"params": large}, {"params": small, "lr": 0.003, "weight_decay": 0.0}]
    if load is not None:
        for parameter in model.fixed.parameters():
            parameter.data.zero_()
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    world, rank = distributed.world_size(), distributed.global_rank()
    batch = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8 // world,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds | batch)
    if load is not None:
        assert engine.load_checkpoint(str(load))[0] is not None
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(engine.global_steps)
        tokens = torch.randint(11, (8, 6), generator=generator)
        total = torch.zeros(())
        for sequence in tokens[rank::world]:
            loss = engine(sequence)
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 8)
    if save is not None:
        engine.save_checkpoint(str(save), client_state={"note": 7})
    engine.destroy()
    return losses

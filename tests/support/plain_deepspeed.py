"""Checkpoints that plain DeepSpeed writes, of every layout, and what they should convert to.

Runs on the ranks of a pool. For each layout `NAME/` holds the checkpoint under the tag `here`, and
the references: `NAME/live.pt`, the gathered weights of the running engine in the dtype that it
computes in; `NAME/state.pt`, masters and moments; `NAME/fp32.pt`, DeepSpeed's own zero_to_fp32.
"""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from harness import distributed

Tree = dict[str, Any]
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
ODD = {"round_robin_gradients": True, "parameter_alignment": True}


class Odd(nn.Module):
    """An irregular layout: tied, frozen and odd-sized parameters, buffers of two dtypes."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 7)
        self.register_buffer("scale", torch.linspace(0.1, 1.3, 7))
        self.register_buffer("seen", torch.tensor([3, 5]))
        self.fixed = nn.Linear(7, 7).requires_grad_(not frozen)
        self.inner = nn.Linear(7, 13)
        self.outer = nn.Linear(13, 7, bias=False)
        self.tilt = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fixed(self.words(tokens))
        x = x + self.outer(torch.relu(self.inner(x * self.scale.to(x.dtype)))) * self.tilt.sum()
        return F.cross_entropy(self.head(x).float(), tokens.roll(1))


class Experts(nn.Module):
    """Two layers of experts around a dense one."""

    def __init__(self, experts: int, parallel: int) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.first, self.second = (
            MoE(8, nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8)), experts, parallel)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.first(x)[0]
        x = x + self.second(x)[0]
        return F.cross_entropy(self.head(x).float(), tokens.roll(1))


def layouts(world: int) -> dict[str, Tree]:
    """DeepSpeed's configs by name; "zero" is `zero_optimization`, two keys are `write`'s own."""
    found: dict[str, Tree] = {
        "zero0 fp32": {"zero": {"stage": 0}},
        "zero0 bf16": {"zero": {"stage": 0}} | BF16,
        "zero1 fp32 groups": {"zero": {"stage": 1}, "groups": True},
        "zero1 bf16": {"zero": {"stage": 1}} | BF16,
        "zero1 bf16 fp32-gradients": {
            "zero": {"stage": 1},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        | BF16,
        "zero2 fp32 offloaded": {"zero": {"stage": 2} | OFFLOADED},
        "zero2 bf16 odd groups": {"zero": {"stage": 2} | ODD, "groups": True} | BF16,
        "zero2 fp16": {"zero": {"stage": 2}} | FP16,
        "zero3 fp32 groups": {"zero": {"stage": 3}, "groups": True},
        "zero3 bf16 many": {"zero": {"stage": 3, "sub_group_size": 50}} | BF16,
        "zero3 bf16 offloaded": {"zero": {"stage": 3} | OFFLOADED} | BF16,
        "zero3 fp16 groups": {"zero": {"stage": 3}, "groups": True} | FP16,
    }
    if world in (2, 4):
        for stage in (0, 1, 2):
            found[f"zero{stage} bf16 experts"] = {"zero": {"stage": stage}, "experts": 4} | BF16
    return found


def write_all(directory: Path, names: list[str]) -> None:
    """Writes the checkpoints of these layouts below `directory`. Collective."""
    for name in names:
        write(directory / name, layouts(distributed.world_size())[name])


def write(directory: Path, layout: Tree) -> None:
    """Trains two steps in a layout and saves. Collective."""
    torch.manual_seed(1)
    config = {key: value for key, value in layout.items() if key not in ("groups", "experts")}
    config |= {"zero_optimization": config.pop("zero"), "train_micro_batch_size_per_gpu": 1}
    config["zero_force_ds_cpu_optimizer"] = False
    config["zero_allow_untested_optimizer"] = True
    stage = layout["zero"]["stage"]
    if "experts" in layout:
        model = Experts(layout["experts"], 2)
        dense = {"params": list(model.parameters()), "name": "dense"}
        groups = split_params_into_different_moe_groups_for_optimizer(dense)
    else:
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = Odd()
        groups = [p for p in model.parameters() if p.requires_grad]
        if "groups" in layout:
            sizes = [getattr(p, "ds_numel", p.numel()) for p in groups]
            groups = [
                {"params": [p for p, n in zip(groups, sizes, strict=True) if n > 20]},
                {"params": [p for p, n in zip(groups, sizes, strict=True) if n <= 20], "lr": 0.1},
            ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # slow on CPUs
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(distributed.global_rank())
    for _ in range(2):
        loss = engine(torch.randint(11, (6,), generator=generator))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(directory), tag="here")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        live = {key: value.detach().clone() for key, value in model.state_dict().items()}
    per_rank = distributed.all_gather(live)
    is_odd = "experts" in layout or "round_robin_gradients" in layout["zero"]
    is_odd |= stage < 3 and "groups" in layout
    state = full_state(model) if stage and not is_odd else {}
    if distributed.is_global_leader():
        experts = {} if "experts" not in layout else expert_weights(per_rank, layout["experts"])
        live = {key: value for key, value in live.items() if ".deepspeed_experts." not in key}
        torch.save(live | experts, directory / "live.pt")
        torch.save(state, directory / "state.pt")
        if stage and "experts" not in layout and "data_types" not in layout:
            fp32 = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag="here")
            torch.save(fp32, directory / "fp32.pt")
    engine.destroy()


def full_state(model: nn.Module) -> Tree:
    """Masters and moments of the running engine, as `harness convert --what optimizer` names them.

    Not with round_robin_gradients, where DeepSpeed gathers wrong ones, nor with experts or a second
    group below stage 3, where it fails. Collective.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"optimizer.master.{name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, key)
                found[f"optimizer.{key}.{name}"] = value
    return {key: value.clone() for key, value in found.items()}


def expert_weights(per_rank: list[Tree], count: int) -> Tree:
    """The experts of ranks 0 and 1 under their global numbers: the other ranks have copies."""
    found = {}
    for rank, live in enumerate(per_rank[:2]):
        for key, value in live.items():
            before, mark, after = key.partition(".deepspeed_experts.")
            if mark:
                number, dot, rest = after.partition(".")
                found[f"{before}{mark}{rank * count // 2 + int(number)}{dot}{rest}"] = value
    return found

"""Models whose modules, parameters and buffers have several names, drawn at random; under plain
DeepSpeed, on the ranks of a pool.
"""

from pathlib import Path
from random import Random
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from harness import distributed


class Node(nn.Module):
    """Every parameter, under each of its names, learns to be the input."""

    def forward(self, x: Tensor) -> Tensor:
        own = [p for p in self._parameters.values() if p is not None]
        inner = [child(x) for child in self._modules.values() if child is not None]
        return sum(((p - x.to(p.dtype)) ** 2).sum().float() for p in own) + sum(
            inner, torch.zeros(())
        )


def model(seed: int) -> Node:
    """A tree of nodes in which anything may be registered again: a parameter or a buffer in the
    same node or in another one, a node under the same parent or under another one. Some parameters
    are frozen."""
    random = Random(seed)
    torch.manual_seed(seed)
    nodes: list[Node] = []
    parameters: list[nn.Parameter] = []
    buffers: list[Tensor] = []
    for _ in range(random.randint(4, 7)):
        node = Node()
        for number in range(random.randint(1, 4)):
            if parameters and random.random() < 0.4:
                parameter = random.choice(parameters)
            else:
                shape = [random.randint(1, 6) for _ in range(random.randint(1, 2))]
                parameter = nn.Parameter(torch.randn(shape), random.random() < 0.8)
                parameters.append(parameter)
            node.register_parameter(f"p{number}", parameter)
        for number in range(random.randint(0, 2)):
            if not buffers or random.random() < 0.5:
                buffers.append(torch.randn(random.randint(1, 4)))
            node.register_buffer(f"b{number}", random.choice(buffers))
        for number in range(random.randint(0, 3) if nodes else 0):
            node.add_module(f"n{number}", random.choice(nodes[-2:]))
        nodes.append(node)
    root = Node()
    for number, node in enumerate(nodes):
        root.add_module(f"m{number}", node)
    root.add_module("again", random.choice(nodes))
    root.register_parameter("trained", nn.Parameter(torch.randn(5)))  # at least one
    return root


def _engine(seed: int, stage: int, dtype: str) -> Any:
    net = model(seed)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bf16"},
    }
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def _state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The live weights, and the live masters, each under all of its names. Collective."""
    net, stage = engine.module, engine.zero_optimization_stage()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        state = net.state_dict(keep_vars=True)
        weights = {id(tensor): tensor.detach().clone() for tensor in state.values()}
    masters = {key: weight.float() for key, weight in weights.items()}
    for parameter in net.parameters() if stage else ():
        if parameter.requires_grad:
            master: Any = safe_get_full_fp32_param(parameter)
            masters[id(parameter)] = master.clone()
    live, exact = ({n: kept[id(t)] for n, t in state.items()} for kept in (weights, masters))
    return live, exact


def write(directory: Path, seed: int, stage: int, dtype: str) -> None:
    """Trains two steps and saves, with `live.pt` and `masters.pt` beside it, and below `lean/`
    without frozen parameters. Collective."""
    engine = _engine(seed, stage, dtype)
    for step in range(2):
        engine.backward(engine(torch.tensor(float(step))))
        engine.step()
    engine.save_checkpoint(str(directory), tag="here")
    engine.save_checkpoint(str(directory / "lean"), tag="here", exclude_frozen_parameters=True)
    states = _state(engine)
    if distributed.is_global_leader():
        for state, name in zip(states, ("live.pt", "masters.pt"), strict=True):
            torch.save(state, directory / name)
    engine.destroy()


def load(directory: Path, seed: int, stage: int, dtype: str) -> list[dict[str, Tensor]]:
    """The live weights and masters of an engine that has loaded a checkpoint, after it was built
    with other ones. Collective."""
    engine = _engine(seed, stage, dtype)
    assert engine.load_checkpoint(str(directory))[0] is not None
    states = _state(engine)
    engine.destroy()
    return list(states)

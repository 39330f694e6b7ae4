"""Small checkpoints of whichever version of DeepSpeed is imported (`old_deepspeed`).

    torchrun --nproc_per_node=2 old_checkpoints.py DIRECTORY

Writes NAME/ (the checkpoint), NAME.fp32.pt (that version's zero_to_fp32; absent where it cannot)
and NAME.live.pt (what the running engine computes with, and its masters where it tells them).
"""

import contextlib
import io
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.distributed
from torch import nn
from torch.distributed.elastic.agent.server import api

# What these versions import, and has disappeared since.
numpy.__dict__["BUFSIZE"] = 8192
api.__dict__.update(log=api.logger, _get_socket_with_port=None)
six = sys.modules["torch._six"] = ModuleType("torch._six")
vars(six).update(inf=float("inf"))

torch.distributed.init_process_group("gloo")

import deepspeed  # noqa: E402
from deepspeed.runtime import engine as runtime_engine  # noqa: E402

RANK = torch.distributed.get_rank()
VERSION = tuple(int(part) for part in deepspeed.__version__.split(".")[:2])


class Absent:
    """A stream or event of an accelerator: everything is there, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def patch() -> None:
    """What these versions ask of an accelerator, and of packages of Intel's, on a CPU."""
    accelerator: Any = type(deepspeed.accelerator.get_accelerator())
    idle = ("memory_", "max_memory_", "reset_", "empty_", "range_", "synchronize", "set_device")
    for name in dir(accelerator):
        if name.startswith(idle):
            setattr(accelerator, name, lambda self, *args: 0)
    accelerator.memory_stats = lambda self, *args: {"num_alloc_retries": 0}
    accelerator.Event = accelerator.Stream = property(lambda self: Absent)
    accelerator.current_stream = accelerator.default_stream = lambda self, *args: Absent()
    accelerator.stream = lambda self, stream: Absent()
    accelerator.device_name = accelerator.current_device_name = lambda self, *args: "cpu"
    accelerator.current_device = lambda self: 0
    accelerator.device_count = lambda self: 1  # `numactl` counts
    accelerator.pin_memory = lambda self, tensor, *args: tensor
    accelerator.on_accelerator = lambda self, tensor: True
    for kind in ("Byte", "Double", "Float", "Half", "Int", "Long"):
        of_torch = getattr(torch, f"{kind}Tensor")
        setattr(accelerator, f"{kind}Tensor", property(lambda self, type_=of_torch: type_))
    accelerator.communication_backend_name = lambda self: "gloo"
    accelerator.is_available = lambda self: True
    accelerator.is_bf16_supported = accelerator.is_fp16_supported = lambda self: True
    if VERSION < (0, 14):  # it knows types of tensors as "torch.cpu.BFloat16Tensor"
        runtime_engine.split_half_float_double_sparse = lambda grads: [(grads[0].type(), grads)]
    for module, builder in (("ccl", "build_ccl_op"), ("torch", "build_shm_op")):
        with contextlib.suppress(ImportError):
            setattr(import_module(f"deepspeed.comm.{module}"), builder, lambda: None)


class Net(nn.Module):
    """Tied, frozen, a buffer, and groups whose sizes are no multiple of 4: all have padding."""

    def __init__(self, vocab: int = 13, width: int = 6, hidden: int = 9):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, hidden)
        self.frozen = nn.Linear(hidden, hidden).requires_grad_(False)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.arange(1.0, 4.0))

    def forward(self, tokens):
        hidden = self.frozen(torch.relu(self.up(self.embedding(tokens))))
        logits = self.head(self.down(hidden)) * self.scale.mean()
        return nn.functional.cross_entropy(logits.float(), tokens)


def train(stage: int, dtype: str, **settings) -> "tuple[runtime_engine.DeepSpeedEngine, Net]":
    """An engine after two steps."""
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
        **settings,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(5 + RANK)
    for _ in range(2):
        loss = engine(torch.randint(0, 13, (4,), generator=generator))
        engine.backward(loss)
        with torch.no_grad():  # 0.18 gathers into views
            engine.step()
    return engine, model


def live(engine, model: Net, stage: int) -> dict:
    """The running engine's state dict, and the fp32 masters by name."""
    parameters = list(model.parameters())
    gathered = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else None
    with gathered or contextlib.nullcontext():
        module = {k: v.detach().clone() for k, v in model.state_dict().items()}
    masters = {}
    with contextlib.suppress(ImportError):
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                masters[name] = safe_get_full_fp32_param(parameter)
    return {
        "module": module,
        "masters": {k: v.clone() for k, v in masters.items() if v is not None},
    }


def converted(directory: Path) -> "dict | None":
    """What this version's own zero_to_fp32 makes of a checkpoint; None if it cannot."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        print(f"{directory.name}: {error}")  # noqa: T201
        return None
    finally:
        torch.load = load
    return {name: weights[name].clone() for name in weights}


def write(out: Path, name: str, stage: int, dtype: str, **settings) -> None:
    engine, model = train(stage, dtype, **settings)
    engine.save_checkpoint(str(out / name))
    of_engine = live(engine, model, stage)
    torch.distributed.barrier()
    if RANK == 0:
        torch.save(of_engine, out / f"{name}.live.pt")
        weights = converted(out / name)
        if weights is not None:
            torch.save(weights, out / f"{name}.fp32.pt")
        for script in (out / name).glob("*.py"):
            script.unlink()  # DeepSpeed's copy of its converter
    torch.distributed.barrier()


if __name__ == "__main__":
    patch()
    deepspeed.init_distributed(dist_backend="gloo")
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            write(Path(sys.argv[1]), f"zero{stage}_{dtype}", stage, dtype)
    if VERSION >= (0, 12):  # an error in those before
        in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
        write(Path(sys.argv[1]), "bf16_optimizer", 1, "bf16", **in_fp32)

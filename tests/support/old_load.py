"""Loads checkpoints that `harness convert --to-zero` wrote into an engine of whichever version of
DeepSpeed is imported (`old_deepspeed`), and compares weights and masters.

    torchrun --nproc_per_node=N old_load.py JOBS.json

JOBS.json: lists of the checkpoint, the NAME.live.pt of its source, the stage and the dtype.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from old_checkpoints import deepspeed, live, patch, train  # pyright: ignore

load = torch.load
torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})


def wait_for_gathers() -> None:
    """Old versions do not wait for some of them on a CPU, and read what has not arrived."""

    def waiting(function):
        def call(*args, **kwargs):
            work = function(*args, **kwargs)
            if work is not None:
                work.wait()
            return work

        return call

    for name in ("all_gather", "all_gather_into_tensor", "_all_gather_base"):
        setattr(torch.distributed, name, waiting(getattr(torch.distributed, name)))


def check(directory: str, source: str, stage: int, dtype: str) -> None:
    """Fails unless the loaded engine has the weights and masters of the source, to the bit."""
    engine, model = train(stage, dtype)
    path, _ = engine.load_checkpoint(directory)
    assert path is not None, directory
    found, expected = live(engine, model, stage), torch.load(source)
    assert found["module"].keys() == expected["module"].keys()
    assert len(found["masters"]) == len(expected["masters"])
    for kind in ("module", "masters"):
        for name, tensor in expected[kind].items():
            assert torch.equal(found[kind][name], tensor), (directory, kind, name)
    engine(torch.zeros(4, dtype=torch.int64))  # it computes


if __name__ == "__main__":
    patch()
    wait_for_gathers()
    deepspeed.init_distributed(dist_backend="gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        check(*job)
    print("loaded", deepspeed.__version__)  # noqa: T201

"""DeepSpeed's files of the ranks: whose a file is, and whether all are of one save."""

import re
from typing import Any

from harness.errors import CheckpointError, counted, first_few
from harness.formats.pickled import Placeholder
from harness.formats.pt_reader import TensorRef
from harness.zero.layout import Tree, base_state

_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
"""The members of deepspeed.runtime.zero.config.ZeroStageEnum, from 0 on."""
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_\w+\.pt")


def rank_of_file(name: str) -> int | None:
    """The rank whose state a file of DeepSpeed's holds; None for one that every rank reads.

    `name`: of the file, or its path in a checkpoint.
    """
    match = _OF_RANK.search(name)
    return int(match[1]) if match else None


def check_rank_files(
    models: dict[int, Tree], states: dict[int, Tree], world_size: int, stage: int
) -> None:
    """Raises CheckpointError unless every rank's files are present, its own, and of the same save.

    `models`: trees of model_states by rank; `states`: of the optimizers' states.
    """
    for kind, trees in (("model_states", models), ("optim_states", states)):
        is_expected = trees or models[0]["param_shapes"] is not None
        expected = range(world_size if is_expected else 0)
        if kind == "model_states" and stage < 3:
            expected = range(1)
        if missing := first_few(rank for rank in expected if rank not in trees):
            raise CheckpointError(
                f"{kind}.pt of ranks {missing} are missing: saved by {counted(world_size, 'rank')}"
            )
        if extra := first_few(rank for rank in sorted(trees) if rank not in expected):
            raise CheckpointError(
                f"{kind}.pt of ranks {extra} are from another save: this one is of "
                f"{counted(world_size, 'rank')}"
            )
        for rank, tree in trees.items():
            if (writer := _writer(tree)) not in (rank, None):
                raise CheckpointError(
                    f"{kind}.pt of rank {rank} is the file that rank {writer} wrote: files of "
                    "ranks were renamed or exchanged"
                )
    _check_same(models, ("dp_world_size", "global_steps", "param_shapes", "ds_version"))
    _check_same(states, ("zero_stage", "partition_count", "ds_version"))
    _check_same({rank: _steps(state) for rank, state in states.items()}, ("step",))


def _writer(tree: Tree) -> int | None:
    """The rank whose file holds a tree: torch names an archive after the file that it is saved to.

    None if that has no rank, as in the files that harness writes.
    """
    ref = _first_tensor(tree)
    return rank_of_file(f"{ref.storage.record.name.partition('/')[0]}.pt") if ref else None


def _first_tensor(value: Any) -> TensorRef | None:
    if isinstance(value, TensorRef):
        return value
    values = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return None
    return next(filter(None, map(_first_tensor, values)), None)


def _check_same(trees: dict[int, Tree], keys: tuple[str, ...]) -> None:
    """Raises CheckpointError unless these keys have the same values in all ranks' files."""
    for rank, tree in trees.items():
        for key in keys:
            value, expected = (_plain(each.get(key)) for each in (tree, trees[0]))
            if value != expected:
                raise CheckpointError(
                    f"the files of rank {rank} are from another run or step than those of rank 0: "
                    f"{key} is {value!r:.80} on rank {rank}, and {expected!r:.80} on rank 0"
                )


def _steps(optimizer: Tree) -> Tree:
    """The first step count in an optimizer's state; for a tensor, the CRC of its bytes."""
    state = base_state(optimizer)["state"]
    step = next(iter(state.values()), {}).get("step")
    if isinstance(step, TensorRef):
        return {"step": f"bytes with CRC {step.storage.record.crc}"}
    return {"step": step}


def _plain(value: Any) -> Any:
    return plain_int(value) if isinstance(value, Placeholder) else value


def plain_int(value: Any) -> int:
    """An integer, or a stage in a file: a member of DeepSpeed's enumeration, which Python pickles
    by its number, but 3.11.0 to 3.11.3 by its name."""
    if not isinstance(value, Placeholder):
        return int(value)
    *_, member = value.values
    return _STAGES.index(member) if isinstance(member, str) else member

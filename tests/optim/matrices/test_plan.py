"""Who owns which matrix: balanced, and near its pieces. Computed from shapes alone."""

import importlib.util
from pathlib import Path

import pytest

from harness.optim import matrix_param_groups
from harness.optim.matrices.muon import cost_of
from harness.optim.matrices.optimizer import group_matrices
from harness.optim.matrices.plan import OwnerPlan, balanced_owners
from harness.optim.sharded.layouts import expected_shards
from harness.zero.parameters import full_shape

BENCH = Path(__file__).parents[3] / "bench/apollo_memory.py"


def plans_of(size: tuple[int, int, int], stage: int, world: int) -> list[OwnerPlan]:
    """Each rank's plan of the matrices of a LLaMA."""
    spec = importlib.util.spec_from_file_location("apollo_memory", BENCH)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    group, *_ = matrix_param_groups(bench.llama(*size))
    names = group["param_names"]
    shapes = {n: full_shape(p) for n, p in zip(names, group["params"], strict=True)}
    matrices = {name: group_matrices(name, shape, group) for name, shape in shapes.items()}
    return [
        OwnerPlan(shard, matrices, cost_of, [0.0] * world)
        for rank in range(world)
        for shard, _ in expected_shards(shapes, stage, world, rank)
    ]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [8, 7])
def test_owners_of_a_llama_have_equal_work(stage: int, world: int) -> None:
    """1B: the busiest owner has at most 1.15 times the mean; and all ranks agree."""
    plans = plans_of((2048, 5461, 24), stage, world)
    work = [0.0] * world
    for matrix, owner in zip(plans[0].matrices, plans[0].owners, strict=True):
        work[owner] += cost_of(matrix)
    assert max(work) <= 1.15 * sum(work) / world
    assert all(plan.owners == plans[0].owners for plan in plans)
    assert all(plan.pieces == plans[0].pieces for plan in plans)


def test_complete_matrices_stay_and_shared_ones_go_to_a_holder() -> None:
    plans = plans_of((64, 172, 3), 1, 4)
    pieces = plans[0].pieces
    for number in range(len(plans[0].matrices)):
        own = [piece for piece in pieces if piece.matrix == number]
        assert plans[0].owners[number] in {piece.holder for piece in own}
        assert sum(piece.length for piece in own) == (
            plans[0].matrices[number].rows * plans[0].matrices[number].columns
        )
    assert plans[0].is_cut


def test_one_large_matrix_bounds_the_balance() -> None:
    """A matrix is computed by one rank: more than that rank's share cannot be given away."""
    holders = [[0, 1, 2]] * 4
    load = [0.0, 2.0, 0.0]
    assert balanced_owners(holders, [9.0, 1.0, 1.0, 1.0], load) == [0, 2, 2, 1]
    assert load == [9.0, 3.0, 2.0]

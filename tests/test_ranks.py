"""Who a process is, from the environment of each launcher."""

import pytest

from harness.errors import ConfigError
from harness.ranks import adopt, first_host

SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "4015063041",
}
DEEPSPEED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}


def adopted(environ: dict[str, str]) -> list[str]:
    adopt(environ)
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return [environ.get(key, "") for key in keys]


def test_each_launcher_is_understood() -> None:
    assert adopted(dict(SLURM)) == ["3", "5", "1", "2", "node07"]
    assert adopted(dict(MPI)) == ["1", "2", "1", "2", "127.0.0.1"]
    assert adopted(dict(DEEPSPEED)) == ["0", "2", "0", "", ""]
    assert adopted({}) == [""] * 5


def test_all_ranks_of_a_job_meet_at_one_port() -> None:
    ranks = [SLURM | {"SLURM_PROCID": str(rank)} for rank in range(2)]
    other = SLURM | {"SLURM_JOB_ID": "72"}
    for environ in (*ranks, other):
        adopt(environ)
    one, same, another = (environ["MASTER_PORT"] for environ in (*ranks, other))
    assert one == same != another
    assert 20000 <= int(one) < 30000


def test_what_is_set_already_stays() -> None:
    environ = SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert adopted(environ)[4] == "10.0.0.1"
    assert environ["MASTER_PORT"] == "29500"


def test_a_launcher_inside_a_step_has_the_word() -> None:
    """srun starts one torchrun or deepspeed a node, and that starts the ranks."""
    inside = DEEPSPEED | {"WORLD_SIZE": "8", "RANK": "6"}
    assert adopted(SLURM | inside) == ["6", "8", "0", "", ""]


def test_the_script_of_a_batch_job_is_no_rank() -> None:
    batch = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert adopted(batch) == [""] * 5


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (SLURM | {"RANK": "0"}, "RANK is 0, and srun says 3"),
        (SLURM | {"RANK": "3"}, "WORLD_SIZE was not: unset RANK"),
        (MPI | {"WORLD_SIZE": "1"}, "WORLD_SIZE is 1, and mpirun says 2"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        (DEEPSPEED | {"RANK": "2"}, "RANK is '2' and WORLD_SIZE is '2'"),
        (DEEPSPEED | {"RANK": "one"}, "expected a number"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR=HOST"),
    ],
)
def test_contradictions_are_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        adopt(environ)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[03-05,9],gpu1", "node03"),
        ("rack[1-2]-gpu", "rack1-gpu"),
        ("n[7],n[9]", "n7"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first

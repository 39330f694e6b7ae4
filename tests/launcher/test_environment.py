"""Who a process is, from the environment of each launcher."""

import pytest

from harness.errors import ConfigError
from harness.launcher.environment import adopt, hosts

SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_NODELIST": "node[07-08,12]",
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


def test_mpirun_inside_a_step_has_the_word() -> None:
    """In an allocation mpirun starts its daemons by srun, a task a node, and they the ranks."""
    inside = MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert adopted(SLURM | inside) == ["1", "2", "1", "2", "127.0.0.1"]


@pytest.mark.parametrize(
    ("nodes", "first"), [("a[1-4]", "a3"), ("a[1-3]", "a3"), ("a[1-2]", "a1"), ("a2", "a2")]
)
def test_a_heterogeneous_job_begins_with_its_first_component(nodes: str, first: str) -> None:
    job = SLURM | {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a[3-4]",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "a[1-2]",
        "SLURM_STEP_NODELIST": nodes,
    }
    assert adopted(job)[4] == first


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
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE is 2, and RANK is not set"),
        (DEEPSPEED | {"RANK": "2"}, "RANK is '2' and WORLD_SIZE is '2'"),
        (DEEPSPEED | {"RANK": "one"}, "expected a number"),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, "MASTER_ADDR=HOST srun"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR=HOST"),
    ],
)
def test_contradictions_are_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        adopt(environ)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "spelled_out"),
    [
        ("node1", "node1"),
        ("a,b", "a b"),
        ("node[08-10,3],gpu1", "node08 node09 node10 node3 gpu1"),
        ("rack[1-2]-gpu", "rack1-gpu rack2-gpu"),
        ("r[1-2]n[0,9]", "r1n0 r1n9 r2n0 r2n9"),
        ("n[7],n[9]", "n7 n9"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
    ],
)
def test_slurms_list_of_hosts(nodes: str, spelled_out: str) -> None:
    assert hosts(nodes) == spelled_out.split()

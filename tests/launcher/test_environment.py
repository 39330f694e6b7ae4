"""The rank of a process, from the environment of each launcher."""

import subprocess
import sys

import pytest

from harness.errors import ConfigError
from harness.launcher.environment import expand_hostlist, set_rank_variables
from tests.support.helpers import ROOT

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


def ranks_from(environ: dict[str, str]) -> list[str]:
    set_rank_variables(environ)
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return [environ.get(key, "") for key in keys]


def test_each_launcher() -> None:
    assert ranks_from(dict(SLURM)) == ["3", "5", "1", "2", "node07"]
    assert ranks_from(dict(MPI)) == ["1", "2", "1", "2", "127.0.0.1"]
    assert ranks_from(dict(DEEPSPEED)) == ["0", "2", "0", "", ""]
    assert ranks_from({}) == [""] * 5


def test_all_ranks_of_a_job_meet_at_one_port() -> None:
    ranks = [SLURM | {"SLURM_PROCID": str(rank)} for rank in range(2)]
    other = SLURM | {"SLURM_JOB_ID": "72"}
    for environ in (*ranks, other):
        set_rank_variables(environ)
    one, same, another = (environ["MASTER_PORT"] for environ in (*ranks, other))
    assert one == same != another
    assert 20000 <= int(one) < 30000


def test_what_is_set_already_stays() -> None:
    environ = SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert ranks_from(environ)[4] == "10.0.0.1"
    assert environ["MASTER_PORT"] == "29500"


def test_a_launcher_inside_a_step_takes_precedence() -> None:
    """srun starts one torchrun or deepspeed a node, and that starts the ranks."""
    inside = DEEPSPEED | {"WORLD_SIZE": "8", "RANK": "6"}
    assert ranks_from(SLURM | inside) == ["6", "8", "0", "", ""]


def test_mpirun_inside_a_step_takes_precedence() -> None:
    """In an allocation mpirun starts its daemons by srun, a task a node, and they the ranks."""
    inside = MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert ranks_from(SLURM | inside) == ["1", "2", "1", "2", "127.0.0.1"]


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
    assert ranks_from(job)[4] == first


def test_the_script_of_a_batch_job_is_not_a_rank() -> None:
    batch = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert ranks_from(batch) == [""] * 5


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (SLURM | {"RANK": "0"}, "RANK is 0, but srun set 3"),
        (SLURM | {"RANK": "3"}, "WORLD_SIZE was not: unset RANK"),
        (MPI | {"WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but mpirun set 2"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE = 2, but RANK is not set"),
        (DEEPSPEED | {"RANK": "2"}, "RANK = '2' with WORLD_SIZE = '2'"),
        (DEEPSPEED | {"RANK": "one"}, "expected an integer"),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, "MASTER_ADDR=HOST srun"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR=HOST"),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        set_rank_variables(environ)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
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
def test_slurms_hostlists(nodes: str, hosts: str) -> None:
    assert expand_hostlist(nodes) == hosts.split()


def test_the_room_imports_no_torch() -> None:
    """The entry point reports a mistake before it imports torch."""
    code = "import harness.launcher.environment, harness.launcher.parent, sys; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

"""The rank of a process, from its launcher's environment variables. Does not import torch.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and so on, which torch and DeepSpeed
read. The variables of Slurm's `srun` and Open MPI's `mpirun` are translated to these.
"""

import itertools
import os
import re
import zlib
from collections.abc import Iterator, MutableMapping

from harness.errors import ConfigError

Environment = MutableMapping[str, str]


def set_rank_variables(environ: Environment = os.environ) -> None:
    """Sets torch's variables in a process that `srun` or `mpirun` started.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; and MASTER_ADDR and MASTER_PORT, unless they are
    set. Does nothing without a launcher. Raises ConfigError if the variables contradict each other,
    or rank 0's address is unknown.
    """
    launcher, variables = "mpirun", _open_mpi(environ)  # first: it may itself use a Slurm step
    if not variables:
        launcher, variables = "srun", _slurm(environ)
    if "RANK" not in environ and not variables:
        _check_not_launched(environ)
        return
    if variables and "LOCAL_WORLD_SIZE" not in environ and "LOCAL_SIZE" not in environ:
        # No torchrun or deepspeed in between: both sets of variables describe this process.
        _check_agreement(environ, launcher, variables)
        environ.update(variables | {key: environ[key] for key in variables.keys() & environ.keys()})
    _check_ranges(environ)


def local_rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Torch's variables in a process of one machine whose parent hosts the store at that port."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _check_not_launched(environ: Environment) -> None:
    """Raises ConfigError if an unknown launcher, or a leftover variable, sets a world size."""
    for key in ("WORLD_SIZE", "PMI_SIZE"):  # the latter: MPICH's and Intel's mpirun
        if environ.get(key, "1") != "1":
            raise ConfigError(
                f"{key} = {environ[key]}, but RANK is not set: unset {key}, or start all ranks "
                "with deepspeed, torchrun, srun or Open MPI's mpirun"
            )


def _check_agreement(environ: Environment, launcher: str, variables: dict[str, str]) -> None:
    """Raises ConfigError if torch's variables were already set, to other values."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if environ.get(key, variables[key]) != variables[key]:
            raise ConfigError(
                f"{key} is {environ[key]}, but {launcher} set {variables[key]}: unset {key}, "
                f"which was set before {launcher} started this process"
            )
    if "RANK" in environ and "WORLD_SIZE" not in environ:  # rank 0 cannot detect that it is stale
        raise ConfigError(
            f"RANK was set before {launcher} started this process, but WORLD_SIZE was not: "
            "unset RANK"
        )


def _slurm(environ: Environment) -> dict[str, str]:
    """The variables of a task in a Slurm step; empty otherwise, also in a batch script."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    nodes = expand_hostlist(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    is_arbitrary = environ.get("SLURM_DISTRIBUTION") == "arbitrary" and len(nodes) > 1
    if is_arbitrary and "MASTER_ADDR" not in environ:
        raise ConfigError(
            "srun --distribution=arbitrary hides the host of rank 0: start with "
            "MASTER_ADDR=HOST srun ..."
        )
    job = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}"
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(len(environ["SLURM_GTIDS"].split(","))),
        "MASTER_ADDR": _first_host(nodes, environ),
        "MASTER_PORT": _port(job),
    }


def _first_host(nodes: list[str], environ: Environment) -> str:
    """The host of rank 0 in a step on these nodes, which are sorted by name; in a heterogeneous job
    the first host of its first component."""
    for group in range(int(environ.get("SLURM_HET_SIZE", "0"))):
        for host in expand_hostlist(environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "")):
            if host in nodes:
                return host
    return nodes[0]


def _open_mpi(environ: Environment) -> dict[str, str]:
    """The variables of a process that Open MPI's mpirun started; empty otherwise."""
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return {}
    size, local_size = (environ[f"OMPI_COMM_WORLD_{key}"] for key in ("SIZE", "LOCAL_SIZE"))
    variables = {
        "RANK": environ["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_PORT": _port(environ.get("PMIX_NAMESPACE", "")),
    }
    if size == local_size:
        variables["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in environ:
        raise ConfigError(
            "mpirun started ranks on several nodes, but does not set the address of rank 0: use "
            'mpirun -x MASTER_ADDR=HOST ... or deepspeed --launcher_args "-x MASTER_ADDR=HOST" '
            "..., where HOST is the first host of the hostfile"
        )
    return variables


def _check_ranges(environ: Environment) -> None:
    """Raises ConfigError unless each rank is a number below its size."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank not in environ or size not in environ:
            continue
        try:
            is_valid = 0 <= int(environ[rank]) < int(environ[size])
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(
                f"{rank} = {environ[rank]!r} with {size} = {environ[size]!r}: expected an integer "
                f"from 0 to {size} - 1"
            )


def expand_hostlist(nodes: str) -> list[str]:
    """Expands Slurm's hostlist: `node[08-10,3],a1` is node08, node09, node10, node3, a1.

    If a name has several brackets, the last one varies fastest.
    """
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", nodes):
        text_and_numbers = enumerate(re.split(r"\[(.*?)\]", name))
        parts = [_numbers(part) if index % 2 else [part] for index, part in text_and_numbers]
        hosts += map("".join, itertools.product(*parts))
    return hosts


def _numbers(ranges: str) -> Iterator[str]:
    """`08-10,3` is 08, 09, 10, 3."""
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}}"


def _port(job: str) -> str:
    """A port that is the same on all ranks of a job, and probably free: 20000 to 29999, below the
    ephemeral ports."""
    return str(20000 + zlib.crc32(job.encode()) % 10000)

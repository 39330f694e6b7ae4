"""Who a process is among the ranks, whatever launched it: found in the environment, without torch.

`deepspeed` and `torchrun` say it in RANK, WORLD_SIZE, LOCAL_RANK and so on, which is what torch and
DeepSpeed read. Slurm's `srun` and Open MPI's `mpirun` have names of their own: `adopt` translates.
"""

import itertools
import os
import re
import zlib
from collections.abc import Iterator, MutableMapping

from harness.errors import ConfigError

Environment = MutableMapping[str, str]


def adopt(environ: Environment = os.environ) -> None:
    """Gives the variables of torch to a process that `srun` or `mpirun` started.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; and MASTER_ADDR and MASTER_PORT, if they are not
    set. Without a launcher nothing is set. Raises ConfigError where the environment contradicts
    itself, or does not say where rank 0 is.
    """
    launcher, found = "mpirun", _open_mpi(environ)  # which in an allocation is itself a step
    if not found:
        launcher, found = "srun", _slurm(environ)
    if "RANK" not in environ and not found:
        for key in ("WORLD_SIZE", "PMI_SIZE"):  # the latter is set by MPICH's and Intel's mpirun
            if environ.get(key, "1") != "1":
                raise ConfigError(
                    f"{key} is {environ[key]}, and RANK is not set: unset it, or start all ranks "
                    "with deepspeed, torchrun, srun or Open MPI's mpirun"
                )
        return
    if found and "LOCAL_WORLD_SIZE" not in environ and "LOCAL_SIZE" not in environ:
        # No launcher of torch's or DeepSpeed's stands between: both speak of this process.
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            if environ.get(key, found[key]) != found[key]:
                raise ConfigError(
                    f"{key} is {environ[key]}, and {launcher} says {found[key]}: unset {key}, "
                    f"which was set before {launcher} started this process"
                )
        if "RANK" in environ and "WORLD_SIZE" not in environ:  # rank 0 cannot see that it is stale
            raise ConfigError(
                f"RANK was set before {launcher} started this process, and WORLD_SIZE was not: "
                "unset RANK"
            )
        environ.update(found | {key: environ[key] for key in found.keys() & environ.keys()})
    _check(environ)


def _slurm(environ: Environment) -> dict[str, str]:
    """A task of a step of Slurm's; the script of a batch job is none."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    nodes = hosts(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    is_arbitrary = environ.get("SLURM_DISTRIBUTION") == "arbitrary" and len(nodes) > 1
    if is_arbitrary and "MASTER_ADDR" not in environ:
        raise ConfigError(
            "srun --distribution=arbitrary does not say where rank 0 is: MASTER_ADDR=HOST srun ..."
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
    """Where rank 0 of a step is that has these nodes: in a heterogeneous job on the first of its
    first component, while the step's list is sorted by name."""
    for group in range(int(environ.get("SLURM_HET_SIZE", "0"))):
        for host in hosts(environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "")):
            if host in nodes:
                return host
    return nodes[0]


def _open_mpi(environ: Environment) -> dict[str, str]:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return {}
    size, local_size = (environ[f"OMPI_COMM_WORLD_{key}"] for key in ("SIZE", "LOCAL_SIZE"))
    found = {
        "RANK": environ["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_PORT": _port(environ.get("PMIX_NAMESPACE", "")),
    }
    if size == local_size:
        found["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in environ:
        raise ConfigError(
            "mpirun has started ranks on several nodes, and does not say where rank 0 is: mpirun "
            '-x MASTER_ADDR=HOST ..., or deepspeed --launcher_args "-x MASTER_ADDR=HOST" ..., '
            "HOST being the first of the hostfile"
        )
    return found


def _check(environ: Environment) -> None:
    """Raises ConfigError unless ranks are numbers below their sizes."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank not in environ or size not in environ:
            continue
        try:
            is_well = 0 <= int(environ[rank]) < int(environ[size])
        except ValueError:
            is_well = False
        if not is_well:
            raise ConfigError(
                f"{rank} is {environ[rank]!r} and {size} is {environ[size]!r}: expected a number "
                "from 0 to one below the size"
            )


def hosts(nodes: str) -> list[str]:
    """Slurm's list of hosts, one by one: `node[08-10,3],a1` is node08, node09, node10, node3, a1.

    Several brackets in a name count like digits, the last one fastest.
    """
    found: list[str] = []
    for name in re.split(r",(?![^\[]*\])", nodes):
        text_and_numbers = enumerate(re.split(r"\[(.*?)\]", name))
        parts = [_numbers(part) if place % 2 else [part] for place, part in text_and_numbers]
        found += map("".join, itertools.product(*parts))
    return found


def _numbers(ranges: str) -> Iterator[str]:
    """`08-10,3` is 08, 09, 10, 3."""
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}}"


def _port(job: str) -> str:
    """The same for all ranks of a job, and most likely free: 20000 to 29999, below those that
    systems give out themselves."""
    return str(20000 + zlib.crc32(job.encode()) % 10000)

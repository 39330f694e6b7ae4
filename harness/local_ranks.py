"""`harness.launch`: ranks on this machine, started from a script or a notebook."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from harness.api import AnyConfig, AnyTask, train
from harness.distributed.forks import end_with_parent
from harness.errors import ConfigError, HarnessError, LostRank
from harness.launcher.environment import local_rank_variables
from harness.result import Result
from harness.zero.initialize import SLOW_IMPORTS

PRELOADED = ["harness.run", *SLOW_IMPORTS]
"""Imported once without GPUs, by the process that the ranks are forked from."""
GRACE_S = 60.0
"""How long the others may take to end, once a rank has failed."""
_NAME = "harness-rank-"
"""How the processes are named."""


def launch(
    task: AnyTask | None = None,
    *,
    ranks: int,
    config: AnyConfig,
    overrides: Mapping[str, Any] | None = None,
) -> Result:
    """`harness.train` on `ranks` processes of this machine, one for each GPU or, without GPUs, on
    its CPUs. Returns when all have ended.

    Task and config are pickled: of a notebook, and of functions within functions, by `cloudpickle`,
    which must be installed. A script that calls this must do so below `if __name__ == "__main__":`,
    as ranks import it. Raises what `train` raises, once, and LostRank if a rank dies, or does not
    end though others have failed. Ctrl-C saves and ends the run.
    """
    if multiprocessing.current_process().name.startswith(_NAME):  # that imports its script
        os._exit(os.EX_USAGE)
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks}: expected at least 1")
    payload = _pickled((config, task, overrides))
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(preloaded())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stacks of C++ when a rank is lost
    # This process hosts the store, so that no other one can take its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(ranks):
            pipe, theirs = server.Pipe()
            process = server.Process(
                target=_rank, name=f"{_NAME}{rank}", args=(theirs, rank, ranks, store.port, payload)
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(pipe)
        return _outcome(_answers(pipes, processes))
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()  # which does nothing to one that has ended
            process.join()
            pipe.close()
        del store  # which an error's traceback would keep open


def preloaded() -> list[str]:
    """What the ranks' parent imports for them: nothing if that may ask for GPUs, as DeepSpeed does.
    A process that is forked after CUDA was asked cannot use it."""
    asks = torch.backends.cuda.is_built() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return [] if asks else PRELOADED


def _pickled(payload: tuple[AnyConfig, AnyTask | None, Mapping[str, Any] | None]) -> bytes:
    """Raises ConfigError if the task cannot be sent to another process."""
    if find_spec("cloudpickle"):
        import cloudpickle

        return cloudpickle.dumps(payload)
    in_notebook = not hasattr(sys.modules["__main__"], "__file__")
    try:
        if in_notebook and getattr(payload[1], "__module__", "") == "__main__":
            raise AttributeError("it is defined in a notebook")
        return pickle.dumps(payload)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the task cannot be sent to other processes: {error}: put it into a file, or "
            "pip install cloudpickle"
        ) from None


Answer = Result | Exception | None
"""What a rank returns; None after Ctrl-C."""


def _answers(pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> list[Answer]:
    """What the ranks answer, by rank, once all of them have. At Ctrl-C they are told to end."""
    answers: dict[int, Answer] = {}
    interrupted, deadline = False, None
    while len(answers) < len(pipes):
        try:
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
            ready = wait(list(waiting), deadline and max(0.0, deadline - time.monotonic()))
            # `wait` is typed for sockets and numbers as well; it returns some of what it was given.
            for rank in sorted(waiting[pipe] for pipe in ready):  # pyright: ignore[reportArgumentType]
                answers[rank] = _answer(pipes[rank], rank, processes[rank])
                if isinstance(answers[rank], Exception):
                    deadline = deadline or time.monotonic() + GRACE_S
            if not ready:
                text = f"has not ended {GRACE_S:.0f} s after another one had failed: it is killed"
                answers |= {rank: LostRank(f"rank {rank} {text}") for rank in waiting.values()}
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return [answers[rank] for rank in range(len(pipes))]


def _answer(pipe: Connection, rank: int, process: BaseProcess) -> Answer:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        process.join()
        if process.exitcode == os.EX_USAGE:
            return ConfigError(
                "the script calls harness.launch when it is imported, as the ranks do: put the "
                'call below `if __name__ == "__main__":`'
            )
        return LostRank(f"rank {rank} died with exit code {process.exitcode}: see its own output")


def _outcome(answers: Sequence[Answer]) -> Result:
    """The result of rank 0. Raises the error of the first rank that failed by itself."""
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    if errors:
        raise next((e for e in errors if not isinstance(e, LostRank)), errors[0])
    if not isinstance(answers[0], Result):
        raise KeyboardInterrupt
    return answers[0]


def _rank(pipe: Connection, rank: int, ranks: int, port: int, payload: bytes) -> None:
    """The process of a rank."""
    end_with_parent()
    # Data-loader workers must be children of this rank, so that they end with it.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= local_rank_variables(rank, ranks, port)
    answer: Answer
    try:
        answer = train(*pickle.loads(payload))
    except KeyboardInterrupt:
        answer = None
    except Exception as error:
        if not isinstance(error, HarnessError):
            error.add_note(f"rank {rank}:\n{traceback.format_exc()}")
        answer = error
    pipe.send_bytes(_sendable(answer))


def _sendable(answer: Answer) -> bytes:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception:  # an error of the task whose class is not known elsewhere
        data = pickle.dumps(HarnessError(f"{type(answer).__name__}: {answer}"))
    return data

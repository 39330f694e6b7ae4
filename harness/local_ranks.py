"""`harness.launch`: ranks on this machine, started from a script or a notebook."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from harness.api import AnyConfig, AnyTask, train
from harness.control.signals import SECONDS_OF_ONE_STOP, STOPPING
from harness.distributed.forks import end_with_parent
from harness.errors import ConfigError, HarnessError, LostRank
from harness.launcher.environment import local_rank_variables
from harness.result import Result
from harness.zero.initialize import SLOW_IMPORTS

PRELOADED = ["harness.launcher.fork_server", "harness.run", *SLOW_IMPORTS]
"""Imported once, by the process that the ranks are forked from; with GPUs only the first."""
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
    try:
        return _launched(ranks, payload)
    except _Stopped as stopped:
        number = stopped.number
    signal.raise_signal(number)
    raise HarnessError(f"the ranks were ended by {number.name}")  # its handler has returned


def _launched(ranks: int, payload: bytes) -> Result:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(preloaded())
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
        with _stops() as stops:
            return _outcome(_answers(pipes, processes, stops))
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()  # which does nothing to one that has ended
            process.join()
            pipe.close()
        del store  # which an error's traceback would keep open


class _Stopped(Exception):
    """A signal has ended the ranks."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


@contextmanager
def _stops() -> Iterator[Connection]:
    """The signals that end a run, each a byte, instead of what they would do in this process.
    None in a thread other than the main one, which alone handles signals in Python."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    process = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != process:  # forked meanwhile, by another thread
            os._exit(128 + number)
        writing.send_bytes(bytes([number]))

    is_main = threading.current_thread() is threading.main_thread()
    handled = [n for n in STOPPING if is_main and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield reading
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        reading.close()
        writing.close()


def preloaded() -> list[str]:
    """What the ranks' parent imports for them: little if that may ask for GPUs, as DeepSpeed does.
    A process that is forked after CUDA was asked cannot use it."""
    asks = torch.backends.cuda.is_built() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return PRELOADED[:1] if asks else PRELOADED


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


Answer = Result | Exception | signal.Signals
"""What a rank returns, or the signal that ended it."""


def _answers(
    pipes: Sequence[Connection], processes: Sequence[BaseProcess], stops: Connection
) -> list[Answer]:
    """What the ranks answer, by rank, once all of them have. A signal is passed on to them.

    Raises _Stopped after that, unless a rank has failed meanwhile, as when it could not save; at
    once if a second signal comes.
    """
    answers: dict[int, Answer] = {}
    stopped, stopped_at, deadline = None, 0.0, None
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait([stops, *waiting], deadline and max(0.0, deadline - time.monotonic()))
        if stops in ready:
            ready.remove(stops)
            if stopped and time.monotonic() - stopped_at > SECONDS_OF_ONE_STOP:
                raise stopped
            stopped = stopped or _Stopped(signal.Signals(stops.recv_bytes()[0]))
            stopped_at = stopped_at or time.monotonic()
            _send(stopped.number, processes)
        elif not ready:
            text = f"has not ended {GRACE_S:.0f} s after another one had failed: it is killed"
            answers |= {rank: LostRank(f"rank {rank} {text}") for rank in waiting.values()}
        # `wait` is typed for sockets and numbers as well; it returns some of what it was given.
        for rank in sorted(waiting[pipe] for pipe in ready):  # pyright: ignore[reportArgumentType]
            answers[rank] = _answer(pipes[rank], rank, processes[rank])
            if isinstance(answers[rank], Exception):
                deadline = deadline or time.monotonic() + GRACE_S
    if stopped and not any(map(_has_failed, answers.values())):
        raise stopped
    return [answers[rank] for rank in range(len(pipes))]


def _send(number: signal.Signals, processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)


def _has_failed(answer: Answer) -> bool:
    """Whether a rank has failed by itself."""
    return isinstance(answer, Exception) and not isinstance(answer, LostRank)


def _answer(pipe: Connection, rank: int, process: BaseProcess) -> Answer:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode or 0
        number = -code if code < 0 else code - 128
        if number in STOPPING:
            return signal.Signals(number)
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
        raise next(filter(_has_failed, errors), errors[0])
    for answer in answers:
        if isinstance(answer, signal.Signals):
            raise HarnessError(f"the ranks were ended by {answer.name}")
    assert isinstance(answers[0], Result)
    return answers[0]


def _rank(pipe: Connection, rank: int, ranks: int, port: int, payload: bytes) -> None:
    """The process of a rank."""
    end_with_parent()
    # Late: to import it sets handlers, which are for the ranks and their parent only.
    from harness.launcher.fork_server import end_by_signals

    end_by_signals()
    # Data-loader workers must be children of this rank, so that they end with it.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= local_rank_variables(rank, ranks, port)
    answer: Answer
    try:
        answer = train(*pickle.loads(payload))
    except KeyboardInterrupt:
        answer = signal.SIGINT
    except Exception as error:
        if not isinstance(error, HarnessError):
            error.add_note(f"rank {rank}:\n{traceback.format_exc()}")
        answer = error
    with suppress(BrokenPipeError):  # who has started it is gone
        pipe.send_bytes(_sendable(answer))


def _sendable(answer: Answer) -> bytes:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception:  # an error of the task whose class is not known elsewhere
        data = pickle.dumps(HarnessError(f"{type(answer).__name__}: {answer}"))
    return data

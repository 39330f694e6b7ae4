"""All-reduces in the background, in a thread that passes their numbers along the tree."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from torch import Tensor

from harness.distributed import tree
from harness.distributed.abort import shut_sockets
from harness.distributed.world import global_rank, next_tag, world_size
from harness.waiting import in_collective

SECONDS_TO_END = 1.0
"""How long `close` waits for an exchange in progress, whose other ranks may be gone."""

_Job = tuple[Future[None], Callable[[], None]]


class _Thread:
    """Does one thing after the other, in the order that they are asked for on every rank."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # Not an executor: its thread would be waited for at the end of the process.
        self._thread = threading.Thread(target=self._run, name="exchanges", daemon=True)
        self._thread.start()

    def submit(self, do: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((future, do))
        return future

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(SECONDS_TO_END)
        if self._thread.is_alive():
            # It must not wake up as the interpreter ends: that would abort the process.
            shut_sockets()
            self._thread.join(SECONDS_TO_END)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, do = job
            try:
                do()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)


_thread: _Thread | None = None


class AllReduce:
    """An all-reduce between its `start` and its `wait`. Every rank must start it at the same point;
    nothing waits for another rank until `wait`."""

    def __init__(self, combine: tree.Combine):
        self._combine = combine
        self._tensor: Tensor | None = None
        self._working: Future[None] | None = None

    def start(self, tensor: Tensor) -> None:
        """Contributes this rank's tensor, which is overwritten."""
        global _thread
        self._tensor = tensor
        if world_size() == 1:
            return
        _thread = _thread or _Thread()
        place, tag = tree.place_of(global_rank(), range(world_size()), 0), next_tag()
        self._working = _thread.submit(lambda: tree.all_reduce(tensor, self._combine, place, tag))

    def wait(self) -> Tensor | None:
        """What all ranks have contributed, combined; None if it was not started. Blocks."""
        tensor, self._tensor = self._tensor, None
        working, self._working = self._working, None
        if working is not None:
            with in_collective:
                working.result()
        return tensor


def close() -> None:
    """Ends the thread, as this process leaves the world."""
    global _thread
    thread, _thread = _thread, None
    if thread is not None:
        thread.close()

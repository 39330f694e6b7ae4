"""Ends a process without the tear-down of its interpreter, which takes a second after torch."""

import atexit
import ctypes
import logging
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)

SECONDS_TO_A_WORD = 3.0
"""After which it is told what keeps the process from its end."""


def leave_after(main: Callable[[], object]) -> NoReturn:
    """Calls `main`, and ends the process as Python would at its end: it waits for the threads that
    are not daemons, calls what is registered with `atexit`, the last first, and flushes the
    streams. Then the process exits with the code of `sys.exit`, 0 if `main` returns. It is logged
    what takes long.

    Modules and objects are not destroyed one by one: no `__del__` is called, nor what C++ libraries
    have registered. For a process that has nothing to do afterwards. An exception is raised.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int | None):  # a message, which Python prints
            raise
        code = end.code or 0
    timer = threading.Timer(SECONDS_TO_A_WORD, _tell)
    timer.daemon = True
    timer.start()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # a closed terminal does not change the code
            stream.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code & 0xFF)


def _tell() -> None:
    """Logs what the process waits for."""
    main = threading.main_thread()
    threads = [
        thread for thread in threading.enumerate() if not thread.daemon and thread is not main
    ]
    waits = [f"the thread {thread.name!r}, {_place(thread)}" for thread in threads]
    waits += [
        f"the process {child.pid} ({child.name})"
        for child in multiprocessing.active_children()
        if not child.daemon
    ]
    log.warning(
        "the run is over, but this process does not end: it waits for %s: let it end with the "
        "run, or make it a daemon",
        "; ".join(waits) or f"a function registered with atexit, {_place(main)}",
    )


def _place(thread: threading.Thread) -> str:
    """Where a thread is."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "which has ended"
    place = traceback.extract_stack(frame)[-1]
    return f"in {place.name} ({Path(place.filename).name}:{place.lineno})"

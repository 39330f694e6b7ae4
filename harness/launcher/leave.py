"""Ends a process without the tear-down of its interpreter, which takes a second after torch."""

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def leave_after(main: Callable[[], object]) -> NoReturn:
    """Calls `main`, and ends the process as Python would at its end: it waits for the threads that
    are not daemons, calls what is registered with `atexit`, the last first, and flushes the
    streams. Then the process exits with the code of `sys.exit`, 0 if `main` returns.

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
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # a closed terminal does not change the code
            stream.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code & 0xFF)

"""Runs that are given commands, on standard input, and what their ranks execute."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness.config import Config
from harness.control.bus import Ticket
from harness.run import run_in_world
from harness.trainer import Trainer

History = list[tuple[int, str, str]]
"""What a rank has executed: `(step, front, command)`."""


@contextmanager
def recorded() -> Iterator[History]:
    """Records what this rank executes."""
    history: History = []
    execute = Trainer.execute

    def and_record(self: Trainer, ticket: Ticket) -> None:
        history.append((self.engines.global_step, ticket.front, ticket.text))
        execute(self, ticket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "execute", and_record)
        yield history


def commanded(config: Config, text: str) -> tuple[History, str]:
    """A run that has `text` on its standard input before its first step.

    Returns what this rank executed, and its log.
    """
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    old_stdin, sys.stdin = sys.stdin, os.fdopen(reading)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    train = Trainer.train

    def once_all_is_read(self: Trainer) -> int:
        while any(thread.name == "stdin" for thread in threading.enumerate()):
            time.sleep(0.01)
        return train(self)

    with recorded() as history, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", once_all_is_read)
        patch.setattr("harness.control.stdin.write_to_terminal", messages.append)
        logging.getLogger("harness").addHandler(handler)
        try:
            run_in_world(config)
        finally:
            sys.stdin = old_stdin
            logging.getLogger("harness").removeHandler(handler)
    return history, "\n".join(messages)

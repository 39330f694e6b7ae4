"""How a run takes commands: which there are, the bus, and on rank 0 its fronts and audit log."""

import logging
from contextlib import ExitStack
from functools import partial
from inspect import getdoc

from harness import distributed
from harness.config import Config
from harness.control.audit import Audit
from harness.control.bus import Bus
from harness.control.grammar import Grammar
from harness.control.live import LiveConfig, live_keys
from harness.control.signals import Signals
from harness.control.socket import SocketFront
from harness.control.stdin import StdinFront
from harness.engine.engines import Engines
from harness.errors import CommandError, ConfigError
from harness.execute import answer
from harness.metrics.status import Status
from harness.task import Task

log = logging.getLogger(__name__)


def find_commands(task: Task, engines: Engines, config: Config) -> Grammar:
    """The commands of this run. Collective. Raises ConfigError, on all ranks, if the config has an
    event that is not one of them."""
    helps = {name: getdoc(function) or "" for name, function in task.commands.items()}
    names = [engine.name for engine in engines.trained]
    grammar = Grammar(names, helps, engines.groups(), live_keys(config))
    with distributed.raise_on_all_ranks("events"):
        for number, event in enumerate(config.events):
            try:
                grammar.check_event(event.command)
            except CommandError as error:
                raise ConfigError(f"events.{number}.command: {error}") from None
    return grammar


def open_control(
    grammar: Grammar,
    engines: Engines,
    live: LiveConfig,
    signals: Signals,
    status: Status,
    stack: ExitStack,
) -> Bus:
    """The bus, and on rank 0 its audit log and its fronts. Collective."""
    config = live.config
    audit = None
    with distributed.raise_on_all_ranks(f"run directory {config.run_dir}"):
        if distributed.is_global_leader():
            audit = Audit(config.run_dir / "commands.jsonl")
            stack.callback(audit.close)
    answer_query = partial(answer, status=status, live=live, engines=engines, grammar=grammar)
    bus = Bus(grammar, signals, answer_query, audit)
    if distributed.is_global_leader():
        _open_fronts(config, bus, stack)
    return bus


def _open_fronts(config: Config, bus: Bus, stack: ExitStack) -> None:
    """Opens the sources of commands; the bus answers pending commands before they close."""
    if config.control.socket:
        try:
            stack.callback(SocketFront(bus, config.run_dir).close)
        except OSError as error:  # e.g. a file system without sockets: train anyway
            log.warning(
                "`harness ctl` is not available: cannot create a socket in %s: %s",
                config.run_dir,
                error,
            )
    stack.callback(bus.close)
    if config.control.stdin:
        stack.callback(StdinFront(bus).close)

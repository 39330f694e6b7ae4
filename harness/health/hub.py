"""The place where the watchdogs of all ranks meet: in the watchdog of rank 0.

Nothing is sent as long as all is well. When a watchdog finds that its rank takes too long, the hub
asks all of them, judges, has the stacks written, and tells all of them the verdict.
"""

import math
import secrets
import socket
from time import monotonic

from harness.health.lines import Lines, Message
from harness.health.verdict import Report, Verdict, is_due, judge, narrowed, told

SECONDS_TO_MEET = 30.0
"""For the watchdogs of all ranks, once the first is here."""
SECONDS_TO_ANSWER = 3.0
"""For a report: a watchdog has nothing else to do."""
SECONDS_TO_DUMP = 6.0
"""For the stacks."""
SECONDS_BETWEEN_INQUIRIES = 2.0
SECONDS_TO_FAIL = 25.0
"""What a rank that fails, and those that lose it, have to end by themselves
(`rescue.SECONDS_TO_FAIL_TOGETHER`, and those of `distributed.failures`)."""


class Hub:
    """Listens on a port of its own for the watchdogs of the ranks."""

    def __init__(self, world_size: int, is_local: bool):
        """`is_local`: all ranks are on this node."""
        self._world_size = world_size
        dual = not is_local and socket.has_dualstack_ipv6()
        self.listener = socket.create_server(
            ("127.0.0.1" if is_local else "", 0),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
        )
        self.port = self.listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        """What a watchdog must know."""
        self.members: dict[Lines, Report | None] = {}
        """The watchdogs, each with its last report; None before it has told who it is."""
        self._met: set[int] = set()  # the ranks whose watchdogs have been here
        self._complete_at = math.inf  # from then on it judges without those that have not
        self._vanished: dict[int, Report] = {}
        self._asked: set[Lines] = set()
        """Those whose answer is missing."""
        self._until: float | None = None  # then the inquiry goes on without them
        self._next = 0.0  # no inquiry before
        self._verdict: Verdict | None = None
        self._places: dict[int, str] = {}
        self._stacks: dict[int, str] = {}  # where they are
        self._in_collectives: set[int] = set()

    def accept(self) -> None:
        """A watchdog connects."""
        connection, _ = self.listener.accept()
        connection.settimeout(SECONDS_TO_ANSWER)
        self.members[Lines(connection)] = None

    def read(self, member: Lines) -> None:
        """Messages of a watchdog, or its end."""
        for message in member.read():
            self._receive(member, message)
        if member in self.members and not member.is_open:
            self._remove(member)

    def _receive(self, member: Lines, message: Message) -> None:
        if member not in self.members:
            return
        if self.members[member] is None and message.get("token") != self.token:
            self._remove(member)
        elif "fails" in message:
            self._next = monotonic() + SECONDS_TO_FAIL
        elif "bye" in message:
            self.members.pop(member)
            self._asked.discard(member)
            member.close()
        elif "report" in message:
            self.members[member] = report = Report(**message["report"])
            self._asked.discard(member)
            self._met.add(report.rank)
            self._complete_at = min(self._complete_at, monotonic() + SECONDS_TO_MEET)
        elif "place" in message:
            self._places[message["rank"]] = message["place"]
            self._stacks[message["rank"]] = message["stacks"]
            if message["waits"]:
                self._in_collectives.add(message["rank"])
            self._asked.discard(member)
        elif "overdue" in message and self._until is None and self._may_ask():
            self._ask(SECONDS_TO_ANSWER, ask="report")

    def _may_ask(self) -> bool:
        is_complete = len(self._met) == self._world_size or monotonic() >= self._complete_at
        return is_complete and monotonic() >= self._next

    def tick(self) -> None:
        """Goes on with an inquiry once all have answered, or no longer can."""
        if self._until is None or (self._asked and monotonic() < self._until):
            return
        self._until = None
        if self._verdict is not None:
            verdict = narrowed(self._verdict, self._in_collectives)
            self._verdict, self._next = None, monotonic() + SECONDS_BETWEEN_INQUIRIES
            if not is_due(verdict):
                return
            first = verdict.guilty[0]
            where = self._stacks.get(first.rank) or next(iter(self._stacks.values()), "")
            text = told(verdict, self._places, where)
            everyone = len(verdict.guilty) > 1 and not verdict.waiting
            self._tell(
                verdict={
                    "kind": verdict.kind,
                    "reason": text,
                    "rank": None if everyone else first.rank,
                    "host": None if everyone else first.host,
                    "step": first.step,
                    "phase": first.phase,
                }
            )
            return
        silent = {report.rank: report for m in self._asked if (report := self.members[m])}
        answered = [report for m, report in self.members.items() if report and m not in self._asked]
        self._verdict = judge(answered, self._vanished | silent)
        if self._verdict is None:
            self._next = monotonic() + SECONDS_BETWEEN_INQUIRIES
        else:
            self._places, self._stacks, self._in_collectives = {}, {}, set()
            self._ask(SECONDS_TO_DUMP, ask="stacks")

    def _ask(self, seconds: float, **message: str) -> None:
        self._asked = {member for member, report in self.members.items() if report is not None}
        self._until = monotonic() + seconds
        self._tell(**message)

    def _tell(self, **message: object) -> None:
        for member in list(self.members):
            member.send(**message)

    def _remove(self, member: Lines) -> None:
        report = self.members.pop(member)
        self._asked.discard(member)
        if report is not None:
            self._vanished[report.rank] = report
        member.close()

"""Whether a phase takes too long, and which of the ranks the others wait for.

Pure functions of what the ranks' watchdogs report.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from harness.errors import first_few
from harness.health.phases import FIRST, Phase

FACTOR = 10.0
"""A bound, as a multiple of the longest time that the phase took."""
BELOW_TIMEOUT = 0.95
"""No bound that is not set exceeds this part of run.timeout_s, so that the watchdogs name the rank
that hangs before the collectives of the others fail."""
FLOORS: dict[Phase, float] = {
    "start": math.inf,  # as long as run.timeout_s allows
    "data": 300.0,
    "forward": 300.0,
    "backward": 300.0,
    "step": 300.0,
    "save": 900.0,
    "evaluation": 900.0,
    "export": 900.0,
    "commands": 900.0,
    "upload": math.inf,
    "paused": math.inf,
    "end": 300.0,
}
"""Seconds below which no bound is learned."""
ENDLESS: tuple[Phase, ...] = ("paused", "upload")
"""Phases that take as long as somebody else does: who has paused the run, the store."""


@dataclass(frozen=True)
class Report:
    """What a rank's watchdog tells of it."""

    rank: int
    host: str
    phase: Phase
    step: int
    count: int
    """Phases entered so far. The ranks run the same loop, so the lowest count is of those that the
    others wait for."""
    seconds: float
    """Since the last sign of life."""
    bound: float
    """Seconds, for this phase."""
    patience: float = math.inf
    """Seconds after which a collective that it waits in is about to fail."""
    is_stopped: bool = False
    """By SIGSTOP."""
    is_debugged: bool = False

    @property
    def is_overdue(self) -> bool:
        """Whether the phase takes too long."""
        return self.seconds > self.bound and not self.is_debugged


@dataclass(frozen=True)
class Verdict:
    """A hang, or ranks that do not answer any more."""

    kind: str
    """Of the run's outcome: "hang", or "lost_rank"."""
    guilty: list[Report]
    """The ranks that the others wait for."""
    waiting: list[Report]


def bound_of(
    phase: Phase,
    longest: float,
    times: float,
    timeout_s: float,
    timeouts: Mapping[str, float | None],
) -> float:
    """Seconds after which a phase is a hang.

    `longest` and `times`: how long it took in this run, and how often. `timeouts`: the table
    `health.timeouts`.
    """
    if phase in ENDLESS:
        return math.inf
    most, chosen = BELOW_TIMEOUT * timeout_s, timeouts.get(phase)
    if chosen == 0:
        return math.inf
    is_first = phase not in ("start", "end") and times < FIRST
    if chosen is not None:
        return max(chosen, most) if is_first else chosen
    return most if is_first else min(most, max(FLOORS[phase], FACTOR * longest))


def judge(reports: Sequence[Report], vanished: Mapping[int, Report]) -> Verdict | None:
    """Whether the run hangs, and because of whom. None if not, or not yet.

    `reports`: of the ranks that answer; `vanished`: the last ones of those that do not any more.
    """
    if not any(report.is_overdue for report in reports):
        return None
    if vanished:
        return Verdict("lost_rank", list(vanished.values()), list(reports))
    last = min(report.count for report in reports)
    behind = [report for report in reports if report.count == last]
    if not any(report.is_overdue for report in behind):
        return None  # the others wait for a phase that may still end
    if stopped := [report for report in behind if report.is_stopped]:
        behind = stopped
    return Verdict("hang", behind, [report for report in reports if report not in behind])


def narrowed(verdict: Verdict, waiting: Collection[int]) -> Verdict:
    """The verdict, once stacks tell which ranks are in a collective: at ZeRO stage 3, for instance,
    the others wait in the phase of the one that hangs."""
    guilty = [report for report in verdict.guilty if report.rank not in waiting]
    if verdict.kind != "hang" or not guilty:
        return verdict
    others = [report for report in verdict.guilty if report.rank in waiting]
    return Verdict("hang", guilty, others + verdict.waiting)


def is_due(verdict: Verdict) -> bool:
    """Whether it is to be told, once it is narrowed. While the guilty ones are at work, as a start
    is that computes or reads, they are waited for as long as the others' collectives allow."""
    if verdict.kind != "hang" or any(report.is_overdue for report in verdict.guilty):
        return True
    return any(report.seconds > report.patience for report in verdict.waiting)


def told(verdict: Verdict, places: Mapping[int, str], stacks: str) -> str:
    """The verdict in words. `places`: what each rank's main thread does; `stacks`: where its stack
    and those of all threads are."""
    texts = []
    for group in _groups(verdict.guilty, places):
        first, names = group[0], _names(group)
        hosts = f" on {first_few(sorted({report.host for report in group}))}"
        state = f"in phase {first.phase} of step {first.step}"
        if verdict.kind == "lost_rank":
            texts.append(f"{names}{hosts}: no answer; last {state}")
            continue
        stopped = ", stopped (SIGSTOP)" if first.is_stopped else ""
        doing = places.get(first.rank)
        where = f"{state}{stopped}{f', in {doing}' if doing else ''}"
        seconds = max(report.seconds for report in group)
        texts.append(
            f"{names}{hosts}: no sign of life for {seconds:.0f} s {where} (its bound is "
            f"{first.bound:.0f} s)"
            if any(report.is_overdue for report in verdict.guilty)
            else f"{names}{hosts}: still at work {where}, for longer than the others can wait: if "
            "it takes that long, set a larger run.timeout_s"
        )
    for group in _groups(verdict.waiting, places):
        doing = places.get(group[0].rank)
        verb = "waits" if len(group) == 1 else "wait"
        state = f"in phase {group[0].phase} of step {group[0].step}"
        texts.append(f"{_names(group)} {verb} {state}{f', in {doing}' if doing else ''}")
    what = "the run hangs" if verdict.kind == "hang" else "the run has lost a rank"
    return f"{what}: {'; '.join(texts)}. {stacks}"


def told_waiting(report: Report, place: str, stacks: str) -> str:
    """The verdict on a rank that waits in a collective, where no other rank can be asked."""
    return (
        f"the run hangs: rank {report.rank} on {report.host} has waited for {report.seconds:.0f} s "
        f"in phase {report.phase} of step {report.step}, in {place} (its bound is "
        f"{report.bound:.0f} s); for whom is not known, as the watchdog of rank 0 does not answer: "
        f"its node is down, stopped or cut off. {stacks}"
    )


def _groups(reports: Sequence[Report], places: Mapping[int, str]) -> list[list[Report]]:
    """Those that do the same."""
    groups: dict[object, list[Report]] = {}
    for report in sorted(reports, key=lambda report: report.rank):
        doing = places.get(report.rank)
        groups.setdefault((report.phase, report.step, report.is_stopped, doing), []).append(report)
    return list(groups.values())


def _names(group: Sequence[Report]) -> str:
    ranks = first_few([report.rank for report in group])
    return f"rank{'s' if len(group) > 1 else ''} {ranks}"

"""Where watchdogs meet: over several nodes, with strangers, and with members that fall silent."""

import socket
from collections.abc import Iterator
from dataclasses import asdict
from select import select
from typing import Any

import pytest

from harness.health import hub as hub_module
from harness.health.hub import Hub
from harness.health.lines import Lines, Message
from harness.health.verdict import Report


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_module, "SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(hub_module, "SECONDS_TO_DUMP", 0.2)
    found = Hub(3, is_local=False)
    yield found
    for member in found.members:
        member.close()
    found.listener.close()


def report(rank: int, count: int = 80, seconds: float = 400.0) -> dict[str, Any]:
    return asdict(Report(rank, f"node{rank}", "backward", 12, count, seconds, bound=300.0))


def serve(hub: Hub) -> None:
    """All that has arrived."""
    while ready := select([hub.listener, *hub.members], [], [], 0.1)[0]:
        for source in ready:
            if isinstance(source, Lines):
                hub.read(source)
            else:
                hub.accept()
    hub.tick()


def joined(hub: Hub, rank: int, token: str | None = None) -> Lines:
    member = Lines(socket.create_connection(("127.0.0.1", hub.port), 5))
    member.send(token=hub.token if token is None else token, report=report(rank))
    serve(hub)
    return member


def heard(member: Lines) -> list[Message]:
    return member.wait(1.0)


def test_one_that_is_overdue_makes_it_ask_all_and_tell_all(hub: Hub) -> None:
    members = [joined(hub, rank) for rank in range(3)]
    members[2].send(overdue=True)
    serve(hub)
    assert [heard(member) for member in members] == [[{"ask": "report"}]] * 3
    for rank, member in enumerate(members):
        member.send(report=report(rank, count=79 if rank == 1 else 80))
    serve(hub)
    assert [heard(member) for member in members] == [[{"ask": "stacks"}]] * 3
    for rank, member in enumerate(members):
        member.send(rank=rank, place=f"place{rank}", waits=rank != 1, stacks="Stacks: S.")
    serve(hub)
    verdicts = [heard(member)[0]["verdict"] for member in members]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert (verdicts[0]["kind"], verdicts[0]["rank"], verdicts[0]["host"]) == ("hang", 1, "node1")
    assert "in place1 (its bound" in verdicts[0]["reason"]
    assert verdicts[0]["reason"].endswith("Stacks: S.")


def test_it_waits_until_all_have_been_there(hub: Hub) -> None:
    """Else the one that all wait for might be missing."""
    members = [joined(hub, rank) for rank in range(2)]
    members[0].send(overdue=True)
    serve(hub)
    assert members[1].wait(0.1) == []


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_one_that_does_not_answer_is_lost(hub: Hub, how: str) -> None:
    members = [joined(hub, rank) for rank in range(3)]
    if how == "closed":
        members[2].close()
    members[0].send(overdue=True)
    serve(hub)
    for rank in (0, 1):
        members[rank].send(report=report(rank))
    for _ in range(5):  # until their time is over, twice
        serve(hub)
    *_, last = heard(members[0])
    assert (last["verdict"]["kind"], last["verdict"]["rank"]) == ("lost_rank", 2)
    assert "rank 2 on node2: no answer" in last["verdict"]["reason"]


def test_one_that_ends_well_is_not_missed(hub: Hub) -> None:
    members = [joined(hub, rank) for rank in range(3)]
    members[2].send(bye=True)
    serve(hub)
    members[0].send(overdue=True)
    serve(hub)
    for rank in (0, 1):
        members[rank].send(report=report(rank, seconds=1.0))
    serve(hub)
    assert [heard(member) for member in members[:2]] == [[{"ask": "report"}]] * 2
    assert members[0].wait(0.1) == []


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b'{"report": {}}\n', b"\xff\n", b"7\n"]
)
def test_strangers_are_sent_away(hub: Hub, words: bytes) -> None:
    stranger = socket.create_connection(("127.0.0.1", hub.port), 5)
    stranger.sendall(words)
    serve(hub)
    assert stranger.recv(100) == b"" and not hub.members
    assert joined(hub, 0, token="guessed").wait(1.0) == [] and not hub.members

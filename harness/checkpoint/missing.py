"""How it is told that files of a checkpoint are not here, and where they lie."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MOST = 6  # files, writers or hosts that are named


def writer(rank: int, hosts: Sequence[str]) -> str:
    """Who wrote a file. `hosts`: by rank, as the manifest has them."""
    return f"rank {rank} on host {hosts[rank]}" if 0 <= rank < len(hosts) else "an unknown rank"


def told(directory: Path, files: Mapping[str, str], hosts: Iterable[str]) -> str:
    """One line. `files`: the missing ones with their `writer`. `hosts`: where they are missing."""
    by_writer: dict[str, list[str]] = {}
    for name, who in files.items():
        by_writer.setdefault(who, []).append(name)
    groups = [
        f"{_some(names, ', ')} {'are' if len(names) > 1 else 'is'} missing, written by {who}"
        for who, names in by_writer.items()
    ]
    where = sorted(set(hosts))
    return (
        f"{directory} on host{'s' if len(where) > 1 else ''} {_some(where, ', ')}: "
        f"{_some(groups, '; ')}: copy from there what is missing into the same directory"
    )


def _some(texts: Sequence[str], between: str) -> str:
    more = len(texts) - MOST
    return between.join(texts[:MOST]) + (f" and {more} more" if more > 0 else "")

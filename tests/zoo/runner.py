"""Trains entries in layouts on pools of ranks, and compares each run with the plain loop."""

import shutil
from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from harness.testing.pool import RankError
from tests.support.helpers import Pools
from tests.zoo import plain
from tests.zoo.compare import Difference, compare
from tests.zoo.entry import Entry, Layout
from tests.zoo.under_harness import config_of, result, run_all


class Outcome(NamedTuple):
    """What came of an entry in a layout: a difference, or else an error."""

    entry: Entry
    layout: Layout
    difference: Difference | None
    error: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it trained as the plain loop does, within the tolerance."""
        tolerance = self.entry.tolerance(self.layout.precision)
        return self.difference is not None and self.difference.largest <= tolerance

    def __str__(self) -> str:
        return f"{self.entry.name}, {self.layout}: {self.difference or self.error.strip()}"


def train(pools: Pools, directory: Path, entry: Entry, layouts: Sequence[Layout]) -> list[Outcome]:
    """The outcomes of an entry in these layouts; those of one number of ranks in one call."""
    expect = cache(partial(plain.train, entry))
    outcomes = []
    for ranks, group in groupby(sorted(layouts, key=_ranks), key=_ranks):
        chosen = list(group)
        configs = [config_of(entry, layout, directory) for layout in chosen]
        try:
            errors = pools(ranks).run(run_all, configs)[0]
        except RankError as error:
            if len(chosen) == 1:
                errors = [str(error)]
            else:  # which of them?
                for layout in chosen:
                    outcomes += train(pools, directory, entry, [layout])
                continue
        for layout, config, error in zip(chosen, configs, errors, strict=True):
            difference = None
            if not error:
                expected, start = expect(layout._replace(stage=0))
                difference = compare(result(config, expected.tensors), expected, start)
            outcomes.append(Outcome(entry, layout, difference, error))
            shutil.rmtree(config.run_dir, ignore_errors=True)
    return outcomes


def _ranks(layout: Layout) -> int:
    return layout.ranks

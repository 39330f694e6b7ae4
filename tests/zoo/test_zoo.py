"""Every entry of the zoo against plain PyTorch: half of them in one layout each, or with --slow all
in all.

The layouts of the quick runs go round: neighbours differ in stage, precision, ranks, accumulation.
"""

from pathlib import Path

import pytest

from tests.support.helpers import Pools
from tests.zoo import table
from tests.zoo.entry import LAYOUTS, Entry, Layout
from tests.zoo.models import ZOO
from tests.zoo.runner import train

ENTRIES = [pytest.param(entry, id=name) for name, entry in ZOO.items()]


def quick_layout(entry: Entry) -> Layout:
    """One of the layouts, in turn."""
    layout = LAYOUTS[list(ZOO).index(entry.name) * 11 % len(LAYOUTS)]
    return layout if layout in entry.layouts() else layout._replace(stage=2)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=() if (n + n // 4) % 2 == 0 else pytest.mark.slow)
        for n, (name, entry) in enumerate(ZOO.items())
    ],
)
def test_an_entry_equals_plain_pytorch_in_one_layout(
    pools: Pools, tmp_path: Path, entry: Entry
) -> None:
    (outcome,) = train(pools, tmp_path, entry, [quick_layout(entry)])
    assert outcome.is_ok, str(outcome)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_equals_plain_pytorch_in_all_layouts(
    pools: Pools, tmp_path: Path, entry: Entry
) -> None:
    outcomes = train(pools, tmp_path, entry, entry.layouts())
    assert len(outcomes) == len(entry.layouts())
    assert not [str(outcome) for outcome in outcomes if not outcome.is_ok]


def test_what_the_table_in_the_docs_shows_is_within_the_tolerances() -> None:
    rows = table.rows()
    assert list(rows) == list(ZOO)
    for name, line in rows.items():
        entry = ZOO[name]
        _, _, tolerance, *cells, _ = (cell.strip() for cell in line.split("|"))
        assert tolerance == f"{entry.fp32:.0e}, {entry.bf16:.0e}"
        columns = zip(table.COLUMNS, cells, strict=True)
        found = {column: float(cell) for column, cell in columns if cell}
        assert found.keys() == {(each.precision, each.stage) for each in entry.layouts()}
        assert all(value <= 1.05 * entry.tolerance(p) for (p, _), value in found.items())

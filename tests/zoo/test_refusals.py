"""What is not trained is refused with a remedy, at every ZeRO stage, before anything moves."""

import re
from pathlib import Path

import pytest

from harness.config import Config
from harness.testing.pool import RankPool
from tests.support.helpers import error_of
from tests.support.quick import quick
from tests.zoo.entry import STAGES, Entry, Layout
from tests.zoo.refused import REFUSED
from tests.zoo.under_harness import config_of


def errors_of(configs: list[Config]) -> list[str]:
    """The error of each run on this rank."""
    return [error_of(config) for config in configs]


@pytest.mark.parametrize("among", quick(["all stages", "the ends"], "the ends"))
@pytest.mark.parametrize(("entry", "message"), REFUSED, ids=[entry.name for entry, _ in REFUSED])
def test_what_no_layout_trains_is_refused(
    two_ranks: RankPool, tmp_path: Path, entry: Entry, message: str, among: str
) -> None:
    stages = STAGES[1:] if entry.name == "muon-deepspeed" else STAGES  # at 0 it clips the gradients
    stages = stages if among == "all stages" else (stages[0], stages[-1])
    configs = [config_of(entry, Layout(stage, "fp32", 2, 1), tmp_path) for stage in stages]
    for errors in two_ranks.run(errors_of, configs):
        for error in errors:
            assert re.search(message, error), error
    for config in configs:
        assert not list(config.run_dir.glob("checkpoints/step-*"))
        metrics = config.run_dir / "metrics.jsonl"
        assert not metrics.exists() or not metrics.read_text()

"""The documentation: the site is built from it without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site: `--strict` makes of each link or anchor that leads nowhere an error."""
    for package in ("material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the site needs {package}: pip install -e '.[docs]'")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run([*command, str(place)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_the_front_page_is_the_readme(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert 'href="control.html"' in page
    assert 'src="images/report.png"' in page
    assert "```" not in page  # also inside of its HTML, Markdown is rendered


def test_what_pages_link_to_outside_of_the_docs_is_shown(site: Path) -> None:
    assert 'href="source/harness/task.py.html"' in (site / "task.html").read_text()
    assert "def build(config" in text_of(site / "source/launch/tasks/lm.py.html")
    assert "zero3.json" in text_of(site / "source/ds_configs.html")


def test_the_reference_is_made_from_the_code(site: Path) -> None:
    assert "Optimizer steps of the complete run" in text_of(site / "reference/config.html")
    assert "--max-restarts N" in text_of(site / "reference/cli.html")
    assert "lr ENGINE[/GROUP] xFACTOR" in text_of(site / "reference/commands.html")
    api = text_of(site / "reference/api.html")
    assert "Zhai, Kolesnikov, Houlsby and Beyer" in api  # of a schedule
    assert "apollo_param_groups" in api


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]*>", "", page.read_text())

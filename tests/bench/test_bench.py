"""`python -m bench`: what its sections are, how they end, and the table. None of them is run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import loop
from bench.bounded import ROOT, Ended, run_bounded
from bench.rows import FILE, Row, line_of, read_rows, tell, tell_pair


def test_sections_are_benchmarks_with_these_options_within_ten_minutes() -> None:
    for name, section in bench.SECTIONS.items():
        spec = importlib.util.find_spec(f"bench.{section.module or name}")
        assert spec is not None and spec.origin is not None, name
        words = f"{section.always} {section.quick or ''}".split()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in Path(spec.origin).read_text(), (name, option)
    quick = [section for section in bench.SECTIONS.values() if section.quick is not None]
    assert sum(section.limit for section in quick) <= 600


def test_a_process_ends_by_itself_or_at_its_limit(tmp_path: Path) -> None:
    how = {
        "ok": "print(1)",
        "exit code 3": "raise SystemExit(3)",
        "ended at its limit of 1 s": f"import os, time; open({str(tmp_path / 'pid')!r}, 'w')"
        ".write(str(os.getpid())); time.sleep(60)",
    }
    for expected, code in how.items():
        assert run_bounded([sys.executable, "-S", "-c", code], 1, {}).how == expected
    pid = (tmp_path / "pid").read_text()
    assert not Path(f"/proc/{pid}").exists()


def test_rows_are_kept_only_for_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows"
    tell(Row("nobody asks", 1, "s"))
    assert read_rows(file) == []
    monkeypatch.setenv(FILE, str(file))
    tell_pair("a save", "s", [1.0, 3.0], "cp", [2.0, 2.0])
    tell(Row("added", 0.5, "ms", note="1 %"))
    with pytest.raises(ValueError, match="two rows of the same name"):
        tell(Row("added", 0.7, "ms"))
    rows = read_rows(file)
    assert rows == [Row("a save", 2, "s", "cp", 2, 0.5, 1.5), Row("added", 0.5, "ms", note="1 %")]
    assert line_of(rows[0]) == "| a save | 2 s | cp | 2 | 1 | 0.5 .. 1.5 |  |"
    assert line_of(rows[1]) == "| added | 0.5 ms |  |  |  |  | 1 % |"


def test_growth_below_the_noise_has_no_exponent() -> None:
    sizes = 1, 10, 100
    assert loop.exponent(sizes, [2.0, 20.0, 200.0]) == pytest.approx(1)
    assert loop.exponent(sizes, [2.0, -0.1, 200.0]) is None


def test_a_section_that_fails_is_told_and_the_others_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, quick: bool) -> tuple[Ended, list[Row]]:
        assert quick
        return Ended("exit code 1" if name == "save" else "ok", 2.5, "no disk\n"), [
            Row(name, 1, "s")
        ]

    monkeypatch.setattr(bench, "run", run)
    file = tmp_path / "found.json"
    words = ["bench", "--quick", "save", "data", "loop", "--skip", "loop", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| save",
        "| **save: exit code 1**",
        "| data",
    ]
    assert "no disk" in printed.err
    sections = json.loads(file.read_text())["sections"]
    assert sections["save"]["ended"] == "exit code 1" and sections["data"]["ended"] == "ok"
    assert sections["data"]["rows"][0]["claim"] == "data"


def test_every_benchmark_is_run_as_a_module() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert "python bench/" not in page.read_text(), page.name

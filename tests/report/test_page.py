"""The page in a browser, as a file and live."""

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.report.build import live_server, serve_report, write_report
from tests.support.browser import Browser, headless_browser
from tests.support.run_directories import records, write_run


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with headless_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_the_page_shows_the_run_and_asks_no_network(browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report([write_run(tmp_path / "a")], target, None, print)
    colors = set()
    for width in (390, 1280):
        for dark in (False, True):
            browser.open(target.as_uri(), width, dark=dark)
            assert browser.errors == []
            assert browser.requests == [target.as_uri()]
            assert browser.value("document.documentElement.scrollWidth") <= width
            colors.add(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2
    figure = "document.querySelector('[data-figure=\"{}\"]').textContent"
    assert browser.value(figure.format("Best eval/loss")) == "0.6556 at step 400"
    assert browser.value(figure.format("Goodput")).strip() == "95.0%"
    shown = "document.querySelector('#chart-loss [data-curve={}] b').textContent"
    assert browser.value(shown.format("loss")) == "0.5556"
    browser.value("plots[0].setCursor({left: plots[0].valToPos(77, 'x'), top: 50})")
    assert browser.value(shown.format("loss")) == "3.969"
    assert browser.value("plots[0].data[1].filter((y) => y != null).length") == 399
    assert "rank 1 on node1 is lost" in browser.value("document.body.textContent")
    assert browser.value("document.querySelectorAll('canvas').length") == browser.value(
        "content.charts.length"
    )


def test_axes_zoom_and_marks(browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=1)], target, None, print)
    browser.open(target.as_uri())
    assert browser.value("plots[0].scales.x.max") == 400
    browser.value("zoomTo([100, 200])")
    scales = browser.value("plots.filter((p) => p.chart.by_step).map((p) => p.scales.x.max)")
    assert set(scales) == {200}
    browser.value("document.querySelector('[data-axis=time]').click()")
    assert browser.value("plots[0].scales.x.max") == pytest.approx(42, abs=0.1)  # seconds
    assert browser.value("plots[0].marks.length") > 10
    restart = "plots[0].marks.find((mark) => mark.kind == 'restart').x"
    assert browser.value(restart) == pytest.approx(25)  # not when its step was taken
    browser.value("document.querySelector('[data-kind=evaluation]').click()")
    kinds = browser.value("[...new Set(plots[0].marks.map((mark) => mark.kind))]")
    assert "evaluation" not in kinds and {"command", "fault", "restart"} <= set(kinds)
    assert browser.value("document.querySelector('.differences').textContent").endswith(
        "engines.net.optimizer.lr0.0011"
    )
    assert browser.errors == []


def test_two_runs_are_told_apart(browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report([write_run(tmp_path / "a"), write_run(tmp_path / "b")], target, None, print)
    browser.open(target.as_uri())
    drawn = browser.value("""(() => {
        const { ctx } = plots[0], drawn = [];
        ctx.stroke = () => drawn.push("line");
        ctx.fillText = (text) => drawn.push(text);
        drawMarks(plots[0]);
        return drawn;
    })()""")
    labels = ["lr x0.5", "</script><b>nonsense", "fault", "restart 1 of 10"]
    assert [*drawn[-4:], *set(drawn[:-4])] == [*labels, "line"]  # each once, over all lines
    legend = "[...document.querySelectorAll('#chart-ranks_memory .legend .dot')]"
    looks = browser.value(f"{legend}.map((dot) => dot.style.cssText)")
    assert len(set(looks)) == len(looks) == 4  # min and max of both
    restart = "plots[0].marks.findLast((mark) => mark.kind == 'restart').x"
    browser.value(f"plots[0].cursor.left = plots[0].valToPos({restart}, 'x')")
    browser.value("showTip(plots[0])")
    assert "b, step 250" in browser.value("plots[0].tip.textContent")
    assert browser.errors == []


def test_the_live_page_follows_the_run(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=100, ended=False)
    with live_server([run], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.url)
        steps = "document.querySelector('[data-figure=Steps]').textContent"
        assert browser.value(steps) == "100 of 100"
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(101, 180))
        browser.value("fetch('content.json').then((r) => r.json()).then((c) => {content = c})")
        browser.value("render()")
        assert browser.value(steps) == "180 of 100"
        assert browser.errors == [] and {
            url.removeprefix(server.url) for url in browser.requests
        } == {"", "content.json"}
        server.shutdown()


def test_the_live_page_is_of_this_machine_only(tmp_path: Path) -> None:
    with live_server([write_run(tmp_path / "a")], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        for path, host, code in (("", "evil.example:80", 403), ("etc/passwd", "localhost:1", 404)):
            request = urllib.request.Request(server.url + path, headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request)
            assert error.value.code == code
        server.shutdown()


def test_what_a_run_says_is_not_run(tmp_path: Path) -> None:
    """A command's text cannot end the script that it is in."""
    target = tmp_path / "report.html"
    write_report([write_run(tmp_path / "a")], target, None, print)
    text = target.read_text()
    assert len(text) < 5e6
    assert text.count("</script>") == 3 and "nonsense" in text
    assert re.search(r'content="default-src \'none\'', text)
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.slow
def test_a_long_run_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=20_000)
    target = tmp_path / "report.html"
    write_report([run, run, run, run], target, None, print)
    assert target.stat().st_size < 3e6


def test_a_directory_or_an_impossible_port_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=10)
    with pytest.raises(HarnessError, match="is a directory: expected the name of a file"):
        write_report([run], tmp_path, None, print)
    with pytest.raises(HarnessError, match="port 99999: expected 0 to 65535; choose another"):
        serve_report([run], 99999, print)
    write_report([run], tmp_path / "new/report.html", None, print)
    assert (tmp_path / "new/report.html").is_file()


def test_the_command_writes_into_the_run_directory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    command = [sys.executable, "-m", "harness.cli", "report"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (run / "report.html").is_file()
    assert done.stdout.startswith(f"wrote {run / 'report.html'} (0.")
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not a run directory" in done.stderr


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib.figure")
    run = write_run(tmp_path / "a")
    write_report([run], tmp_path / "report.html", tmp_path / "png", print)
    pictures = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"loss.png", "eval-loss.png", "phases.png", "histogram.png"} <= pictures
    assert (tmp_path / "png/loss.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "png")

"""From run directories to a page, pictures, or a server."""

from collections.abc import Callable, Sequence
from pathlib import Path

from harness.errors import HarnessError
from harness.files import write_atomically
from harness.report.content import content_of
from harness.report.page import json_of, page_of
from harness.report.run_files import RunFiles
from harness.report.serve import Server

SECONDS_BETWEEN_REFRESHES = 5.0


def write_report(
    run_dirs: Sequence[Path], target: Path | None, pictures: Path | None, say: Callable[[str], None]
) -> None:
    """Writes the report of some runs, by default to RUN_DIR/report.html of the first, and their
    charts into the folder `pictures`.

    Raises HarnessError if a path is not a run directory, or `target` is a directory, and OSError if
    a file cannot be written.
    """
    runs = [RunFiles(path) for path in run_dirs]
    target = target or run_dirs[0] / "report.html"
    if target.is_dir():
        raise HarnessError(f"{target} is a directory: expected the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = page_of(content_of(runs))
    write_atomically(target, lambda staged: staged.write_text(text))
    say(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    if pictures is not None:
        from harness.report.pictures import write_pictures

        for path in write_pictures(runs, pictures):
            say(f"wrote {path}")


def serve_report(run_dirs: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serves the report of some runs on this machine until an interrupt.

    Raises HarnessError if a path is not a run directory, or the port cannot be used.
    """
    try:
        server = live_server(run_dirs, port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", "expected 0 to 65535")
        raise HarnessError(f"port {port}: {why}; choose another: --live PORT") from None
    with server:
        say(f"{server.url} (Ctrl-C ends it)")
        server.serve_forever()


def live_server(run_dirs: Sequence[Path], port: int) -> Server:
    """The server of `serve_report`, which is yet to be run."""
    runs = [RunFiles(path) for path in run_dirs]

    def content() -> dict:
        for run in runs:
            run.refresh()
        return content_of(runs, SECONDS_BETWEEN_REFRESHES)

    return Server(port, lambda: page_of(content()), lambda: json_of(content()))

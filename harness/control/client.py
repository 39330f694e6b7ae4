"""`harness ctl` and `harness.command`: send commands to a running job, through its socket."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from harness.control.wire import FINAL_STATES, SOCKET, Answer, short_path
from harness.errors import CommandError, HarnessError
from harness.health.outcome import FILE, Outcome

EXIT_CODES = {"done": 0, "failed": 1, "rejected": 2}
NO_ANSWER = 3
SECONDS_BETWEEN_UPDATES = 1.0


class NoAnswer(HarnessError):
    """No job is listening, or it ended before it answered."""

    code = NO_ANSWER


class Client:
    """A connection to a running job."""

    def __init__(self, run_dir: Path):
        """Raises NoAnswer if no job is listening in that run directory on this machine."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = run_dir / SOCKET
        try:
            with short_path(path) as name:
                self._socket.connect(name)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoAnswer(_why_not(run_dir, error)) from None
        except OSError as error:
            raise NoAnswer(f"{path}: {error.strerror}") from None
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def send(self, command: str) -> Iterator[Answer]:
        """Sends a command, and yields its answers up to the final one.

        Raises NoAnswer if the job ends before that.
        """
        line = " ".join(command.split())
        if not line:
            yield Answer(0, line, "rejected", result="empty command; help lists all commands")
            return
        with contextlib.suppress(BrokenPipeError):  # the reason may still be readable
            self._socket.sendall(line.encode(errors="replace") + b"\n")
        while True:
            try:
                received = self._lines.readline()
            except ConnectionError:
                received = ""
            if not received:
                raise NoAnswer(f"{line!r}: no answer: the run has ended")
            answer = Answer(**json.loads(received))
            yield answer
            if answer.state in FINAL_STATES:
                return

    def close(self) -> None:
        """Disconnects."""
        self._lines.close()
        self._socket.close()


def _why_not(run_dir: Path, error: OSError) -> str:
    """Why no job is listening."""
    starting = "(a run that is starting listens after some seconds: harness ctl --wait SECONDS)"
    if not run_dir.is_dir():
        return f"{run_dir}: no such run directory {starting}"
    outcome = Outcome.read(run_dir / FILE)
    if outcome is not None:
        at = "" if outcome.step is None else f" at step {outcome.step}"
        how = "" if outcome.kind == "complete" else f": {outcome.reason}"
        return f"{run_dir}: the run has ended ({outcome.kind}{at}){how}"
    if isinstance(error, FileNotFoundError):
        return f"no run is going on in {run_dir}: it has no {SOCKET} {starting}"
    return (
        f"{run_dir / SOCKET}: no answer: the run was killed, or its rank 0 is on another machine "
        f"(see {run_dir}/log.txt)"
    )


def command(run_dir: str | Path, text: str, wait_s: float = 0.0) -> str:
    """Sends a command to a running job, of this process or another one, and returns its result,
    like "net: lr 0.0005". Blocks until it is executed. A job that has only just been started may
    take up to `wait_s` seconds until it listens, as with `harness ctl --wait`.

    Raises CommandError if it is rejected or fails, NoAnswer if no job is running.
    """
    with contextlib.closing(connected(Path(run_dir), wait_s)) as client:
        *_, answer = client.send(text)
    if answer.state != "done":
        raise CommandError(f"{text!r}: {answer.state}: {answer.result}")
    return answer.result


def connected(run_dir: Path, wait_s: float = 0.0) -> Client:
    """A connection, once a job listens. Raises NoAnswer if none does after `wait_s` seconds."""
    end = time.monotonic() + wait_s
    while True:
        try:
            return Client(run_dir)
        except NoAnswer:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def send_command(client: Client, command: str, as_json: bool) -> int:
    """Sends one command, prints its answers, and returns the exit code."""
    code = NO_ANSWER
    for answer in client.send(command):
        code = EXIT_CODES.get(answer.state, NO_ANSWER)
        if as_json:
            sys.stdout.write(json.dumps(vars(answer)) + "\n")
        else:
            _show(answer)
        sys.stdout.flush()
    return code


def send_stdin(client: Client, run_dir: Path, as_json: bool) -> int:
    """Sends the lines of standard input one by one, and returns the highest exit code.

    On a terminal: a prompt with history, below the live status of the run.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _prompt(client, run_dir, as_json)
    lines = filter(str.strip, sys.stdin)
    return max((send_command(client, line, as_json) for line in lines), default=0)


def _prompt(client: Client, run_dir: Path, as_json: bool) -> int:
    with contextlib.closing(Client(run_dir)) as status_client:
        sys.stdout.write("help lists the commands; Ctrl-D leaves the prompt, not the run\n")
        while True:
            try:
                with _status_above(status_client):
                    command = input("> ")
            except (EOFError, KeyboardInterrupt):
                sys.stdout.write("\n")
                return 0
            if command.strip():
                send_command(client, command, as_json)


@contextlib.contextmanager
def _status_above(client: Client) -> Iterator[None]:
    """Updates the line above the prompt while the user types, until the input fills a line."""
    import readline  # also adds history and line editing to `input`

    typed = threading.Event()
    columns = os.get_terminal_size().columns - 1

    def status() -> str:
        answers = list(client.send("status"))
        return answers[-1].result.partition("\n")[0][:columns]

    def redraw() -> None:
        with contextlib.suppress(NoAnswer, OSError):
            while not typed.wait(SECONDS_BETWEEN_UPDATES):
                if len(readline.get_line_buffer()) + len("> ") >= columns:
                    continue  # the line above is no longer the status
                # Saves the cursor, rewrites the line above, and restores the cursor.
                sys.stdout.write(f"\0337\033[1A\r\033[2K\033[2m{status()}\033[0m\0338")
                sys.stdout.flush()

    sys.stdout.write(f"\033[2m{status()}\033[0m\n")
    thread = threading.Thread(target=redraw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        typed.set()
        thread.join()


def _show(answer: Answer) -> None:
    if answer.state == "rejected":
        sys.stdout.write(f"rejected: {answer.result}\n")
    elif answer.state == "failed":
        sys.stdout.write(f"failed: {answer.result}\n")
    elif answer.state == "done":
        at = "" if answer.step is None else f"step {answer.step}: "
        sys.stdout.write(f"{at}{answer.result}\n")
    elif sys.stdout.isatty():
        at = "" if answer.step is None else f" at step {answer.step}"
        sys.stdout.write(f"\033[2m{answer.state}{at}\033[0m\n")

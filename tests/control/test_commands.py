"""The grammar of commands, events that wait for a step, and settings that are changed live."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.control import commands as c
from harness.control.events import Events
from harness.control.grammar import Grammar
from harness.control.live import Live, live_keys
from harness.errors import CommandError, ConfigError
from harness.metrics.status import Status
from tests.support.helpers import tiny_config

GRAMMAR = Grammar(["G", "D"], {"sample": "Writes a sample."})


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("save", c.Save()),
        ("save as v1.0-rc", c.Save("v1.0-rc")),
        ("  export ", c.Export()),
        ("export pt", c.Export("pt")),
        ("eval", c.Eval()),
        ("eval_quit", c.EvalQuit()),
        ("quit", c.Quit()),
        ("quit!", c.QuitUnsaved()),
        ("pause", c.Pause()),
        ("resume", c.Resume()),
        ("lr 1e-4", c.SetLr(1e-4)),
        ("lr 0", c.SetLr(0.0)),
        ("lr D 1e-4", c.SetLr(1e-4, "D")),
        ("lr x0.5", c.ScaleLr(0.5)),
        ("lr  G   x2", c.ScaleLr(2, "G")),
        ("lr auto", c.FollowSchedule()),
        ("lr G auto", c.FollowSchedule("G")),
        ("loss_scale 1024", c.SetLossScale(1024)),
        ("clip 0.5", c.SetClip(0.5)),
        ("clip G 0", c.SetClip(0, "G")),
        ("time", c.TimeLeft()),
        ("time to 500", c.TimeLeft(500)),
        ("status", c.Status()),
        ("help", c.Help()),
        ("event save@1000", c.At("save", 1000)),
        ("event save as x @ 1000", c.At("save as x", 1000)),
        ("save@1000", c.At("save", 1000)),
        ("lr x0.5@7", c.At("lr x0.5", 7)),
        ("event eval every 50", c.Every("eval", 50)),
        ("event show", c.ShowEvents()),
        ("event clear", c.ClearEvents()),
        ("event clear 3", c.ClearEvents(3)),
        ("steps 500", c.SetSteps(500)),
        ("profile 3", c.Profile(3)),
        ("log debug", c.SetLog("debug")),
        ("set trainer.save_every 50", c.Set("trainer.save_every", "50")),
        ("set", c.ShowSettings()),
        ("sample a b", c.TaskCommand("sample", ("a", "b"))),
        ("sample me@host.org a@7", c.TaskCommand("sample", ("me@host.org", "a@7"))),
        ("event sample a@7", c.At("sample a", 7)),
        ("set checkpoint.best_metric a@b", c.Set("checkpoint.best_metric", "a@b")),
    ],
)
def test_a_line_is_a_command(line: str, command: c.Command) -> None:
    assert GRAMMAR.parse(line) == command


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sav", "unknown command (did you mean 'save'?): save | save as NAME"),
        ("save now", "found 'now' too much; known: save | save as NAME"),
        ("save as a/b", "a name is made of letters, digits and .-_, found 'a/b'"),
        ("eval now", "found 'now' too much"),
        ("lr", "RATE is missing; known: lr RATE | lr ENGINE RATE | lr xFACTOR"),
        ("lr foo", "a learning rate is a finite number from 0 on, found 'foo'"),
        ("lr foo 1e-4", "ENGINE: found 'foo', expected G, D"),
        ("lr 1 2 3", "too much"),
        ("lr nan", "finite"),
        ("lr inf", "finite"),
        ("lr -1", "from 0 on"),
        ("lr x0", "above 0"),
        ("lr x", "above 0"),
        ("loss_scale 0", "above 0"),
        ("clear", "unknown command"),
        ("event foo@5", "'event foo@5': unknown command"),
        ("save@x", "STEP: expected a whole number from 1 on, found 'x'"),
        ("save@0", "from 1 on"),
        ("event save every 0", "N: expected a whole number from 1 on"),
        ("event status@5", "'status' cannot wait for a step"),
        ("event event clear@5", "cannot wait for a step"),
        ("save@1@2", "unknown command"),
        ("event", "is missing; known: event COMMAND@STEP"),
        ("steps 1.5", "whole number"),
        ("log loud", "expected debug, info, warning, error"),
        ("export npz", "expected sft, pt"),
        ("set run.name x", "KEY: found 'run.name', expected run.steps,"),
        ("set trainer.sav_every 5", "did you mean 'trainer.save_every'?"),
        ("set trainer.save_every often", "trainer.save_every: found 'often'"),
        ("set trainer.save_every -1", "trainer.save_every: found -1"),
        ("set trainer.save_every " + "9" * 5000, "trainer.save_every: found '999"),
        ("set trainer.save_every " + "[" * 30_000, "trainer.save_every: found '[[["),
        ("event event COMMAND@STEP every 3", "COMMAND@STEP"),
        ("event event COMMAND every 5 every 3", "found 'COMMAND'"),
        ("save as x.tmp", "a name is made of"),
        ("__import__('os')", "unknown command"),
        ("", "unknown command; help lists all"),
        ("@", "unknown command"),
    ],
)
def test_a_wrong_line_is_told_what_is_right(line: str, told: str) -> None:
    with pytest.raises(CommandError) as caught:
        GRAMMAR.parse(line)
    assert told in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_command_or_a_mistake(text: str) -> None:
    try:
        assert isinstance(GRAMMAR.parse(text), c.Command)
    except CommandError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("line", ["@" * 60_000, "a" + " " * 60_000 + "b", "x " * 30_000])
def test_a_hostile_line_is_refused_in_no_time(line: str) -> None:
    began = time.process_time()
    with pytest.raises(CommandError):
        GRAMMAR.parse(line)
    assert time.process_time() - began < 10  # a parser of quadratic time takes minutes


def test_help_has_every_form() -> None:
    text = GRAMMAR.help()
    for command in c.COMMANDS:
        for form in command.forms:
            assert form in text
    assert "Writes a sample." in text
    assert len(text.splitlines()) == len(c.COMMANDS) + 1


def due(events: Events, step: int) -> list[str]:
    return [event.command for event in events.due(step)]


def test_events_are_due_once_or_at_every_multiple() -> None:
    events = Events()
    events.add("save", 0, at=3)
    events.add("eval", 0, every=2)
    found = {step: due(events, step) for step in range(1, 7)}
    assert found == {1: [], 2: ["eval"], 3: ["save"], 4: ["eval"], 5: [], 6: ["eval"]}
    assert due(events, 6) == []  # it was obeyed at this step
    assert [str(event) for event in events] == ["event 2: eval every 2"]


def test_an_event_that_saves_keeps_those_that_follow_it() -> None:
    events = Events()
    for command in ("save", "lr x0.5"):
        events.add(command, 0, at=3)
    events.add("eval", 0, every=3)
    obeyed = events.due(3)
    assert next(obeyed).command == "save"
    resumed = Events()
    resumed.load_state_dict(events.state_dict())
    assert due(resumed, 3) == [event.command for event in obeyed] == ["lr x0.5", "eval"]
    assert due(resumed, 3) == []
    assert resumed.add("save", 3, at=9).id == 4


def test_events_are_cleared_by_number_or_all() -> None:
    events = Events()
    for step in (5, 6, 7):
        events.add("save", 0, at=step)
    assert [event.id for event in events.clear(2)] == [2]
    assert events.clear(2) == []
    assert [event.id for event in events.clear()] == [1, 3]
    assert list(events) == []


def test_every_live_key_can_be_set(tmp_path: Path) -> None:
    live = Live(tiny_config(tmp_path))
    assert {"run.steps", "trainer.save_every", "checkpoint.background"} <= set(live_keys())
    for key in live_keys():
        value: Any = {"best_metric": "eval/x", "best": "highest", "on_error": "stop"}
        name = key.partition(".")[2]
        live.set(key, value.get(name, {"on_quit": "false", "kground": "true"}.get(name[-7:], "7")))
    assert live.config.trainer.save_every == 7 and live.config.checkpoint.best_metric == "eval/x"
    assert len(live.describe()) == len(live_keys())


def test_what_does_not_fit_its_section_changes_nothing(tmp_path: Path) -> None:
    live = Live(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match="need keep_last"):
        live.set("checkpoint.keep_best", "2")
    assert live.describe() == [] and live.config.checkpoint.keep_best == 0
    live.set("checkpoint.keep_last", "3")
    live.set("checkpoint.keep_best", "2")
    assert live.config.checkpoint.keep_best == 2


def test_the_config_has_the_last_word_on_what_was_set_live(tmp_path: Path) -> None:
    live = Live(tiny_config(tmp_path))
    live.set("trainer.save_every", "7")
    live.set("run.steps", "70")
    resumed = Live(tiny_config(tmp_path, trainer={"save_every": 5}))
    resumed.load_state_dict(live.state_dict())
    assert resumed.config.trainer.save_every == 5  # changed in the config since
    assert resumed.config.run.steps == 70
    resumed.set("run.steps", str(tiny_config(tmp_path).run.steps))
    assert resumed.describe() == []  # it is as the config says again


def test_changes_of_a_section_are_made_together_or_dropped(tmp_path: Path) -> None:
    first = tiny_config(tmp_path, checkpoint={"keep_last": 2, "keep_best": 1})
    live = Live(first)
    for key, text in (("keep_last", "5"), ("keep_best", "0"), ("keep_last", "0")):
        live.set(f"checkpoint.{key}", text)
    resumed = Live(first)
    resumed.load_state_dict(live.state_dict())
    assert resumed.config.checkpoint.keep_last == resumed.config.checkpoint.keep_best == 0
    live = Live(tiny_config(tmp_path, checkpoint={"keep_last": 2}))
    live.set("checkpoint.keep_best", "1")
    live.set("trainer.save_every", "9")
    other = Live(tiny_config(tmp_path))  # which keeps all, so that there is no best
    other.load_state_dict(live.state_dict())
    assert other.config.checkpoint.keep_best == 0 and other.config.trainer.save_every == 9


def test_the_estimate_counts_no_pause_and_nothing_within_one() -> None:
    status = Status(0, 100)
    status.stepped(1)
    with status.doing("paused"):
        time.sleep(0.05)
        with status.doing("evaluating"):
            time.sleep(0.05)
    time.sleep(0.01)
    status.stepped(2)
    first, last = status._ends[0][1], status._ends[-1][1]
    assert 0.01 <= last - first < 0.05
    assert status.time_left().startswith(("0 s", "1 s", "2 s"))
    assert "is behind" in status.time_left(1)

"""The grammar of commands, scheduled events, and settings that are changed live."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.sections import EventConfig
from harness.control import commands as c
from harness.control.events import Events
from harness.control.grammar import Grammar
from harness.control.live import LiveConfig, live_keys
from harness.errors import CommandError, ConfigError
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
        ("status", c.ShowStatus()),
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
    ("line", "message"),
    [
        ("sav", "unknown command (did you mean 'save'?): save | save as NAME"),
        ("exit", "unknown command (did you mean 'quit'?): quit"),
        ("set run.steps null", "run.steps: null unsets a key at the start of a run only"),
        ("save now", "unexpected 'now'; usage: save | save as NAME"),
        ("save as a/b", "NAME: found 'a/b', expected letters, digits and .-_"),
        ("eval now", "unexpected 'now'"),
        ("lr", "RATE is missing; usage: lr RATE | lr ENGINE[/GROUP] RATE"),
        ("lr foo", "a learning rate is a finite number >= 0, found 'foo'"),
        ("lr foo 1e-4", "ENGINE[/GROUP]: found 'foo', expected G, D"),
        ("lr 1 2 3", "unexpected '2'"),
        ("lr nan", "finite"),
        ("lr inf", "finite"),
        ("lr -1", ">= 0"),
        ("lr x0", "above 0"),
        ("lr x", "above 0"),
        ("loss_scale 0", "above 0"),
        ("clear", "unknown command"),
        ("event foo@5", "'event foo@5': unknown command"),
        ("save@x", "STEP: expected a positive integer, found 'x'"),
        ("save@0", "positive"),
        ("event save every 0", "N: expected a positive integer"),
        ("event status@5", "'status' cannot be scheduled"),
        ("event event clear@5", "cannot be scheduled"),
        ("save@1@2", "unknown command"),
        ("event", "is missing; usage: event COMMAND@STEP"),
        ("steps 1.5", "positive integer"),
        ("log loud", "expected debug, info, warning, error"),
        ("export npz", "expected sft, pt"),
        ("set run.name x", "KEY: found 'run.name', expected run.steps,"),
        ("set trainer.sav_every 5", "did you mean 'trainer.save_every'?"),
        ("set trainer.save_every often", "trainer.save_every: found 'often'"),
        ("set trainer.save_every -1", "trainer.save_every: found -1"),
        ("set trainer.save_every " + "9" * 5000, "trainer.save_every: found '999"),
        ("set trainer.save_every " + "[" * 30_000, "trainer.save_every: found '[[["),
        ("event event COMMAND@STEP every 3", "COMMAND@STEP"),
        ("event event COMMAND every 5 every 3", "unexpected 'COMMAND'"),
        ("save as x.tmp", "expected letters, digits and .-_"),
        ("__import__('os')", "unknown command"),
        ("", "unknown command; help lists all"),
        ("@", "unknown command"),
    ],
)
def test_a_wrong_line_is_rejected_with_its_usage(line: str, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        GRAMMAR.parse(line)
    assert message in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    try:
        assert isinstance(GRAMMAR.parse(text), c.Command)
    except CommandError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("line", ["@" * 60_000, "a" + " " * 60_000 + "b", "x " * 30_000])
def test_a_hostile_line_is_rejected_quickly(line: str) -> None:
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
    assert due(events, 6) == []  # executed at this step already
    assert [str(event) for event in events] == ["event 2: eval every 2"]


def test_a_checkpoint_saved_by_an_event_holds_those_after_it() -> None:
    events = Events()
    for command in ("save", "lr x0.5"):
        events.add(command, 0, at=3)
    events.add("eval", 0, every=3)
    executed = events.due(3)
    assert next(executed).command == "save"
    resumed = Events()
    resumed.load_state_dict(events.state_dict())
    assert due(resumed, 3) == [event.command for event in executed] == ["lr x0.5", "eval"]
    assert due(resumed, 3) == []
    assert resumed.add("save", 3, at=9).id == 4


def test_the_state_of_events_keeps_its_keys() -> None:
    """Those of checkpoints since the first version."""
    event = {"id": 2, "command": "eval", "at": None, "every": 2, "obeyed": 4}
    state = {"last_id": 2, "events": [event]}
    events = Events()
    events.load_state_dict(state)
    assert events.state_dict() == state
    assert due(events, 4) == [] and due(events, 6) == ["eval"]
    assert events.state_dict()["events"] == [event | {"obeyed": 6}]


def test_events_are_cleared_by_number_or_all() -> None:
    events = Events()
    for step in (5, 6, 7):
        events.add("save", 0, at=step)
    assert [event.id for event in events.clear(2)] == [2]
    assert events.clear(2) == []
    assert [event.id for event in events.clear()] == [1, 3]
    assert list(events) == []


def test_every_live_key_can_be_set(tmp_path: Path) -> None:
    live = LiveConfig(tiny_config(tmp_path))
    assert {"run.steps", "trainer.save_every", "checkpoint.background"} <= set(live_keys())
    for key in live_keys():
        value: Any = {"best_metric": "eval/x", "best_mode": "max", "on_error": "stop"}
        value |= {"nonfinite": "stop", "spike": "skip", "blame": "true"}
        name = key.partition(".")[2]
        live.set(key, value.get(name, {"at_end": "false", "ground": "true"}.get(name[-6:], "7")))
    assert live.config.trainer.save_every == 7 and live.config.checkpoint.best_metric == "eval/x"
    assert len(live.changes()) == len(live_keys())


def test_a_value_that_its_section_rejects_changes_nothing(tmp_path: Path) -> None:
    live = LiveConfig(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match="need keep_last"):
        live.set("checkpoint.keep_best", "2")
    assert live.changes() == [] and live.config.checkpoint.keep_best == 0
    live.set("checkpoint.keep_last", "3")
    live.set("checkpoint.keep_best", "2")
    assert live.config.checkpoint.keep_best == 2


def test_the_config_takes_precedence_over_what_was_set_live(tmp_path: Path) -> None:
    live = LiveConfig(tiny_config(tmp_path))
    live.set("trainer.save_every", "7")
    live.set("run.steps", "70")
    resumed = LiveConfig(tiny_config(tmp_path, trainer={"save_every": 5}))
    resumed.load_state_dict(live.state_dict())
    assert resumed.config.trainer.save_every == 5  # changed in the config since
    assert resumed.config.run.steps == 70
    resumed.set("run.steps", str(tiny_config(tmp_path).run.steps))
    assert resumed.changes() == []  # equal to the config again


def test_changes_of_a_section_are_applied_together_or_dropped(tmp_path: Path) -> None:
    first = tiny_config(tmp_path, checkpoint={"keep_last": 2, "keep_best": 1})
    live = LiveConfig(first)
    for key, text in (("keep_last", "5"), ("keep_best", "0"), ("keep_last", "0")):
        live.set(f"checkpoint.{key}", text)
    resumed = LiveConfig(first)
    resumed.load_state_dict(live.state_dict())
    assert resumed.config.checkpoint.keep_last == resumed.config.checkpoint.keep_best == 0
    live = LiveConfig(tiny_config(tmp_path, checkpoint={"keep_last": 2}))
    live.set("checkpoint.keep_best", "1")
    live.set("trainer.save_every", "9")
    other = LiveConfig(tiny_config(tmp_path))  # keeps all checkpoints: there is no best
    other.load_state_dict(live.state_dict())
    assert other.config.checkpoint.keep_best == 0 and other.config.trainer.save_every == 9


GROUPED = Grammar(["net"], {}, ["net/default", "net/head", "net/net"])


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("lr net/head x0.5", c.ScaleLr(0.5, "net/head")),
        ("lr head 1e-4", c.SetLr(1e-4, "net/head")),
        ("lr net auto", c.FollowSchedule("net")),  # the engine, not its group
        ("lr net/net auto", c.FollowSchedule("net/net")),
    ],
)
def test_lr_of_a_parameter_group(line: str, command: c.Command) -> None:
    assert GROUPED.parse(line) == command


def test_a_group_of_several_engines_needs_its_engine() -> None:
    grammar = Grammar(["G", "D"], {}, ["G/default", "G/head"])
    assert grammar.parse("lr G/head x0.5") == c.ScaleLr(0.5, "G/head")
    with pytest.raises(CommandError, match=r"'head' \(did you mean 'G/head'"):
        grammar.parse("lr head x0.5")


def configured(*tables: dict[str, Any]) -> Events:
    return Events([EventConfig.model_validate(table) for table in tables])


def test_events_of_the_config_survive_a_resume_once() -> None:
    every, half = {"command": "export", "every": 4}, {"command": "lr x0.5", "at": 3}
    events = configured(every, half)
    events.add("save", 0, every=5)
    assert [due(events, step) for step in (1, 2, 3, 4)] == [[], [], ["lr x0.5"], ["export"]]
    resumed = configured(every, half)
    resumed.load_state_dict(events.state_dict(), 4)
    assert [str(event) for event in resumed] == [
        "event 1: export every 4 (config)",
        "event 3: save every 5",
    ]
    assert due(resumed, 4) == [] and due(resumed, 8) == ["export"]
    # The config has changed: one is gone, one is new, and one would be in the past.
    changed = configured({"command": "eval", "every": 4}, {"command": "save", "at": 2})
    changed.load_state_dict(events.state_dict(), 4)
    assert due(changed, 4) == [] and due(changed, 8) == ["eval"]
    # One that was cleared does not come back.
    events.clear(1)
    resumed.load_state_dict(events.state_dict(), 4)
    assert [event.command for event in resumed] == ["save"]


def test_events_that_the_run_does_not_reach_are_known() -> None:
    tables = [{"command": "save", key: step} for key in ("at", "every") for step in (6, 7)]
    events = configured(*tables)
    assert [str(event) for event in events.beyond(6)] == [
        "event 2: save@7 (config)",
        "event 4: save every 7 (config)",
    ]

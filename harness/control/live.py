"""What live commands have changed in the config, and the events that they left pending."""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, create_model

from harness.config.command_line import parse_overrides
from harness.config.config import Config, section_of
from harness.config.sections import LIVE
from harness.control.events import Events
from harness.errors import ConfigError

log = logging.getLogger(__name__)


class Live:
    """The config as it is now; every checkpoint holds what makes it differ from its file.

    On a resume the config has the last word: a change stays in force as long as the config still
    gives the value that was changed.
    """

    def __init__(self, config: Config):
        self.config = config
        self.events = Events()
        self._started = config
        self._changes: dict[str, str] = {}

    def with_changes(self, changes: Mapping[str, str]) -> Config:
        """The config with other values of live keys of one section. Raises ConfigError."""
        section = next(iter(changes)).partition(".")[0]
        values = {key.partition(".")[2]: checked_value(key, text) for key, text in changes.items()}
        old = getattr(self.config, section)
        try:
            new = type(old).model_validate(old.model_dump() | values)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{', '.join(changes)}: {reason}") from None
        return self.config.model_copy(update={section: new})

    def set(self, key: str, text: str) -> None:
        """Changes a live key. Raises ConfigError, and changes nothing, if it cannot be."""
        self.config = self.with_changes({key: text})
        self._changes[key] = text
        if value_of(self.config, key) == value_of(self._started, key):
            del self._changes[key]

    def describe(self) -> list[str]:
        """One line for every changed key and every pending event."""
        changed = [
            f"{key} = {value_of(self.config, key)} (the config says {value_of(self._started, key)})"
            for key in self._changes
        ]
        return changed + [str(event) for event in self.events]

    def state_dict(self) -> dict[str, Any]:
        """Plain values: `{key: [changed to, the config's value]}`, and the events."""
        changes = {k: [text, repr(value_of(self._started, k))] for k, text in self._changes.items()}
        return {"changes": changes, "events": self.events.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the changes again that the config does not contradict, and says which not."""
        self.events.load_state_dict(state["events"])
        sections: dict[str, dict[str, str]] = {}
        for key, (text, was) in state["changes"].items():
            if key in live_keys() and repr(value_of(self._started, key)) == was:
                sections.setdefault(key.partition(".")[0], {})[key] = text
            else:
                log.info("%s = %s, set live, is dropped: the config was changed since", key, text)
        for changes in sections.values():
            try:
                self.config = self.with_changes(changes)
                self._changes |= changes
            except ConfigError as error:
                told = ", ".join(f"{key} = {text}" for key, text in changes.items())
                log.warning("%s, set live, is dropped: it does not fit the config: %s", told, error)


def live_keys() -> list[str]:
    """The keys of the config that `set KEY VALUE` can change."""
    return [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if (inner := section_of(field.annotation)) is not None
        for name, info in inner.model_fields.items()
        if info.json_schema_extra == LIVE
    ]


def value_of(config: Config, key: str) -> Any:
    """The value of a key, like trainer.save_every."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def checked_value(key: str, text: str) -> Any:
    """A live key's value, read as on the command line. Raises ConfigError if it cannot be one."""
    section, _, name = key.partition(".")
    try:
        found = parse_overrides([f"--{key}={text}"])[section][name]
    except (ValueError, RecursionError) as error:  # what no value looks like
        raise ConfigError(f"{key}: found {text[:80]!r}: {error}") from None
    inner = section_of(Config.model_fields[section].annotation)
    assert inner is not None
    info: Any = inner.model_fields[name]
    try:
        alone = create_model("Alone", value=(info.annotation, info))
        return alone(value=found).model_dump()["value"]
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{key}: found {found!r}: {reason[0].lower()}{reason[1:]}") from None

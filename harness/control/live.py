"""The config with the changes of live commands, and the pending events."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError, create_model

from harness.config import Config
from harness.config.old_names import current_setting
from harness.config.overrides import UNSET, nested, parse_overrides
from harness.config.sections import LIVE, merge, section_of
from harness.control.events import Events
from harness.errors import ConfigError

log = logging.getLogger(__name__)


class LiveConfig:
    """The current config: as at the start of the run, with the changes of `set KEY VALUE`.

    Checkpoints contain the changes. On a resume the config takes precedence: a change is applied
    again only if the config still has the value that was changed.
    """

    def __init__(self, config: Config):
        self.config = config
        self.events = Events(config.events)
        self._initial = config
        self._changes: dict[str, str] = {}

    def with_changes(self, changes: Mapping[str, str]) -> Config:
        """The config with new values for live keys, all of one section. Raises ConfigError."""
        section = next(iter(changes)).partition(".")[0]
        values: dict[str, Any] = {}
        for key, text in changes.items():
            values = merge(values, nested(key.split(".")[1:], parse_value(key, text)))
        old = getattr(self.config, section)
        try:
            new = type(old).model_validate(merge(old.model_dump(), values))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{', '.join(changes)}: {reason}") from None
        return self.config.model_copy(update={section: new})

    def set(self, key: str, text: str) -> None:
        """Changes a live key. Raises ConfigError, and changes nothing, if the value is invalid."""
        self.config = self.with_changes({key: text})
        self._changes[key] = text
        if value_of(self.config, key) == value_of(self._initial, key):
            del self._changes[key]

    def changes(self) -> list[str]:
        """One line for each changed key and each pending event."""
        changed = [
            f"{key} = {value_of(self.config, key)} (config: {value_of(self._initial, key)})"
            for key in self._changes
        ]
        return changed + [str(event) for event in self.events if not event.is_configured]

    def state_dict(self) -> dict[str, Any]:
        """Plain values: `{key: [new value, the config's value]}`, and the events."""
        changes = {k: [text, repr(value_of(self._initial, k))] for k, text in self._changes.items()}
        return {"changes": changes, "events": self.events.state_dict()}

    def load_state_dict(self, state: dict[str, Any], step: int = 0) -> None:
        """Applies the changes again, except (and logs) those whose value the config has changed.
        `step`: the checkpoint's."""
        self.events.load_state_dict(state["events"], step)
        self.config, self._changes = self._initial, {}
        sections: dict[str, dict[str, str]] = {}
        for name, (new, old) in state["changes"].items():
            key, text = current_setting(name, new)
            _, old_value = current_setting(name, old)
            if key in live_keys(self._initial) and repr(value_of(self._initial, key)) == old_value:
                sections.setdefault(key.partition(".")[0], {})[key] = text
            else:
                log.info("dropping the live change %s = %s: the config has changed", key, text)
        for changes in sections.values():
            try:
                self.config = self.with_changes(changes)
                self._changes |= changes
            except ConfigError as error:
                text = ", ".join(f"{key} = {text}" for key, text in changes.items())
                log.warning("dropping the live change %s: %s", text, error)


def live_keys(config: Config | None = None) -> list[str]:
    """The keys of the config that `set KEY VALUE` can change; of one config also those in tables
    that it names, like data.mix.code.weight."""
    return list(_live_keys(Config, config, ""))


def _live_keys(section: type[BaseModel], values: Any, prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        value: Any = getattr(values, name, None)
        if info.json_schema_extra == LIVE:
            yield key
        inner = section_of(info.annotation)
        if inner is None or isinstance(value, list):
            continue
        if get_origin(info.annotation) is dict:
            for item in value or {}:
                yield from _live_keys(inner, value[item], f"{key}.{item}.")
        else:
            yield from _live_keys(inner, value, f"{key}.")


def value_of(config: Config, key: str) -> Any:
    """The value of a key, like trainer.save_every."""
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def parse_value(key: str, text: str) -> Any:
    """A live key's value, parsed as on the command line. Raises ConfigError if it is invalid."""
    *path, name = key.split(".")
    try:
        value: Any = parse_overrides([f"--{key}={text}"])
    except (ValueError, RecursionError) as error:  # too many digits, too deeply nested
        raise ConfigError(f"{key}: found {text[:80]!r}: {error}") from None
    section: Any = Config
    for part in path:
        value = value[part]
        known = section.model_fields.get(part)  # None: the name of a table
        section = section_of(known.annotation) if known is not None else section
    value, info = value[name], section.model_fields[name]
    if value is UNSET:
        raise ConfigError(f"{key}: null unsets a key at the start of a run only: give its value")
    try:
        model = create_model("Value", value=(info.annotation, info))
        return model(value=value).model_dump()["value"]
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{key}: found {value!r}: {reason[0].lower()}{reason[1:]}") from None

"""The typed configuration of a run.

Nothing here imports torch, so that a mistake in the config is reported within a second.

    command_line.py     --config FILE.toml --section.key=value ..., and --help
    load.py             TOML files and overrides into a Config; one line per mistake
    overrides.py        settings of the command line and of the environment
    root.py             Config: all tables, and the rules between them
    health_section.py   [health]: what follows trouble of a rank
    metrics_section.py  [metrics]: where they are reported
    engine_sections.py  [engines.NAME]: DeepSpeed's JSON, optimizer, schedule, adapters
    deepspeed_rules.py  settings of DeepSpeed that harness does not support, one check each
    deepspeed_keys.py   the keys that DeepSpeed knows
    sections.py         the other tables
    paths.py            paths as users write them
    old_names.py        renamed keys and moved modules
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.config.root import Config
    from harness.config.sections import Section

__all__ = ["Config", "Section"]


def __getattr__(name: str) -> Any:
    """Imports the tables when they are first asked for: to build them takes a third of a second,
    which `harness inspect` does not need."""
    if name == "Config":
        from harness.config.root import Config

        return Config
    if name == "Section":
        from harness.config.sections import Section

        return Section
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

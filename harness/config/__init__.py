"""The typed configuration of a run.

Nothing here imports torch, so that a mistake in the config is reported within a second.

    command_line.py     --config FILE.toml --section.key=value ..., and --help
    load.py             a TOML file and overrides into a Config; one line for every mistake
    root.py             Config: all tables, and the rules between them
    engine_sections.py  [engines.NAME]: DeepSpeed's JSON, optimizer, schedule, adapters
    sections.py         all other tables
    deepspeed_rules.py  what harness refuses in DeepSpeed's JSON, one function for one rule
    old_names.py        keys and modules that had other names before
"""

from harness.config.root import Config
from harness.config.sections import Section

__all__ = ["Config", "Section"]

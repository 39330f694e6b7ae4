"""Every claim of README and docs, measured: `python -m bench`.

__main__.py   the sections, each a benchmark in a process with a limit; the table
rows.py       what a benchmark has found, as rows of that table
bounded.py    a process with a limit
gpu/          what needs a card: `python -m bench.gpu`

The other files are the benchmarks, each with its own options: `python -m bench.save --help`.
"""

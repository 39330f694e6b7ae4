"""Live commands: typed into a running job, executed by every rank after the same step.

Fronts (`stdin.py`, `socket.py`, `signals.py`) are where commands come from; the bus is how they
reach every rank.

    client.py     `harness ctl`: sends commands through the socket of a running job
    socket.py     the Unix socket in the run directory, a front
    stdin.py      standard input of rank 0, a front
    bus.py        how commands reach every rank after one step, and how they are answered
    signals.py    signals, a front; and whether the launcher is still alive
    audit.py      commands.jsonl, the history of all commands
    wire.py       what a run and its clients share: the socket's place, the answers
    grammar.py    the parser of control lines
    live.py       the config as commands have changed it; part of every checkpoint
    events.py     commands scheduled for a step; part of every checkpoint
    commands.py   the commands, a closed set of dataclasses; their docstrings are `help`
"""

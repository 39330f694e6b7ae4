"""Live commands: typed into a running job, executed by every rank after the same step.

Commands come from fronts (`stdin.py`, `socket.py`, `signals.py`), and the bus brings them to every
rank.

    client.py     `harness ctl`: sends commands through the socket of a running job
    socket.py     the Unix socket in the run directory, a front
    stdin.py      standard input of rank 0, a front
    bus.py        how commands reach every rank after the same step, and are answered
    signals.py    signals, a front; and the check that the launcher is alive
    audit.py      commands.jsonl, the audit log of all commands
    wire.py       what a run and its clients share: the socket's path, the answers
    grammar.py    the parser of control lines
    live.py       the config with the changes of live commands; part of every checkpoint
    events.py     commands scheduled for a step; part of every checkpoint
    commands.py   the commands, a closed set of dataclasses; their docstrings are `help`
"""

"""One rank's trouble is everyone's decision: what is watched, and what is decided about it.

A decision that one rank took alone would be a hang of the others, so every decision is agreed.

    outcome.py  how a run has ended: kind, exit code, rank, step, phase and reason, in ended.json
    phases.py   what this rank is doing, and since when, readable for its watchdog
"""

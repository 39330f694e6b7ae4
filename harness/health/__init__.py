"""One rank's trouble is everyone's decision: what is watched, and what is decided about it.

A decision that one rank took alone would be a hang of the others, so every decision is agreed.

    spikes.py   steps whose loss or gradient norm is far above those before
    skips.py    steps that changed nothing: why, and on which rank it began
    outcome.py  how a run has ended: kind, exit code, rank, step, phase and reason, in ended.json
"""

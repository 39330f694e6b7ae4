"""One rank's trouble is everyone's decision: what is watched, and what is decided about it.

    outcome.py  how a run has ended: kind, exit code, rank, step, phase and reason, in ended.json
"""

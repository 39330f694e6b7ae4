"""One rank's trouble is everyone's decision: what is watched, and what is decided about it.

A decision that one rank took alone would be a hang of the others, so every decision is agreed.

    supervisor.py  `harness run`: starts a run again after an end that a restart may mend
    attempt.py     one attempt of it: its processes, none of which is left behind
    goodput.py     where the time of a run goes, over all its starts: goodput.jsonl
    oom.py         out of memory: what is reported, and smaller micro-batches for the next start
    watchdog.py    a rank's watchdog, as the rank sees it
    guard.py       the process of its own that is the watchdog, without torch
    hub.py         where the watchdogs of all ranks meet, in that of rank 0
    lines.py       their messages
    stacks.py      the stacks of a rank whose interpreter is stuck
    processes.py   what Linux tells of a process
    verdict.py     whether a phase takes too long, and whom the ranks wait for
    stragglers.py  which rank the others wait for, step by step
    outcome.py     how a run has ended: kind, exit code, rank, step, phase and reason, in ended.json
    phases.py      what this rank is doing, and since when, readable for its watchdog
    spikes.py      steps whose loss or gradient norm is far above those before
    skips.py       steps that changed nothing: why, and on which rank it began
"""

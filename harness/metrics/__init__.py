"""What a run measures, where the numbers go, and what is shown.

Sinks, progress and status are rank 0's; every rank has a meter, and writes its own traces.

    meters.py     each step's numbers, averaged over the ranks behind the next steps
    sinks.py      metrics.jsonl, TensorBoard
    progress.py   the progress bar, or log lines where there is no terminal
    status.py     what rank 0 knows of the run at any moment: `status` and `time`
    trace.py      traces of some steps by torch's profiler
"""

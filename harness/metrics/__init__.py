"""What a run measures, where metrics are written, and what is shown.

Sinks, progress and status are on rank 0 only; every rank has a meter and writes its own traces.

    flops.py       the share of the devices' peak that the model's arithmetic is
    meters.py      metrics of each step, averaged over the ranks in the background
    by_rank.py     how much the ranks differ, and which is the slowest
    step_clock.py  how long a step and its phases take, without waiting for them
    memory.py      the memory of this rank and of its device
    recorder.py    where the records of a run go: its sinks
    closing.py     the summary when a run ends: what it has reached, and what to type next
    tracker_sink.py  what a tracker is sent, from a queue that no step waits for
    trackers.py    W&B, MLflow, trackio
    sinks.py       metrics.jsonl, TensorBoard
    progress.py    the progress bar, or log lines without a terminal
    status.py      the current state of the run, for `status` and `time`
    trace.py       traces of torch's profiler
"""

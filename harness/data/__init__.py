"""From a dataset to this rank's micro-batches, in an order that resumes exactly.

This package exports the samplers.

    step_batches.py     the micro-batches of each step, and how much each weighs in it
    held_out.py         the sets of held-out data, each read once by all ranks together
    train_batches.py    what a task's training data is, and a rank's micro-batches of it
    loader.py           endless micro-batches of a map-style dataset, resumable
    task_loader.py      the same of the task's own loader, or of a stream that divides itself
    stream_loader.py    micro-batches of a stream of samples that divides itself
    strided_stream.py   micro-batches of a stream of which each rank takes its share
    stream.py           a stream of samples, read from any position on
    digest.py           whether two samples or batches are the same
    batches.py          Batches: an endless iterator of micro-batches whose position can be saved
    skipping.py         samples that cannot be read: left out, counted
    fetch.py            from indices or samples to a batch, in the rank's process or a worker's
    workers.py          how worker processes start and end, and what helps if they fail
    prepare.py          texts into a corpus of tokens
    packing.py          documents in windows of one length, each as if it were alone
    token_files.py      corpora of tokens, mapped into memory, as datasets
    mixture.py          several datasets drawn from by weight
    batched_sampler.py  batches of items of similar length
    sampler.py          the order of the samples on every rank; usable without harness
    permutation.py      a random order of any number of items, computed where it is asked for
"""

from harness.data.batched_sampler import BatchedOrderedSampler
from harness.data.sampler import (
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Sampler,
)

__all__ = ["BatchedOrderedSampler", "OrderedSampler", "PoolSampler", "RandomSampler", "Sampler"]

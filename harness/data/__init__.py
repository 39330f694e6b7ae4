"""From a dataset to this rank's micro-batches, in an order that resumes exactly.

This package exports the samplers.

    loader.py    endless micro-batches of a dataset, or of the task's own loader; resumable
    sampler.py   the order of the samples on every rank; usable without harness
"""

from harness.data.sampler import (
    BatchedOrderedSampler,
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Sampler,
)

__all__ = ["BatchedOrderedSampler", "OrderedSampler", "PoolSampler", "RandomSampler", "Sampler"]

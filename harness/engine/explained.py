"""Errors of torch's in a model's forward or backward, with the keys that help."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.engine import mixed_dtypes
from harness.zero import engine_state, fetches


@contextmanager
def explained(engine: str, ds: Any) -> Iterator[None]:
    """Adds to an error that comes from dtypes, or from weights that ZeRO 3 has not gathered, what
    helps. `ds`: the DeepSpeed engine."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if not hasattr(error, "__notes__"):  # of the block inside
            mixed_dtypes.explain(error, engine, ds.module, engine_state.compute_dtype(ds))
            fetches.explain(error, engine, ds)
        raise

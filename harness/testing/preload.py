"""Imported once by the fork server of a rank pool, so that its ranks start fast."""

import gc
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # before the imports

# The first engine of every run imports Muon, and torch's compiler with it: 3 seconds.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import harness.run  # noqa: F401

# DeepSpeed collects garbage in every engine that it builds: 0.2 s with all that is imported here.
gc.freeze()

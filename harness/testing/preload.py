"""Imported once by the fork server of a rank pool, so that its ranks start in a blink."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401  (the environment comes first)

"""Code of the user's that a run calls at a few moments, the same on every rank.

early_stopping.py   EarlyStopping: ends a run that no longer gets better
moments.py          calls them, in order, on all ranks; their errors and commands are agreed
callback.py         Callback: the moments; CallbackRun: what a callback sees of the run
"""

from harness.callbacks.callback import Callback, CallbackRun
from harness.callbacks.early_stopping import EarlyStopping

__all__ = ["Callback", "CallbackRun", "EarlyStopping"]

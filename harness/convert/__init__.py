"""Converts checkpoints and files of weights to plain weights, without torch.

command.py              the command `harness convert`
convert.py              a complete conversion, from its options
verify.py               checks CRCs, and that weights are the rounded masters
copy.py                 copies and casts the planned bytes, with several threads
plan.py                 the tensors of the output: names, dtypes, and byte ranges of their sources
resolve_source.py       from a user's path to an engine's files, or to a file of weights
foreign_directories.py  what is not converted, or only a part: what it is, what to do
open_checkpoint.py      an engine of a run's checkpoint, of the newest complete one
run_checkpoints.py      which checkpoints a run has, in which order
dropped_saves.py        which of them its rollbacks have dropped
"""

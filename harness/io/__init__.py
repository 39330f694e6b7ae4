"""Saves and loads state dicts and nested structures as `.pt` and `.sft`.

save_load.py      save and load, by the suffix of the file
pt.py             .pt files as torch tensors
stored.py         reads StoredTensors as torch tensors
placeholder_pickle.py  writes objects of unknown classes as they were
tree.py           trees of .pt files as values of torch and numpy
structure.py      splits nested structures into named tensors and a tree, and rebuilds them
shared_memory.py  which tensors share memory
mmap.py           bytes of a file as tensors, read or memory-mapped
"""

from harness.io.save_load import load, save

__all__ = ["load", "save"]

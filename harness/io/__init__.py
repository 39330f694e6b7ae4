"""State dicts, and the structures around them, saved and loaded as `.pt` and `.sft`.

Its files, from the top down:

    save_load.py      save and load, by the suffix of the file
    pt.py             .pt files as torch tensors
    stored.py         StoredTensors, read as torch tensors
    structure.py      a nested structure split into named tensors and a tree, and rebuilt
    shared_memory.py  which tensors share memory
    mmap.py           bytes of a file as tensors, read or mapped into memory
"""

from harness.io.save_load import load, save

__all__ = ["load", "save"]

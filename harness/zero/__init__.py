"""What we know of DeepSpeed's insides; an upgrade of DeepSpeed touches this folder alone.

Its files, from the top down:

    startup.py      DeepSpeed imported, patched, and joined to the world
    live.py         what a live engine holds, and what can be set on it
    writer.py       files for plain DeepSpeed at another layout, written outside of a run
    muon.py         DeepSpeed's Muon optimizer
    refill.py       the trees of a new layout, filled with what was saved in another
    reader.py       an engine's files, opened without torch: everything by parameter name
    layout.py       what is where in DeepSpeed's own trees, by parameter name
    shards.py       which elements are in the flat tensors that an optimizer is given to step
    parameters.py   what ZeRO does to a parameter
    partition.py    the arithmetic of partitions and shards
"""

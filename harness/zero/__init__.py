"""What we know of DeepSpeed's insides; an upgrade of DeepSpeed touches only this folder.

Its files, from the top down:

    startup.py        imports and patches DeepSpeed; joins the world
    initialize.py     builds DeepSpeed engines; what DeepSpeed refuses is a ConfigError
    leftovers.py      what DeepSpeed keeps in its modules of a run that has ended
    sharded_init.py   builds models in shards, at stage 3
    patches.py        patches of DeepSpeed's classes, so that all stages train alike
    module_values.py  the tensors that modules take, return and leave, at stage 3
    engine_state.py   what a running engine holds, and what can be set on it
    file_trees.py     the trees that a running engine saves, and loads
    module_state.py   a model's state dict, loaded in linear time
    norms.py          the norm that decides whether a step is taken
    arrivals.py       which gradients arrive in a backward, in which order; zeros for the others
    writes.py         notices what changes weights through `weight.data`
    reads.py          refuses what reads weights that are not gathered, at stage 3
    notes.py          what a rank did in a micro-batch, if a collective in it fails
    buckets.py        where stages 1 to 3 collect gradients
    fetches.py        which modules' weights stage 3 gathers
    writer.py         files for plain DeepSpeed in another layout, written outside of a run
    muon.py           DeepSpeed's Muon optimizer
    refill.py         TreeFiller: fills the trees of a new layout with what was saved in another
    reader.py         an engine's files, read without torch: everything by parameter name
    names.py          other names for the entries of a model in DeepSpeed's trees
    rank_files.py     whose a file is, and whether those of all ranks are of one save
    tied_names.py     which names of a state dict are one tensor, and under which it is kept
    entries.py        the entries of a model's state dict: their shapes, and which are trained
    layout.py         where DeepSpeed's trees keep what, by parameter name
    shards.py         which elements are in the flat tensors that an optimizer steps
    parameters.py     what ZeRO does to a parameter
    partition.py      the arithmetic of partitions and shards
"""

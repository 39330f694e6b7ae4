"""DeepSpeed engines: one model under one of them, and the named set that a run steps as one.

Its files, from the top down:

    blame.py           the first module whose output or gradient was not finite
    build.py           builds the engines of a task and a config
    engines.py         Engines: the named set, stepped together
    optimizations.py   applies [optimizations]: replacing, compiling, offloading
    alike.py           whether all ranks have built the same models
    gradient_check.py  whether all ranks gave gradients to the same parameters
    full_tensors.py    the complete tensors of an engine's model, one at a time
    engine.py          Engine: one model under one DeepSpeed engine, by composition
    kept_buffers.py    buffers as they were before a step, restored if it is skipped
    counters.py        what an engine has done so far
    buffers.py         buffers that training changes: rank 0's everywhere, or each rank's own
    attributes.py      what a model's forward leaves in attributes of its submodules
    explained.py       errors of torch's in a model, with the keys that help
    mixed_dtypes.py    what 16-bit engines cast, and the keys that help
    overrides.py       learning rates by group, and clipping: scheduled, or changed by commands
    trainable.py       refuses models that DeepSpeed cannot train
    edits.py           weights that the task changes in place
    turns.py           whose turn it is, and how one engine uses the model of another
    lora.py            low-rank adapters by peft: injected, merged into the weights, saved
    models.py          what DeepSpeed is given: settings, and models built by functions
    ema.py             EMA of an engine's weights, in the optimizer's state
"""

"""DeepSpeed engines: one model under one of them, and the named set that a run steps as one.

Its files, from the top down:

    engines.py         Engines: the named set, stepped as one; built from task and config
    optimizations.py   what [optimizations] asks for: replacing, compiling, offloading
    engine.py          Engine: one model under one DeepSpeed engine, by composition
    overrides.py       learning rate and clipping, as live commands have changed them
    turns.py           whose turn it is, and how one engine uses the model of another
    lora.py            low-rank adapters by peft: put in, merged into the weights, saved alone
    ema.py             the average of an engine's weights, in the optimizer's state
"""

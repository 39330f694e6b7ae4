"""What a run would need, before it is started: memory, traffic, checkpoints.

Its files, from the top down:

    command.py      the command `harness plan`
    text.py         a plan as lines of 80 columns, or JSON
    sources.py      the model: from sizes, an import path, a Hugging Face config, a task
    changes.py      what would make it fit, ranked by cost
    traffic.py      bytes that a rank sends in a step
    memory.py       bytes per rank, by part, and of a checkpoint
    activations.py  what a forward keeps for backward, traced without memory
    llama.py        a model of LLaMA's shape
    setting.py      everything besides the model: ranks, stage, optimizer, ...
"""

"""What our optimizers share: which parameters are in the tensors that ZeRO has them step.

Imports torch and, from harness, only `harness.zero`'s partition, shards and parameters.

    optimizer.py       ShardedOptimizer: parameters, state and its names, behind flat tensors
    elementwise.py     state of the weights' size; AdamW
    tensor_groups.py   tensors that are stepped together
    settings.py        which values of a parameter group's settings are valid
    layouts.py         the tensors that DeepSpeed will have a rank step, from shapes
    param_groups.py    which parameters are matrices
"""

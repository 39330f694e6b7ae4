"""Layers for `optimizations.replace`, one file per package that they come from.

A file is imported only when a config names one of its layers.

    bitnet.py               ternary weights, 8-bit activations; needs only torch
    torchao.py              fp8 and int8 multiplication
    bitsandbytes.py         int8 multiplication, and an embedding with a layer norm
    transformer_engine.py   fp8 multiplication; GPUs only
"""

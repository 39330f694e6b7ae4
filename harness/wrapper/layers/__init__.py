"""Layers for `optimizations.replace`, a file for each package that they come from.

A file is imported when a config names one of its layers.

    bitnet.py               ternary weights, 8-bit activations: nothing but torch
    torchao.py              fp8 and int8 multiplication
    bitsandbytes.py         int8 multiplication, and an embedding with a layer norm
    transformer_engine.py   fp8 multiplication, on GPUs only
"""

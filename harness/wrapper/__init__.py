"""Changes to a model in place: replaced modules, freezing, a larger vocabulary, compilation.

Usable alone: imports torch, `harness.errors` and `harness.zero.parameters`; no DeepSpeed. Other
packages' layers are imported when they are used. docs/replace.md.

    replacement.py   replace: modules of one class by another; inject: while models are built
    encoder.py       torch's encoder layers must call their replaced parts in evaluation, too
    freezing.py      parameters that get no gradient
    vocabulary.py    more rows for embeddings and output heads
    changes.py       ModuleChange: what was done to one module
    compilation.py   torch.compile, for the model or for each of its blocks
    attention.py     the kernel of scaled_dot_product_attention
    placement.py     modules on several devices, for inference and evaluation
    blocks.py        which block a model repeats
    layers/          BitLinear, and other packages' layers that multiply in 8 bits
"""

from harness.wrapper.attention import attention_backend
from harness.wrapper.blocks import repeated_class
from harness.wrapper.changes import ModuleChange
from harness.wrapper.compilation import compile_model
from harness.wrapper.encoder import disable_encoder_fast_path
from harness.wrapper.freezing import freeze
from harness.wrapper.placement import place, plan_placement
from harness.wrapper.replacement import Factory, inject, replace
from harness.wrapper.vocabulary import resize_modules

__all__ = [
    "Factory",
    "ModuleChange",
    "attention_backend",
    "compile_model",
    "disable_encoder_fast_path",
    "freeze",
    "inject",
    "place",
    "plan_placement",
    "repeated_class",
    "replace",
    "resize_modules",
]

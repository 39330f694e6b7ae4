"""Changes to a model in place: replaced modules, freezing, a larger vocabulary, compilation.

Usable alone: imports torch, `harness.errors` and `harness.zero.parameters`; no DeepSpeed. `layers/`
is imported only when one of its layers is used: those of other packages also import
`harness.distributed`, for the rank's device. docs/replace.md.

    vocabulary.py          more rows for embeddings and output heads
    replacement.py         replace, inject: modules of another class, in a model or as it is built
    encoder_fast_path.py   makes torch's encoder layers call replaced modules in evaluation
    freezing.py            parameters that are not trained
    compilation.py         torch.compile, for the model or for each of its blocks
    attention.py           the backend of scaled_dot_product_attention
    placement.py           modules on several devices, for inference and evaluation
    blocks.py              which block a model repeats
    layers/                BitLinear, and 8-bit layers of other packages
"""

from harness.wrapper.attention import attention_backend
from harness.wrapper.blocks import repeated_class
from harness.wrapper.compilation import compile_model
from harness.wrapper.encoder_fast_path import disable_encoder_fast_path
from harness.wrapper.freezing import freeze
from harness.wrapper.placement import place, plan_placement
from harness.wrapper.replacement import Factory, ModuleChange, inject, replace
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

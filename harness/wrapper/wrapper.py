"""Other modules in a model's place, and in that of models to come; freezing; a grown vocabulary.

replace(model, nn.Linear, BitLinear, exclude="head")
with inject(nn.Linear, BitLinear):
    model = Model()
"""

import importlib
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.errors import ConfigError
from harness.offload import repeated_class

Factory = type[nn.Module] | Callable[[Any], nn.Module]

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class ModuleChange:
    """What became of one module: "blocks.0.up: Linear -> BitLinear"."""

    name: str
    """Its path in the model; the first one of a module that stands at several places."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.before} -> {self.after}"


def replace(
    model: nn.Module,
    what: type[nn.Module],
    by: Factory,
    *,
    include: str = ".*",
    exclude: str = "",
) -> list[ModuleChange]:
    """Replaces, in place, the modules of class `what` whose names fit. Returns what was changed.

    - `what`: the very class; modules of its subclasses stay.
    - `by`: a subclass of `what`, which the modules then are of: nothing else about them changes, so
      it may have no `__init__` of its own. Or a function, or another class, that makes a new module
      from the old one, and may hold it as a part.
    - `include`, `exclude`: regular expressions for whole names. A module that stands at several
      places is included, and excluded, by any of its names, and is replaced at all of them.

    A new module takes over the parameters and buffers of the old one as they are, under their
    names: so tied ones stay tied, and dtype, device and `requires_grad` stay. It also takes over
    hooks, with their handles, and the training mode. What else it holds is moved to the old one's
    device and floating dtype.

    Raises ConfigError, with the model as it was, if nothing fits, or a new module has no place for
    a tensor of the old one.
    """
    places = _places(model, what, include, exclude)
    if not places:
        names = ", ".join(n for n, m in model.named_modules() if type(m) is what and n)
        raise ConfigError(
            f"replace: include = {include!r}, exclude = {exclude!r} fit no {what.__name__} of "
            f"{type(model).__name__}; it has: {names[:500] or 'none'}"
        )
    if isinstance(by, type) and issubclass(by, what):
        if by is what or by.__init__ is not what.__init__:
            fault = (
                "is the very class" if by is what else "has an __init__ that would not be called"
            )
            raise ConfigError(
                f"replace: {by.__name__} {fault}: give a subclass of {what.__name__} without one, "
                "or a function that makes a new module from the old one"
            )
        for module in places:
            module.__class__ = by
        disable_encoder_fast_path(model)
        return [ModuleChange(names[0], what.__name__, by.__name__) for names in places.values()]
    _check_apart(places)
    made = {old: _made(names[0], old, by) for old, names in places.items()}
    for old, new in made.items():
        _take_over(old, new)
        for name in places[old]:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = new
    disable_encoder_fast_path(model)
    return [
        ModuleChange(names[0], what.__name__, type(made[old]).__name__)
        for old, names in places.items()
    ]


@contextmanager
def inject(what: type[nn.Module], by: type[nn.Module]) -> Iterator[None]:
    """In the block, whoever builds a `what` gets a `by`, under whatever name they imported it.

    `by` is a subclass of `what`, and is built with the same arguments. Building a subclass of
    `what` by its own name is no different, and what a `by` builds as its parts is plain. Afterwards
    `what` is as it was, after an exception too; what was built keeps its class. One thread at a
    time. Raises ConfigError if `by` is no subclass.
    """
    if not issubclass(by, what) or by is what:
        raise ConfigError(f"inject: {by.__name__} is no subclass of {what.__name__}")
    own = vars(what).get("__init__")
    plain: Any = what.__init__

    is_inside = False

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal is_inside
        if type(self) is not what or is_inside:
            plain(self, *args, **kwargs)
            return
        is_inside = True
        try:
            self.__class__ = by
            by.__init__(self, *args, **kwargs)
        finally:
            is_inside = False

    what.__init__ = build
    try:
        yield
    finally:
        if own is None:
            del what.__init__
        else:
            what.__init__ = own


def disable_encoder_fast_path(model: nn.Module) -> None:
    """Keeps torch's transformer encoder from passing over modules that are not torch's own.

    In evaluation `nn.TransformerEncoderLayer` takes a fast path, which computes with the weights of
    its parts and calls none of them. A layer with other parts than torch's gets a hook, which does
    nothing: with one, torch takes the other path. `replace` does it; do it after `inject`.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _has_others(module):
            module.use_nested_tensor = False  # which only the fast path understands
        is_layer = isinstance(module, nn.TransformerEncoderLayer)
        if is_layer and _has_others(module) and not module._forward_pre_hooks:
            module.register_forward_pre_hook(_nothing)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Lets no gradient reach the parameters that fit. Returns their names.

    A pattern is a regular expression for the whole name of a parameter, or of a module that it is
    in. A tied parameter fits by any of its names. Raises ConfigError, with the model as it was,
    for a pattern that fits nothing.
    """
    fitting: dict[str, list[tuple[str, nn.Parameter]]] = {pattern: [] for pattern in patterns}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        for pattern, found in fitting.items():
            if any(re.fullmatch(pattern, name) for name in names):
                found.append((name, parameter))
    for pattern, found in fitting.items():
        if not found:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ConfigError(f"frozen: {pattern!r} fits no parameter; there are: {names[:500]}")
    frozen = dict(pair for found in fitting.values() for pair in found)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen)


@torch.no_grad()
def resize_modules(model: nn.Module, include: str, size: int) -> list[ModuleChange]:
    """Grows a vocabulary: the rows of the embeddings, and of the linear heads, whose names fit.

    `include`: a regular expression for whole names. Weights [rows, width] and biases [rows] become
    [size, ...]. Old rows stay to the bit; new ones are the mean of the old ones, so that a new
    token starts out as no better a guess than an average one (Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021). Tied weights and biases stay tied, and what
    else holds one of them grows with it. Build the optimizer afterwards. Raises ConfigError, with
    the model as it was, if nothing fits, a module is of another kind, would shrink, or is sharded
    by ZeRO.
    """
    holders: dict[Tensor, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter][name] = module
    chosen = {n: m for n, m in model.named_modules() if re.fullmatch(include, n)}
    if not chosen:
        raise ConfigError(f"resize: {include!r} fits no module of {type(model).__name__}")
    waiting = [*chosen.values()]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.Embedding | nn.Linear):
            tied = dict(holders[module.weight])
            if (bias := module._parameters.get("bias")) is not None:
                tied |= {n: m for n, m in holders[bias].items() if isinstance(m, nn.Linear)}
            waiting += [tied[name] for name in tied.keys() - chosen.keys()]
            chosen |= tied
    for name, module in chosen.items():
        if not isinstance(module, nn.Embedding | nn.Linear):
            raise ConfigError(f"resize: {name!r} is a {type(module).__name__}, no Embedding/Linear")
        if hasattr(module.weight, "ds_id"):
            raise ConfigError(f"resize: {name!r} is sharded by ZeRO already: resize it before")
        if size < len(module.weight):
            raise ConfigError(f"resize: {name!r} has {len(module.weight)} rows: {size} are fewer")
    grown: dict[nn.Parameter, nn.Parameter] = {}
    changes = []
    for name, module in chosen.items():
        for old in module._parameters.values():
            if old is not None and old not in grown:
                grown[old] = _grown(old, size)
        rows = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        changes.append(ModuleChange(name, f"{getattr(module, rows)} rows", f"{size} rows"))
        setattr(module, rows, size)
    for old, new in grown.items():
        for holder in holders[old].values():
            for key, parameter in holder._parameters.items():
                if parameter is old:
                    holder._parameters[key] = new
    return changes


def compile_model(model: nn.Module, *, blocks: bool) -> None:
    """Compiles a model in place, as a whole, or each of its repeated blocks. Names stay.

    It is done at the first call. Raises ConfigError if it has no such blocks.
    """
    if not blocks:
        model.compile()
        return
    repeated = repeated_class(model)
    if repeated is None:
        raise ConfigError(f"compile: {type(model).__name__} has no nn.ModuleList of one class")
    for module in model.modules():
        if type(module) is repeated:
            module.compile()


@contextmanager
def attention(backend: str, dtypes: Iterable[torch.dtype], device: torch.device) -> Iterator[None]:
    """In the block, scaled_dot_product_attention uses this back end alone, or any.

    Raises ConfigError if it has no kernel for one of the dtypes on the device.
    """
    if backend == "any":
        yield
        return
    with sdpa_kernel(BACKENDS[backend]):
        for dtype in dtypes:
            x = torch.zeros(1, 1, 8, 64, dtype=dtype, device=device)
            try:
                nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"attention = {backend!r}: no kernel for {dtype} on {device.type}: {error}"
                ) from None
        yield


def imported(path: str) -> Any:
    """What an import path like "torch.nn:Linear" names. Raises ConfigError."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path!r}: {error}") from None


def _has_others(encoder: nn.Module) -> bool:
    parts = [part for child in encoder.children() for part in child.modules()]
    return any(not type(part).__module__.startswith("torch.nn.") for part in parts)


def _nothing(*_: Any) -> None:
    pass


def _places(
    model: nn.Module, what: type[nn.Module], include: str, exclude: str
) -> dict[nn.Module, list[str]]:
    """The modules that fit, each with all its names."""
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is what:
            names[module].append(name)
    return {
        module: found
        for module, found in names.items()
        if any(re.fullmatch(include, name) for name in found)
        and not (exclude and any(re.fullmatch(exclude, name) for name in found))
    }


def _check_apart(places: dict[nn.Module, list[str]]) -> None:
    """A function cannot be given what is about to be replaced itself, in part or in whole."""
    for outer, names in places.items():
        if "" in names:
            raise ConfigError("replace: a function cannot replace the whole model: call it instead")
        for inner in outer.modules():
            if inner is not outer and inner in places:
                raise ConfigError(
                    f"replace: {places[inner][0]!r} lies within {names[0]!r}, and both fit: choose "
                    "by include or exclude"
                )


def _made(name: str, old: nn.Module, by: Factory) -> nn.Module:
    """What the function makes of a module, if all its tensors have a place there."""
    new = by(old)
    if not isinstance(new, nn.Module):
        raise ConfigError(f"replace: {name}: the function gave a {type(new).__name__}, no Module")
    mine = _tensors(new)
    held = {id(tensor) for tensor in mine.values()}
    for path, tensor in _tensors(old).items():
        if id(tensor) not in held and (path not in mine or _shape(mine[path]) != _shape(tensor)):
            found = _shape(mine[path]) if path in mine else "none"
            raise ConfigError(
                f"replace: {name}: {type(new).__name__} has no place for {path!r} of "
                f"{type(old).__name__}: expected {_shape(tensor)}, found {found}"
            )
    return new


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Gives a new module what the old one holds."""
    theirs = _tensors(old)
    mine = _tensors(new)
    held = {id(tensor) for tensor in mine.values()}
    for path, tensor in theirs.items():
        if id(tensor) not in held:
            parent, _, key = path.rpartition(".")
            owner: Any = new.get_submodule(parent)
            (owner._parameters if key in owner._parameters else owner._buffers)[key] = tensor
    kept = {id(tensor) for tensor in theirs.values()}
    like = next((tensor for tensor in theirs.values() if tensor.is_floating_point()), None)
    for tensor in _tensors(new).values():
        if id(tensor) not in kept and like is not None:
            dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(like.device, dtype)
    parts = set(old.modules())
    for module in new.modules():
        if module not in parts:
            module.training = old.training
    if old in new.modules():  # it is called as a part, with its hooks
        return
    for key, hooks in vars(old).items():
        if "_hooks" in key and isinstance(hooks, dict):  # shared, so that handles stay good
            for hook in hooks.values():
                if getattr(hook, "with_module", False):  # load_state_dict's know their module
                    hook.module = weakref.ref(new)
            hooks.update(vars(new).get(key) or {})
            new.__dict__[key] = hooks


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def _shape(tensor: Tensor) -> list[int]:
    """The whole shape, also of a parameter that ZeRO stage 3 has sharded."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _grown(old: nn.Parameter, size: int) -> nn.Parameter:
    """The same rows, and the mean of them as often as is missing."""
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    new = torch.cat([old, mean.expand(size - len(old), *old.shape[1:])])
    return nn.Parameter(new, requires_grad=old.requires_grad)

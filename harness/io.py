"""State dicts as `.pt` and `.sft`, written by atomic rename."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.files import write_atomically

SAFETENSORS = {".sft", ".safetensors"}
PICKLES = {".pt", ".pth"}
TIED = "tied"
MAX_HEADER = 100_000_000  # bytes; the safetensors library allows no more


def save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes a flat state dict, in the format that the suffix names: .pt, .pth, .sft, .safetensors.

    Tensors that are the same memory (tied weights) are stored once in `.sft`; the key "tied" of its
    metadata then maps each further name to the stored one, as JSON. Raises ValueError for any other
    suffix, and for the one name that safetensors keeps for itself, "__metadata__".
    """
    match _format(path):
        case "sft":
            kept, aliases = _untie(state)
            metadata = {"format": "pt"} | ({TIED: json.dumps(aliases)} if aliases else {})
            write_atomically(path, lambda staged: save_file(kept, staged, metadata))
        case _:
            write_atomically(path, lambda staged: torch.save(dict(state), staged))


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The state dict that `save` wrote, tied tensors tied again. Executes no pickled code."""
    if _format(path) == "pt":
        return torch.load(path, map_location=device, weights_only=True)
    state = load_file(path, device=str(device))
    for alias, kept in tied_names(sft_header(path)).items():
        state[alias] = state[kept]
    return state


def tied_names(header: Mapping[str, Any]) -> dict[str, str]:
    """`{further name: stored name}` of the tensors that `save` found tied."""
    return json.loads(header.get("__metadata__", {}).get(TIED, "{}"))


def sft_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and place of every tensor, and metadata.

    Raises ValueError if it is none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"{path}: a header of {size} bytes, at most {MAX_HEADER} are allowed")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no JSON object")
    return header


def _format(path: Path) -> str:
    if path.suffix in SAFETENSORS:
        return "sft"
    if path.suffix in PICKLES:
        return "pt"
    raise ValueError(f"{path}: expected one of {', '.join(sorted(SAFETENSORS | PICKLES))}")


def _untie(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Contiguous tensors that share no memory, and `{further name: stored name}` for tied ones."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if name == "__metadata__":
            raise ValueError(f"{name!r} cannot be a tensor's name in a safetensors file")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in names:
            aliases[name] = names[view]
            continue
        names[view] = name
        tensor = tensor.contiguous()
        # A view of somebody else's storage would drag it along, and safetensors refuses to share.
        kept[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return kept, aliases

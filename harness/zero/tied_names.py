"""Under which name each entry of a saved state dict is kept: all names of a tied tensor have one.

DeepSpeed's own list of them, `shared_params`, is not relied on. It misses the second name of a
module that is registered twice under one parent (runtime/engine.py, `_get_shared_params`), is empty
in DeepSpeed 0.9 at ZeRO 1 and 2 and None at stage 0, and ties different parameters without
elements. torch.save stores what several names share once: all of them refer to the same place in
the file, at stage 3 too, where parameters are placeholders.
"""

from collections.abc import Collection, Hashable, Mapping

from harness.formats.pt_reader import TensorRef


def source_names(
    module: Mapping[str, TensorRef],
    owners: Collection[str],
    complete: Collection[str],
    listed: Mapping[str, str],
) -> dict[str, str]:
    """For each entry of a state dict the name under which its tensor is kept: usually its own.

    Entries that are kept nowhere are left out. `owners`: the names that have masters or shards of
    their own; no other name is ever their source. `complete`: the names whose entry is the complete
    tensor. `listed`: DeepSpeed's `shared_params`, for files in which every entry is a copy.
    """
    owners_at: dict[Hashable, list[str]] = {}
    complete_at: dict[Hashable, str] = {}
    for name, ref in module.items():
        if name in owners:
            owners_at.setdefault(place(ref), []).append(name)
        elif name in complete and ref.numel():
            complete_at.setdefault(place(ref), name)

    def owner_of(name: str) -> str | None:
        """None also if there are several: a file may have all its placeholders at one place."""
        if name in owners:
            return name
        found = owners_at.get(place(module[name]), ())
        return found[0] if len(found) == 1 else None

    def source_of(name: str) -> str | None:
        if owner := owner_of(name):
            return owner
        other = listed.get(name, name)
        if other in module and module[other].shape == module[name].shape:
            name = other
        itself = name if name in complete else None
        return owner_of(name) or complete_at.get(place(module[name]), itself)

    return {name: source for name in module if (source := source_of(name)) is not None}


def place(ref: TensorRef) -> Hashable:
    """What is equal for entries that are one tensor in the file."""
    return ref.storage, ref.offset, ref.shape, ref.stride, ref.dtype

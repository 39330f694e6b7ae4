"""What DeepSpeed keeps of an engine in its modules and classes, as long as the process lives."""

import importlib
import inspect

OFFLOAD = "deepspeed.runtime.zero.parameter_offload"


def forget() -> None:
    """Drops it, once all engines are closed: weights, and with them process groups and threads."""
    module = importlib.import_module(OFFLOAD)
    module.FWD_MODULE_STACK.clear()  # in whose forward it believes to be
    coordinator = module.PartitionedParameterCoordinator
    release = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()  # `self` is part of its key

"""For torch.save, a pickle module whose Pickler writes a Placeholder as the object that it was.

Its class is named, but neither imported nor called here.
"""

import pickle
from typing import Any, ClassVar

from harness.formats.pickled import Global, Placeholder, UnsupportedTensor

_PythonPickler: Any = vars(pickle)["_Pickler"]
"""Python's own pickler, as the one in C cannot be taught to name what it does not import."""


class Pickler(_PythonPickler):
    """Writes globals and placeholders too, in any protocol from 2 on."""

    def _save_named(self, value: Global) -> None:
        outer, dot, last = value.qualname.rpartition(".")
        if dot:  # of a nested class: found by name only in protocol 4
            self.save_reduce(getattr, (Global(value.module, outer), last), obj=value)
            return
        self.write(pickle.GLOBAL + f"{value.module}\n{value.qualname}\n".encode())
        self.memoize(value)

    def _save_placeholder(self, value: Placeholder) -> None:
        self.save(value.function)
        self.save(value.values)
        if value.options:
            self.save(value.options)
            self.write(pickle.NEWOBJ_EX)
        else:
            self.write(pickle.NEWOBJ if value.is_new else pickle.REDUCE)
        self.memoize(value)
        for kind, operand in value.steps:
            if kind == "state":
                self.save(operand)
                self.write(pickle.BUILD)
                continue
            self.write(pickle.MARK)
            for item in operand:
                self.save(item)
            self.write(pickle.APPENDS if kind == "append" else pickle.SETITEMS)

    dispatch: ClassVar[dict[type, Any]] = {
        **_PythonPickler.dispatch,
        Global: _save_named,
        Placeholder: _save_placeholder,
        UnsupportedTensor: _save_placeholder,
    }

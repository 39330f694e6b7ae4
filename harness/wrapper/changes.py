"""What was done to one module of a model, for logs and callers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleChange:
    """One changed module: "blocks.0.up: Linear -> BitLinear"."""

    name: str
    """Its path in the model; the first one of a module that has several."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.before} -> {self.after}"

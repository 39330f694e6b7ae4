"""The file formats, and `harness convert`, start without torch."""

import pkgutil
import subprocess
import sys

from harness import formats

HEAVY = {"torch", "deepspeed", "pydantic"}


def test_formats_import_neither_torch_nor_deepspeed() -> None:
    modules = [
        f"harness.formats.{module.name}" for module in pkgutil.iter_modules(formats.__path__)
    ]
    assert "harness.formats.safetensors" in modules
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

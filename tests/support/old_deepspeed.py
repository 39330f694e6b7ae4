"""Installs old versions of DeepSpeed, and keeps what each writes as tests/fixtures/deepspeed/.

    python tests/support/old_deepspeed.py [VERSION ...]

Each version is in a directory of its own, beside this environment's torch, with the packages and
the modules that it imports and that have disappeared since.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path

VERSIONS = ("0.8.3", "0.9.5", "0.12.6", "0.14.5", "0.16.9", "0.18.9", "0.19.5", "0.19.8")
"""The last one is that of constraints.txt."""
FIXTURES = Path(__file__).parents[1] / "fixtures" / "deepspeed"
STUBS = ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch")
"""Modules that DeepSpeed imports on a CPU up to 0.12; empty ones do."""


def install(version: str, parent: Path) -> dict[str, str]:
    """The environment variables under which Python imports that version of DeepSpeed."""
    stubs, packages = parent / "stubs", parent / version
    stubs.mkdir(parents=True, exist_ok=True)
    for name in STUBS:
        (stubs / f"{name}.py").touch()
    env = {
        **os.environ,
        "PYTHONPATH": f"{packages}{os.pathsep}{stubs}",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(parent / "extensions"),
    }
    if version == installed_version("deepspeed") or (packages / "deepspeed").exists():
        return env
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    if tuple(map(int, version.split("."))) < (0, 14):
        subprocess.run([*pip, "pydantic<2"], check=True)
    pip += ["--no-deps", "--no-build-isolation", f"deepspeed=={version}"]
    subprocess.run(pip, env=env, check=True)
    return env


def run(version: str, parent: Path, script: str, argument: Path) -> None:
    """Runs a script of this directory on two ranks, under that version."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(Path(__file__).with_name(script)), str(argument)]
    subprocess.run(command, env=install(version, parent), check=True)


def write(version: str, parent: Path) -> Path:
    """The archive of what the version wrote on two ranks."""
    out = parent / "written" / version
    out.mkdir(parents=True)
    run(version, parent, "old_checkpoints.py", out)
    archive = FIXTURES / f"{version}.tar.xz"
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(out, arcname=".", filter=_anonymous)
    return archive


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        parent = Path(os.environ.get("OLD_DEEPSPEED", directory))
        for version in sys.argv[1:] or VERSIONS:
            archive = write(version, parent)
            print(f"{archive}: {archive.stat().st_size} bytes")  # noqa: T201

"""The plan of the house, held against the code.

Every file is in its room's map, imports point down, and what we know of DeepSpeed's insides is in
one room.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "harness"
ASIDE = "testing"
"""A room that nothing else imports, and that may import everything."""

PRIVATE = re.compile(
    r"""\bds\._            # a private attribute of the engine
    |\bds_(id|shape|numel|tensor|status|process_group|persist)\b  # marks on parameters
    |\b_z3_optimizer\b|\b_zero_optimizer\b|\b_dp_group\b
    |\b(fp16|fp32|bf16|bit16)_(partitioned_)?groups?(_flat)?\b
    |\bfp32_flat_groups\b|\bsingle_partition_of_fp32_groups\b|\bpersistent_parameters\b
    |\bbasic_optimizer\b|\bcheckpoint_engine\b|\b_copy_recovery_script\b
    |\.clip_grad\b|\bloss_scale_config\b|\.loss_scaler\b(?!\.[A-Z])|\bcur_scale\b
    |zero_pp_rank|\boptimizer_state_dict\b|\bmodel\[["']module["']\]  # in its files
    |\[["']global_steps["']\]
    |\bupdate_lp_params\b|\bpartition_numel\b|\bswap_optimizer\b|\bpartial_offload\b
    |\bGatheredParameters\b|__compatible_ops__
    |(from|import)\s+deepspeed\.|import_module\("deepspeed\.  # all but `import deepspeed`""",
    re.VERBOSE,
)


def room_map(directory: Path) -> list[str]:
    """The names in the map of a room's docstring, from the top down: "bus.py", "layers/"."""
    return map_in((directory / "__init__.py").read_text())


@cache
def map_in(code: str) -> list[str]:
    docstring = ast.get_docstring(ast.parse(code), clean=False) or ""
    return re.findall(r"^ *(\w+(?:\.py|/)) {2,}\S", docstring, re.MULTILINE)


def rooms(package: Path) -> list[Path]:
    return sorted(file.parent for file in package.rglob("__init__.py"))


def entries(directory: Path) -> set[str]:
    files = {path.name for path in directory.glob("*.py") if path.name != "__init__.py"}
    return files | {f"{path.parent.name}/" for path in directory.glob("*/__init__.py")}


@cache
def imports_in(code: str) -> list[tuple[int, str]]:
    """`(line, dotted name)` of what code imports, anywhere in it."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def imported_by(file: Path, package: Path) -> Iterator[tuple[int, list[str]]]:
    """`(line, parts of a dotted name below the package)` of what a file imports, anywhere in it."""
    for line, name in imports_in(file.read_text()):
        top, *parts = name.split(".")
        if top != package.name:
            continue
        place = package
        found = []
        for part in parts:
            if (place / f"{part}.py").is_file():
                found.append(f"{part}.py")
                break
            if not (place / part / "__init__.py").is_file():
                break  # a name that the package's __init__ defines
            found.append(f"{part}/")
            place /= part
        if found:
            yield line, found


def upward_imports(package: Path) -> list[str]:
    """The imports that do not point down the maps."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        own = [*file.relative_to(package).parts]
        own[:-1] = [f"{part}/" for part in own[:-1]]
        if own[0] == f"{ASIDE}/":
            continue
        for line, other in imported_by(file, package):
            where = f"{file.relative_to(package.parent)}:{line}: {'.'.join(other)}"
            if other[0] == f"{ASIDE}/":
                wrong.append(f"{where}: nothing imports {ASIDE}/")
            room, ours, theirs = package, list(own), list(other)
            while ours and theirs and ours[0] == theirs[0] and ours[0].endswith("/"):
                room /= ours.pop(0).rstrip("/")
                theirs.pop(0)
            if not theirs or ours[0] == "__init__.py":
                continue  # of a room's own API, which its parts are above of
            order = room_map(room)
            known = theirs[0] in order and ours[0] in order
            if known and order.index(theirs[0]) <= order.index(ours[0]):
                wrong.append(f"{where} is not below {ours[0]} in the map of {room.name}/")
    return wrong


@cache
def private_uses_in(code: str) -> list[tuple[int, str]]:
    """`(number, line)` of code that touches DeepSpeed's insides."""
    lines = enumerate(code.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if PRIVATE.search(line)]


def private_uses(package: Path) -> list[str]:
    """The lines outside of zero/ that touch DeepSpeed's insides."""
    return [
        f"{file.relative_to(package.parent)}:{number}: {line}"
        for file in sorted(package.rglob("*.py"))
        if file.relative_to(package).parts[0] not in ("zero", ASIDE)
        for number, line in private_uses_in(file.read_text())
    ]


@pytest.mark.parametrize("room", rooms(PACKAGE), ids=lambda room: str(room.relative_to(ROOT)))
def test_every_file_is_in_its_rooms_map_once(room: Path) -> None:
    assert sorted(room_map(room)) == sorted(entries(room))


def test_imports_point_down() -> None:
    assert upward_imports(PACKAGE) == []


def test_deepspeeds_insides_are_in_one_room() -> None:
    assert private_uses(PACKAGE) == []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "harness"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("errors.py", "from harness.files import locked"),
        ("zero/partition.py", "from harness.zero import engine_state"),
        ("formats/dtypes.py", "def late():\n    import harness.io.save_load"),
        ("config/sections.py", "from harness.testing.pool import RankPool"),
    ],
)
def test_an_import_that_points_up_is_found(copied: Path, file: str, line: str) -> None:
    (copied / file).write_text((copied / file).read_text() + f"\n{line}\n")
    found = upward_imports(copied)
    assert len(found) == 1 and found[0].startswith(f"harness/{file}:"), found


@pytest.mark.parametrize(
    "line",
    [
        "shape = parameter.ds_shape",
        "engine.ds._config.gradient_clipping = 1.0",
        "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3",
        'getattr(parameter, "ds_id", None)',
        'state = tree["optimizer_state_dict"]',
        'steps = saved.model["global_steps"]',
        'weights = saved.model["module"]',
        'path.glob("zero_pp_rank_*")',
    ],
)
def test_a_use_of_deepspeeds_insides_is_found(copied: Path, line: str) -> None:
    file = copied / "trainer.py"
    file.write_text(file.read_text() + f"\n{line}\n")
    assert private_uses(copied) == [
        f"harness/trainer.py:{len(file.read_text().splitlines())}: {line}"
    ]

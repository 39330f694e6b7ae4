"""What a file is, by its first bytes: its name may be anything.

A file of torch.save is read as one and a safetensors file as one, whatever their suffixes. Of
another kind of file the error says what it is, and what to do with it.
"""

import re
import zipfile
from pathlib import Path

from harness.errors import FormatError
from harness.formats import suffixes

PT = "pt"
SAFETENSORS = "safetensors"

_HEAD = 512
_MAX_HEADER = 100_000_000
_ZIP = b"PK\x03\x04"
_LEGACY = re.compile(rb"\x80.{1,10}\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
"""The first pickle of a file of torch.save before torch 1.6: a magic number."""

_DOWNLOAD = "download the file itself, and check its size"
_EXPORT = "export the weights as .pt or .safetensors with the program that wrote it"
_KINDS: list[tuple[str, str, str]] = [
    (r"version https://git-lfs", "a git-lfs pointer to one", "run `git lfs pull` there"),
    (r"\s*(?i:<!doctype|<html)", "an HTML page, as of a failed download", _DOWNLOAD),
    (r"\s*<\?xml|\s*<Error>", "an XML page, as of a failed download", _DOWNLOAD),
    (r'\s*\{\s*"', "JSON text, as of a failed download", _DOWNLOAD),
    (r"GGUF", "a GGUF file of llama.cpp", "use the model's original .safetensors or .pt"),
    (r"\x89HDF\r\n\x1a\n", "an HDF5 file, as of Keras", _EXPORT),
    (r"\x93NUMPY", "a numpy array (.npy)", "load it with numpy.load, and save it with harness.io"),
    (r"\x08[\x01-\x20](\x12|\x3a|\x42|\x1a)", "an ONNX model", "use the weights it was made from"),
    (r"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "a compressed file", "decompress it first"),
    (r".{257}ustar", "a tar archive", "extract it first, with `tar xf`"),
    (r"\x80[\x02-\x05]", "a plain pickle, not of torch.save", "save its tensors with torch.save"),
]
"""Pattern of the first bytes, what the file is, and what to do."""
_BY_PATTERN = [(re.compile(p.encode("latin1"), re.DOTALL), *row) for p, *row in _KINDS]
_BY_SUFFIX = {
    ".msgpack": ("a msgpack file of Flax", _EXPORT),
    ".onnx": ("an ONNX model", "use the weights it was made from"),
    ".h5": ("an HDF5 file, as of Keras", _EXPORT),
}


def format_of(path: Path) -> str:
    """PT or SAFETENSORS: by the content of a file, or by its suffix if the content is neither.

    Raises FormatError that says what the file is instead, OSError if it cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise FormatError(f"{path}: not a regular file")
    with path.open("rb") as file:
        try:
            head = file.read(_HEAD)
        except OSError as error:  # which names no file
            raise FormatError(f"{path}: {error.strerror}") from None
    if head.startswith(_ZIP) or _LEGACY.match(head):
        return PT
    if _begins_as_safetensors(head):
        return SAFETENSORS
    if what := _foreign(head, path):
        raise FormatError(f"{path}: {what}")
    if path.suffix not in suffixes.KNOWN:
        raise FormatError(
            f"{path}: not a file of weights: expected the content of a .pt or an .sft"
        )
    return PT if path.suffix in suffixes.PT else SAFETENSORS


def refuse_foreign_zip(path: Path) -> None:
    """Raises FormatError that says what a zip archive is that torch.save has not written.

    Called after it could not be read. If it is unknown, it returns.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        raise FormatError(
            f"{path}: truncated or damaged: the directory at the end of the zip archive is "
            "missing: copy or download the file again"
        ) from None
    names = [entry.filename for entry in entries]
    if what := _foreign_zip(names):
        raise FormatError(f"{path}: {what}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError(
            f"{path}: its zip archive is compressed, which torch.save does not do: save it "
            "again with torch.save"
        )


def _begins_as_safetensors(head: bytes) -> bool:
    """The length of a JSON header (8 bytes), and its first character."""
    return int.from_bytes(head[:8], "little") <= _MAX_HEADER and head[8:9] == b"{"


def _foreign(head: bytes, path: Path) -> str:
    """What a file is, and what to do; an empty string if it is unknown."""
    if not head:
        return "not a file of weights, but empty: its copy or download has failed: get it again"
    if not head.strip(b"\0"):
        return "not a file of weights: it begins with zeros: its copy or download was cut off"
    for pattern, what, remedy in _BY_PATTERN:
        if pattern.match(head):
            return f"not a file of weights, but {what}: {remedy}"
    if path.suffix in _BY_SUFFIX:
        what, remedy = _BY_SUFFIX[path.suffix]
        return f"not a file of weights, but {what}: {remedy}"
    return ""


def _foreign_zip(names: list[str]) -> str:
    if any(name.endswith("/constants.pkl") for name in names):
        remedy = "save the state dict of `torch.jit.load(FILE)` with torch.save"
        return f"not a file of weights, but a TorchScript archive, which contains code: {remedy}"
    exported = ("/models/model.json", "serialized_exported_program.json")
    if any(name.endswith(exported) for name in names):
        remedy = "save the state dict of `torch.export.load(FILE)` with torch.save"
        return f"not a file of weights, but a program of torch.export: {remedy}"
    if names and all(name.endswith(".npy") for name in names):
        remedy = "load it with numpy.load, and save it with harness.io"
        return f"not a file of weights, but arrays of numpy (.npz): {remedy}"
    return ""

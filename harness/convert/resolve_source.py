"""From a user's path to an engine's files in a checkpoint, or to a file of weights.

Of the checkpoints of one run the newest complete one is taken, as a resume does. If a directory
holds different things that could be meant, nothing is guessed.
"""

import re
from collections.abc import Callable
from pathlib import Path

from harness.convert import foreign_directories
from harness.convert.open_checkpoint import is_plain, open_checkpoint, open_newest
from harness.convert.run_checkpoints import MANIFEST, checkpoints_in
from harness.errors import CheckpointError
from harness.formats import file_kinds, shard_index, tensor_file
from harness.formats.tensor_file import TensorFile
from harness.zero.reader import SavedEngine, check_is_complete, is_engine

LATEST = "latest"

Source = SavedEngine | Path

OnNote = Callable[[str], object]
"""Called with a line for the user: what was taken of a directory, and what was passed over."""

_NUMBERED = re.compile(r"checkpoint[-_](\d{1,18})")
"""Checkpoints of the HF Trainer and of Accelerate."""
_ACCELERATE = re.compile(r"pytorch_model(_\d+)?")
"""Accelerate's tags: one for each model."""
_FURTHER_MODEL = re.compile(r"(model_\d+\.safetensors|pytorch_model_\d+\.bin)")


def resolve_source(
    path: Path,
    engine: str | None = None,
    default_engine: str | None = None,
    on_note: OnNote = lambda _: None,
) -> Source:
    """What to read for `path`.

    - A run directory, or its `checkpoints`: the newest complete checkpoint.
    - A checkpoint: its only engine, the engine named `engine`, or else `default_engine`.
    - `latest` in the `checkpoints` of a run: the newest complete checkpoint, too.
    - A directory with `latest`, from plain DeepSpeed, Accelerate or the HF Trainer, or `latest`
      itself: the tag that it names.
    - The output directory of the HF Trainer, or of Accelerate's numbered checkpoints: the newest.
    - A tag, or a file: itself.
    - A directory of Hugging Face shards: the index, or the only file.

    Raises CheckpointError or FormatError, also if a directory holds several of these.
    """
    source = _Resolver(engine, default_engine, on_note).resolve(path)
    if isinstance(source, SavedEngine) and source.directory != path:
        step = "" if _is_of_run(source) else f", step {source.global_steps}"
        on_note(f"from {_relative(source.directory, path)}{step}")
    elif isinstance(source, Path) and source != path:
        on_note(f"from {_relative(source, path)}")
    return source


def read_file(path: Path, key: str | None = None) -> TensorFile | None:
    """`tensor_file.read`. Raises CheckpointError for one rank's file of a sharded checkpoint, which
    holds placeholders or pieces of its weights."""
    content = tensor_file.read(path, key)
    if content is None or content.key is not None:
        check_is_complete(path)
    if content is not None:
        content.notes.extend(foreign_directories.notes_of_file(path, content.metadata))
    return content


def _is_of_run(source: SavedEngine) -> bool:
    return (source.directory.parent / MANIFEST).is_file()


def _relative(path: Path, parent: Path) -> Path:
    return path.relative_to(parent) if path.is_relative_to(parent) else path


class _Resolver:
    """`resolve_source` without its last note."""

    def __init__(self, engine: str | None, default_engine: str | None, on_note: OnNote):
        self.engine = engine
        self.default_engine = default_engine
        self.on_note = on_note

    def resolve(self, path: Path) -> Source:
        if path.is_file():
            return self.latest(path.parent) if path.name == LATEST else _file(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: {_why_not(path)}")
        if (path / MANIFEST).is_file():
            return open_checkpoint(path, self.engine, self.default_engine)
        if is_engine(path):
            foreign_directories.refuse_tag(path)
            return SavedEngine(path)
        candidates = _candidates(path)
        if not candidates and (path / "checkpoints").is_dir():
            return self.resolve(path / "checkpoints")
        if not candidates:
            raise CheckpointError(f"{path}: {foreign_directories.explain(path)}")
        if (path / "checkpoints").is_dir() and _candidates(path / "checkpoints"):
            candidates.append(path / "checkpoints")
        if len(candidates) > 1:
            names = ", ".join(str(_relative(found, path)) for found in candidates)
            raise CheckpointError(
                f"{path} holds several things that could be meant: {names}: give the path of one, "
                f"like {candidates[0]}"
            )
        if candidates == [path]:
            return open_newest(path, self.engine, self.default_engine, self.pass_over)
        return self.resolve(candidates[0])

    def latest(self, parent: Path) -> Source:
        """What `latest` in a directory means: of a run the newest good checkpoint, whatever it
        names, since the run may have been killed before it wrote that."""
        if checkpoints_in(parent):
            return open_newest(parent, self.engine, self.default_engine, self.pass_over)
        return self.resolve(_tag(parent))

    def pass_over(self, reason: str) -> None:
        self.on_note(f"passed over: {reason}")


def _candidates(path: Path) -> list[Path]:
    """What could be meant by a directory; itself if it holds the checkpoints of a run."""
    if checkpoints_in(path):
        return [path, *_weights(path)]
    if (path / LATEST).is_file():
        tag = _tag(path)
        tags = sorted(p for p in path.iterdir() if _ACCELERATE.fullmatch(p.name) and is_engine(p))
        found = tags if tag in tags else [tag]
        # The Trainer writes the tag and the rounded weights in one save.
        return found if (path / "trainer_state.json").is_file() else [*found, *_weights(path)]
    return [*_newest_numbered(path), *_weights(path)]


def _newest_numbered(path: Path) -> list[Path]:
    """The newest complete checkpoint of the HF Trainer or Accelerate, if there is one."""
    numbers = {
        int(match[1]): found
        for found in path.iterdir()
        if (match := _NUMBERED.fullmatch(found.name))
        and ((found / LATEST).is_file() or _weights(found))
    }
    return [numbers[max(numbers)]] if numbers else []


def _weights(path: Path) -> list[Path]:
    """Files of complete models in a directory."""
    if not path.is_dir():
        return []
    further = [found for found in path.iterdir() if _FURTHER_MODEL.fullmatch(found.name)]
    adapter = path / foreign_directories.ADAPTER
    return [
        *shard_index.find_weights(path),
        *sorted(further),
        *([adapter] if adapter.is_file() else []),
    ]


def _tag(directory: Path) -> Path:
    """The directory that `latest` names."""
    with (directory / LATEST).open("rb") as file:
        tag = file.read(4096).decode(errors="replace").strip()
    if not is_plain(tag):
        raise CheckpointError(
            f"{directory / LATEST}: {tag!r:.80} is not the name of a directory next to it"
        )
    if not (directory / tag).is_dir():
        raise CheckpointError(f"{directory / LATEST} names {tag!r:.80}, which does not exist")
    return directory / tag


def _why_not(path: Path) -> str:
    """Why a path is neither a file nor a directory."""
    if path.exists():
        return "not a regular file"
    is_link = path.is_symlink()
    return "a link to a path that does not exist" if is_link else "no such file or directory"


def _file(path: Path) -> Path:
    if not path.name.endswith(shard_index.SUFFIX):
        file_kinds.format_of(path)
    return path

"""Hostile checkpoints: each is one short error. They are written without ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.convert.resolve_source import resolve_source
from harness.errors import HarnessError
from harness.zero.reader import SavedEngine

MODEL = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize("world", [0, -1, 10**6, "2", None])
def test_a_false_world_size_is_one_short_message(tmp_path: Path, world: Any) -> None:
    model = {"module": {}, "dp_world_size": world, "param_shapes": [{}], "optimizer": None}
    torch.save(model, tmp_path / MODEL)
    state = {"optimizer_state_dict": {"zero_stage": 1}}
    torch.save(state, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(HarnessError, match=r"dp_world_size = |are missing") as caught:
        SavedEngine(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "manifest",
    [
        '{"engines": ["net"], "files": []}',
        f'{{"engines": ["net"], "files": {{"net/{MODEL}": {{}}}}}}',
        f'{{"engines": ["net"], "files": {{"net/{MODEL}": 3}}}}',
        '{"engines": [], "files": ' + "[" * 200_000,
        '{"engines": ["../net"], "files": {}}',
    ],
    ids=["a list", "no size", "no object", "deep", "elsewhere"],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "net").mkdir()
    torch.save({}, tmp_path / "net" / MODEL)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(HarnessError, match=r"manifest\.json is damaged"):
        resolve_source(tmp_path)

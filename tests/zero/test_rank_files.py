"""What is compared between the files of the ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from harness.formats import pt_reader
from harness.zero.rank_files import plain_int


@pytest.mark.parametrize("stage", list(ZeroStageEnum))
def test_a_stage_is_read_as_every_python_pickles_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: ZeroStageEnum
) -> None:
    def by_name(member: ZeroStageEnum, protocol: int) -> Any:  # as Python 3.11.0 to 3.11.3
        return getattr, (type(member), member.name)

    def by_number(member: ZeroStageEnum, protocol: int) -> Any:
        return type(member), (member.value,)

    for reduce in (by_name, by_number):
        monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", reduce)
        torch.save({"zero_stage": stage, "plain": int(stage)}, tmp_path / "x.pt")
        tree = pt_reader.read(tmp_path / "x.pt")
        assert plain_int(tree["zero_stage"]) == plain_int(tree["plain"]) == int(stage)

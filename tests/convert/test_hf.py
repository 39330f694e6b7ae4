"""transformers reads what is exported; what Accelerate and the HF Trainer save is converted."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from harness.convert.convert import Options, convert
from harness.io import load, save
from harness.testing.pool import RankPool

transformers = pytest.importorskip("transformers", reason="needs the extra: hf")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "first")
    return opened(tmp_path / "first", request.param)


def opened(directory: Path, dtype: torch.dtype) -> Any:
    found, report = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    return found.eval()


@pytest.mark.parametrize("shard_size", [None, 10_000])
def test_a_model_of_transformers_there_and_back(
    model: Any, shard_size: int | None, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model.config.save_pretrained(ours)
    save(model.state_dict(), ours if shard_size else ours / "model.safetensors", shard_size)
    found = opened(ours, model.dtype)
    words = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(found(words).logits, model(words).logits)
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    found.save_pretrained(theirs, max_shard_size="10kB")
    state = load(theirs)
    assert set(model.state_dict()) - set(state) == {"lm_head.weight"}
    for name, tensor in state.items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the job has written."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    directory = tmp_path_factory.mktemp("saved")
    with RankPool(2, timeout_s=100) as pool:  # of its own, since Accelerate changes its ranks
        pool.run(save_with_both, directory)
    return directory


def save_with_both(directory: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from tests.support import hf_job

    hf_job.main(directory)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("by", ["accelerate", "trainer"])
def test_checkpoints_of_accelerate_and_trainer_are_converted(
    saved: Path, tmp_path: Path, by: str, stage: int
) -> None:
    src = saved / f"{by}-{stage}"
    dst = tmp_path / "x.sft"
    convert(src, dst, Options(dtype="keep", verify=True), lambda _: None)
    live = torch.load(saved / f"{by}-{stage}.pt")
    found = load(dst)
    assert found.keys() == live.keys() and "lm_head.weight" in live
    assert all(torch.equal(found[name], live[name]) for name in live)
    convert(src, dst, Options(), lambda _: None)
    tagged = src if by == "accelerate" else src / "checkpoint-2"
    expected: Any = get_fp32_state_dict_from_zero_checkpoint(str(tagged))
    assert load(dst).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(dst).items())

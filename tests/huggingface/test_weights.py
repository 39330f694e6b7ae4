"""The weights of a folder under a model's names, as from_pretrained finds them (extra: hf)."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import io
from harness.errors import ConfigError
from harness.huggingface.models import describe
from harness.huggingface.weights import FolderWeights
from harness.io.stored import GrownTensor, read_tensor
from harness.testing.pool import RankPool
from harness.zero.engine_state import gathered
from harness.zero.sharded_init import build_in_shards
from tests.support import hf_folders
from tests.support.helpers import assert_equal

hf = pytest.importorskip("transformers", reason="needs the extra: hf")


def found_in(
    folder: Path, kind: Any = None, vocabulary: int = 300
) -> tuple[Any, dict[str, Tensor]]:
    """A new model of the folder, and the weights that it would start from."""
    description = describe(folder, kind, vocabulary)
    model: Any = description.build()
    entries = model.state_dict(keep_vars=True)
    weights = FolderWeights("lm", description)(model, entries, None)
    assert weights is not None
    read = {
        name: w.read(0, w.rows * w.row.numel()).view(w.shape)
        if isinstance(w, GrownTensor)
        else read_tensor(w)
        for name, w in weights.items()
    }
    return model, read


def rename(folder: Path, change: Any) -> None:
    """Writes the folder's weights under the names that `change` gives them; None leaves one out."""
    state = {change(n): t.clone() for n, t in io.load(folder / "model.safetensors").items()}
    state.pop(None, None)
    io.save(state, folder / "model.safetensors")


def legacy_bert(name: str) -> str:
    """As in files of 2018."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", str),
        ("gpt2", lambda name: name.removeprefix("transformer.")),  # of a GPT2Model, as on the hub
        ("bert", legacy_bert),
        ("t5", str),
    ],
)
def test_names_are_those_that_from_pretrained_finds(name: str, change: Any, tmp_path: Path) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", name)
    rename(folder, change)
    model, found = found_in(folder)
    expected = type(model).from_pretrained(folder).state_dict()
    assert_equal(found, expected)


def test_what_is_missing_or_not_used_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "llama", tie_word_embeddings=False)
    rename(folder, lambda name: "head.w" if name == "lm_head.weight" else name)
    with caplog.at_level(logging.INFO, "harness.huggingface.weights"):
        model, found = found_in(folder)
    assert set(model.state_dict()) - set(found) == {"lm_head.weight"}
    assert "1 weights are missing, and new: lm_head.weight" in caplog.text
    assert "1 weights are not used: head.w" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_larger_vocabulary_has_mean_rows(name: str, is_tied: bool, tmp_path: Path) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", name, tie_word_embeddings=is_tied)
    model, found = found_in(folder, vocabulary=310)
    old = type(model).from_pretrained(folder).state_dict()
    assert model.config.vocab_size == 310
    assert found.keys() == old.keys()
    grown = 0
    for key, tensor in found.items():
        assert torch.equal(tensor[: len(old[key])], old[key])
        if len(tensor) == 310:
            torch.testing.assert_close(tensor[300:], old[key].mean(0).expand_as(tensor[300:]))
            grown += 1
    assert grown >= 1 + (not is_tied)


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    folder = hf_folders.write_folder(tmp_path / "folder", "llama")
    config = hf_folders.config_of("llama", hidden_size=32)
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"other shapes: .*\[300, 16\], expected \[300, 32\]"):
        found_in(folder)
    other = hf_folders.write_folder(tmp_path / "other", "bert")
    config = hf_folders.config_of("llama")
    config.save_pretrained(other)
    with pytest.raises(ConfigError, match="none of its weights is one of the model's"):
        found_in(other, "causal")


def test_weights_that_transformers_converts_are_refused_with_the_remedy(tmp_path: Path) -> None:
    sizes: dict[str, Any] = hf_folders.SIZES | hf_folders.HEADS | {"vocab_size": 300}
    config = hf.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)
    model: Any = hf_folders.model_of(config)
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"converts .* save_original_format=False"):
        found_in(tmp_path / "folder")
    loaded = hf.MixtralForCausalLM.from_pretrained(tmp_path / "folder")
    loaded.save_pretrained(tmp_path / "new", save_original_format=False)
    assert_equal(found_in(tmp_path / "new")[1], model.state_dict())


def build_in_both_ways(names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """New models, built in shards: their gathered weights. Collective."""
    built = {}
    for name in names:
        torch.manual_seed(7)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        model = build_in_shards(lambda name=name: new_model(name), settings)
        built[name] = {}
        for key, parameter in model.named_parameters():
            with gathered(parameter):
                built[name][key] = parameter.detach().clone()
    return built


def new_model(name: str) -> Any:
    return hf_folders.model_of(hf_folders.config_of(name))


def test_new_weights_are_the_same_in_shards(two_ranks: RankPool) -> None:
    """`_init_weights` of transformers is not skipped under zero.Init (its pull request 43847)."""
    for built in two_ranks.run(build_in_both_ways, hf_folders.MODELS):
        for name in hf_folders.MODELS:
            expected = {n: p.detach() for n, p in new_model(name).named_parameters()}
            assert_equal(built[name], expected)

"""Adapters: what they train, what they leave alone, how they are exported (extra: lora)."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import default_collate

from harness.config import Config
from harness.config.engine_sections import LoraConfig
from harness.config.sections import TaskConfig
from harness.engine.lora import adapt, merged, save_adapters
from harness.errors import ConfigError
from harness.io import load, save
from harness.run import run_in_world
from harness.testing.pool import RankPool
from tests.support.helpers import (
    ROOT,
    assert_equal,
    error_of,
    exported,
    exports,
    losses,
    tiny_config,
)
from tests.support.quick import quick
from tests.tasks.tiny_task import Classifier, Points

STAGES = [0, 1, 2, 3]
LORA = {"targets": "first|last", "rank": 3, "alpha": 12}


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs the extra: lora")


def config_of(directory: Path, stage: int, steps: int = 6, **engine: Any) -> Config:
    """A run of the tiny task that starts from the weights in `base.sft`."""
    base = directory / "base.sft"
    if not base.exists():
        directory.mkdir(exist_ok=True)
        torch.manual_seed(3)
        save(Classifier().state_dict(), base)
    settings = {"lora": LORA, "init_from": base, "optimizer": {"lr": 5e-2, "weight_decay": 0.0}}
    return tiny_config(directory, stage, run={"steps": steps}, engines={"net": settings | engine})


def logits(model: Any) -> Tensor:
    points, classes = default_collate([*Points(16)])
    with torch.no_grad():
        return model.eval()(points, classes)


def with_weights(path: Path) -> Classifier:
    model = Classifier()
    model.load_state_dict(load(path))
    return model


@pytest.mark.parametrize("stage", quick(STAGES, 2, 3))
def test_adapters_learn_beside_weights_that_stay_and_are_exported_alone_and_merged(
    peft: Any, two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    config = config_of(tmp_path, stage, steps=20)
    two_ranks.run(run_in_world, config)
    found = losses(config)
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    base, weights = load(tmp_path / "base.sft"), exported(config)
    assert base.keys() == weights.keys()
    for name, tensor in base.items():
        is_same = name not in ("first.weight", "last.weight")
        assert torch.equal(weights[name], tensor) == is_same, name
    adapted = peft.PeftModel.from_pretrained(
        with_weights(tmp_path / "base.sft"), exports(config) / "net.lora"
    )
    assert all("lora" not in name or p.any() for name, p in adapted.named_parameters())
    expected = logits(adapted)
    torch.testing.assert_close(logits(with_weights(exports(config) / "net.sft")), expected)
    assert (logits(with_weights(tmp_path / "base.sft")) - expected).abs().max() > 0.1


@pytest.mark.parametrize("stage", quick(STAGES, 0, 3))
def test_a_run_with_adapters_resumes_to_the_bit(
    peft: Any, two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    lora = LORA | {"dropout": 0.2}
    bf16 = {"bf16": {"enabled": stage == 3}}
    engine = {"lora": lora, "ema_decay": 0.5, "ds_overrides": bf16}
    full = config_of(tmp_path / "full", stage, **engine)
    first, resumed = (config_of(tmp_path / "cut", stage, steps, **engine) for steps in (3, 6))
    for config in (full, first, resumed):
        two_ranks.run(run_in_world, config)
    assert losses(resumed) == losses(full)
    for file in ("net.sft", "net.ema.sft", "net.lora/adapter_model.safetensors"):
        assert_equal(exported(resumed, file=file), exported(full, file=file))
    weights, average = exported(full), exported(full, file="net.ema.sft")
    assert not torch.equal(weights["last.weight"], average["last.weight"])
    assert weights["middle.weight"].dtype == (torch.bfloat16 if stage == 3 else torch.float32)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 0)])
def test_adapters_move_to_another_stage(
    peft: Any, two_ranks: RankPool, tmp_path: Path, before: int, after: int
) -> None:
    full = config_of(tmp_path / "full", after)
    first, resumed = config_of(tmp_path / "cut", before, 3), config_of(tmp_path / "cut", after)
    for config in (full, first, resumed):
        two_ranks.run(run_in_world, config)
    assert_close(resumed, full)


def assert_close(run: Config, expected: Config) -> None:
    """Losses and final weights of two runs agree to 1e-6."""
    assert losses(run) == pytest.approx(losses(expected), abs=1e-6)
    torch.testing.assert_close(exported(run), exported(expected), atol=1e-6, rtol=0)


def test_a_model_that_is_sharded_while_it_is_built_is_adapted(
    peft: Any, two_ranks: RankPool, tmp_path: Path
) -> None:
    plain = config_of(tmp_path / "plain", 3)
    task = {"path": str(ROOT / "tests/tasks/replaced_task.py"), "args": {"zero_init": "inside"}}
    sharded = config_of(tmp_path / "sharded", 3)
    sharded = sharded.model_copy(update={"task": TaskConfig.model_validate(task)})
    for config in (plain, sharded):
        two_ranks.run(run_in_world, config)
    assert_close(sharded, plain)


def test_a_checkpoint_of_other_adapters_is_refused(
    peft: Any, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(run_in_world, config_of(tmp_path, 2, steps=2))
    (error, _) = two_ranks.run(error_of, config_of(tmp_path, 2, lora=LORA | {"rank": 4}))
    assert "'first.lora_A.default.weight' has the shape (4, 6) in this run, and (3, 6)" in error
    (error, _) = two_ranks.run(error_of, config_of(tmp_path, 2, lora=LORA | {"alpha": 24}))
    assert "engine 'net': lora.alpha is 24.0 in the config, and 12.0 in the checkpoint" in error
    assert "or set run.resume_changed = 'fit' to continue with the new one" in error


class Mixed(nn.Module):
    """A layer of every kind that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3)
        self.body = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).mT).mT
        for layer in self.body:
            x = x + layer(x).tanh()
        return self.conv2(x[:, None]).sum(1)


def test_every_kind_of_layer_is_merged_and_loaded_to_the_same_outputs(
    peft: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = Mixed().eval()
    model = copy.deepcopy(plain)
    settings = LoraConfig(targets=r"embed|conv2?|body\.\d", rank=2, alpha=3)
    assert adapt(model, settings) == ["embed", "conv", "conv2", "body.0", "body.1"]
    assert isinstance(model, Mixed)
    tokens = torch.randint(11, (3, 7))
    torch.testing.assert_close(model(tokens), plain(tokens))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = model.eval()(tokens)
    save_adapters(model, model.state_dict(), tmp_path / "adapters")
    again = copy.deepcopy(plain)
    again.load_state_dict(merged(model, model.state_dict()))
    torch.testing.assert_close(again(tokens), expected, atol=1e-5, rtol=1e-5)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapters")
    torch.testing.assert_close(loaded(tokens), expected)
    assert (plain(tokens) - expected).abs().max() > 0.1


def test_adapters_are_called_in_the_evaluation_of_torchs_own_encoder(peft: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    adapt(layer, LoraConfig(targets=r"linear\d"))
    for name, parameter in layer.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)


class Unsupported(nn.Sequential):
    """Layers with settings that peft's adapters lack."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(8, 8, 3, groups=2),
            nn.Conv2d(8, 8, 3, dilation=(1, 2)),
            nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
            nn.Embedding(8, 8, max_norm=1.0),
        )


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        (Mixed, "nothing", "lora.targets = 'nothing': Target modules nothing not found"),
        (Mixed, "body", "ModuleList.* is not supported"),
        (Mixed, "attention", "'attention' is a MultiheadAttention, which has no `weight`"),
        (
            Mixed,
            r"attention\.out_proj",
            "'attention.out_proj' is a submodule of nn.MultiheadAttention",
        ),
        (Classifier, "again", "'again' is tied: middle.weight, again.weight are one tensor"),
        (Unsupported, "0", "'0' has groups = 2, which peft's adapter does not support"),
        (Unsupported, "1", r"'1' has dilation = \(1, 2\)"),
        (Unsupported, "2", "'2' has padding_mode = 'circular'"),
        (Unsupported, "3", "'3' has max_norm = 1.0"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(
    peft: Any, kind: type[nn.Module], targets: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(kind(), LoraConfig(targets=targets))


def test_a_keyword_of_peft_is_not_a_regular_expression(peft: Any) -> None:
    with pytest.raises(ValidationError, match="'All-Linear', a peft keyword"):
        LoraConfig(targets="All-Linear")


def test_without_peft_it_is_an_error_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValidationError, match="peft is not installed: pip install peft"):
        config_of(tmp_path, 0)


def test_a_model_that_is_adapted_already_keeps_its_adapters(peft: Any) -> None:
    """As that of a Task that another run has trained."""
    model = Classifier()
    names = adapt(model, settings := LoraConfig(**LORA))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(True)
    assert adapt(model, settings) == names
    assert_equal(dict(model.state_dict()), weights)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with pytest.raises(ConfigError, match=r"already has adapters, with r = 3 and not 2: build it"):
        adapt(model, settings.model_copy(update={"rank": 2}))

"""Modules replaced and injected, alone and in runs at several ZeRO stages."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import default_collate

from harness.config import Config
from harness.errors import ConfigError
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.wrapper import (
    Factory,
    disable_encoder_fast_path,
    inject,
    replace,
)
from harness.wrapper.layers.bitnet import BitLinear
from tests.support.helpers import ROOT, error_of, exported, losses, tiny_config
from tests.support.imports import loaded_by
from tests.support.offload_models import same
from tests.tasks.replaced_task import Same, Twice, same_from
from tests.tasks.tiny_task import Classifier, Points

LINEARS = ["first", "middle", "again", "last"]


def trained(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """Losses and final weights of a few steps."""
    points, classes = default_collate([*Points(16)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        model(points.to(next(model.parameters()).dtype), classes)
        loss = vars(model).pop("loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found + [tensor.clone() for tensor in model.state_dict().values()]


# ------------------------------------------------------------------------------------------ replace


@pytest.mark.parametrize("by", [Same, same_from])
def test_replaced_by_an_equal_module_it_trains_identically(by: Factory) -> None:
    plain = Classifier().double()
    plain.last.requires_grad_(False)
    model = copy.deepcopy(plain)
    parameters = dict(model.named_parameters())
    changes = replace(model, nn.Linear, by)
    assert [str(change) for change in changes] == [f"{n}: Linear -> Same" for n in LINEARS]
    assert all(type(model.get_submodule(name)) is Same for name in LINEARS)
    assert model.middle.weight is model.again.weight
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert same(trained(model), trained(plain))


@pytest.mark.parametrize("by", [Same, same_from, Twice])
def test_hooks_are_transferred_and_their_handles_stay_valid(by: Factory) -> None:
    model = Classifier().eval()
    calls = []
    handle = model.first.register_forward_hook(lambda *_: calls.append("hook"))
    replace(model, nn.Linear, by, include="first")
    assert not any(module.training for module in model.modules())
    points, classes = default_collate([*Points(4)])
    model(points, classes)
    assert calls == ["hook"]
    handle.remove()
    model(points, classes)
    assert calls == ["hook"]


def test_a_hook_with_a_module_reference_gets_the_new_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[nn.Module] = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    state = model.state_dict()
    replace(model, nn.Linear, same_from)
    gc.collect()
    model.load_state_dict(state)
    assert seen == [model[0]]


def test_include_and_exclude_are_for_full_names() -> None:
    model = Classifier()
    replace(model, nn.Linear, Same, include=".*t", exclude="first")
    assert [n for n in LINEARS if type(model.get_submodule(n)) is Same] == ["last"]
    with pytest.raises(ConfigError, match=r"include = 'las'.*match no Linear of Class.*first"):
        replace(model, nn.Linear, Same, include="las")


def test_a_shared_module_stays_shared_and_a_subclass_stays() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "own": BitLinear(4, 4)})
    (change,) = replace(model, nn.Linear, same_from, include="b.0")
    assert change.name == "a"
    assert type(model["a"]) is Same and model["a"] is model.get_submodule("b.0")
    assert type(model["own"]) is BitLinear


def test_a_module_around_the_old_one_gets_its_dtype() -> None:
    model = Classifier().to(torch.bfloat16)
    replace(model, nn.Linear, Twice, include="first|last")
    assert isinstance(model.first, Twice)
    assert model.first.gain.dtype == torch.bfloat16
    assert type(model.first.inner) is nn.Linear
    trained(model)


@pytest.mark.parametrize("by", [BitLinear, Twice, "inject"])
def test_torchs_encoder_calls_replaced_modules_in_evaluation(by: Any) -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    if by == "inject":
        with inject(nn.Linear, BitLinear):
            model = build()
        disable_encoder_fast_path(model)
    else:
        model = build()
        replace(model, nn.Linear, by)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 4 + [True]])
    for padding in (None, mask):
        trained = model.train()(x, src_key_padding_mask=padding)
        with torch.no_grad():
            evaluated = model.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(evaluated, trained)
    plain = build().eval()
    disable_encoder_fast_path(plain)
    assert not any(module._forward_pre_hooks for module in plain.modules())


class Own(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.more = 1


REFUSED: dict[str, tuple[type[nn.Module], Any, str]] = {
    "itself": (nn.Linear, nn.Linear, "Linear is the class to be replaced"),
    "its own __init__": (nn.Linear, Own, "Own defines __init__, which would not be called"),
    "no module": (
        nn.Linear,
        lambda _: 1,
        "first: the function returned a int, expected",
    ),
    "a lost weight": (
        nn.Linear,
        lambda _: nn.Identity(),
        r"Identity has no parameter or buffer like 'weight' of Linear: expected shape \[16, 6\]",
    ),
    "a lost bias": (
        nn.Linear,
        lambda old: nn.Linear(old.in_features, old.out_features, bias=False),
        "no parameter or buffer like 'bias'",
    ),
    "another shape": (nn.Linear, lambda _: nn.Linear(6, 16), r"\[16, 16\], found \[16, 6\]"),
    "the model itself": (Classifier, Twice, "the model itself cannot be replaced by a function"),
    "a class of nothing": (nn.Conv1d, Twice, "match no Conv1d of Classifier; it has: none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_replacement_leaves_the_model_unchanged(case: str) -> None:
    what, by, message = REFUSED[case]
    model = Classifier()
    before = {name: id(module) for name, module in model.named_modules()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        replace(model, what, by)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert kinds == [type(module) for module in model.modules()]


def test_nested_modules_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Sequential()))
    with pytest.raises(ConfigError, match=r"'0.1' is inside '0', and both match"):
        replace(model, nn.Sequential, Twice, include=".+")


# ------------------------------------------------------------------------------------------- inject


def test_modules_built_in_the_context_are_replaced_and_train_identically() -> None:
    torch.manual_seed(0)
    plain = Classifier()
    before = dict(vars(nn.Linear))
    torch.manual_seed(0)
    with inject(nn.Linear, Same):
        model = Classifier()
        own = BitLinear(2, 2)
        inner = Own(2, 2)
    assert dict(vars(nn.Linear)) == before
    assert [type(model.get_submodule(n)) for n in LINEARS] == [Same] * 4
    assert (type(own), type(inner)) == (BitLinear, Own)
    assert type(nn.Linear(2, 2)) is nn.Linear
    assert same(trained(model), trained(plain))


def test_an_injected_class_may_define_init() -> None:
    with inject(nn.Linear, Own):
        layer: Any = nn.Linear(2, 3, bias=False)
    assert (type(layer), layer.more, layer.bias) == (Own, 1, None)


class Gated(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.gate = nn.Linear(inputs, 1)


def test_submodules_that_a_replacement_builds_are_not_replaced() -> None:
    with inject(nn.Linear, Gated):
        models = [nn.Linear(3, 2) for _ in range(2)]
    assert [type(model) for model in models] == [Gated, Gated]
    assert [type(model.gate) for model in models] == [nn.Linear, nn.Linear]


def test_a_class_without_its_own_init_is_restored_without_one() -> None:
    class Wide(nn.ReLU6):
        pass

    before = dict(vars(nn.Identity)), dict(vars(Wide))
    with inject(Wide, type("Wider", (Wide,), {})):
        assert type(Wide()).__name__ == "Wider"
    assert before == (dict(vars(nn.Identity)), dict(vars(Wide)))


def test_torch_is_restored_after_an_exception_and_when_nested() -> None:
    before = nn.Linear.__init__
    with pytest.raises(ZeroDivisionError), inject(nn.Linear, Same), inject(Same, Own2):
        assert type(nn.Linear(1, 1)) is Own2
        raise ZeroDivisionError
    assert nn.Linear.__init__ is before
    assert "__init__" not in vars(Same)
    with pytest.raises(ConfigError, match="Bilinear is not a subclass of Linear"):
        inject(nn.Linear, nn.Bilinear).__enter__()


class Own2(Same):
    pass


# ------------------------------------------------------------------------------------------ in runs


BY = ["tests.tasks.replaced_task:Same", "tests.tasks.replaced_task:same_from", "inject"]


@pytest.mark.parametrize(
    ("stage", "by"), [(3, by) for by in BY] + [(stage, BY[1]) for stage in (0, 2)]
)
def test_a_run_with_equal_replacements_is_the_same_run(
    two_ranks: RankPool, tmp_path: Path, plain_runs: Callable[[int], Config], stage: int, by: str
) -> None:
    over: dict[str, Any] = {"optimizations": {"replace": [{"what": "torch.nn:Linear", "by": by}]}}
    if by == "inject":
        over = {"task": {"path": str(ROOT / "tests/tasks/replaced_task.py")}}
    config = tiny_config(tmp_path, stage, **over)
    two_ranks.run(run_in_world, config)
    plain = plain_runs(stage)
    assert losses(config) == losses(plain)
    found, expected = exported(config), exported(plain)
    assert list(found) == list(expected)
    assert same(list(found.values()), list(expected.values()))
    if by != "inject":
        assert (
            "replaced first: Linear -> Same; middle: " in (config.run_dir / "log.txt").read_text()
        )


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_model_that_is_sharded_while_it_is_built_is_the_same_run(
    two_ranks: RankPool, tmp_path: Path, plain_runs: Callable[[int], Config], where: str
) -> None:
    task = {"path": str(ROOT / "tests/tasks/replaced_task.py"), "args": {"zero_init": where}}
    config = tiny_config(tmp_path, 3, task=task)
    two_ranks.run(run_in_world, config)
    assert losses(config) == losses(plain_runs(3))
    found, expected = exported(config), exported(plain_runs(3))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pattern_that_matches_no_module_is_an_error(two_ranks: RankPool, tmp_path: Path) -> None:
    entry = {"what": "torch.nn:Conv1d", "by": "tests.tasks.replaced_task:Twice"}
    config = tiny_config(tmp_path, optimizations={"replace": [entry]})
    (error, _) = two_ranks.run(error_of, config)
    assert "optimizations.replace:\nengine 'net': replace: include = '.*'" in error
    assert not config.run_dir.exists()


WRONG = {
    "no package": ({"by": "nowhere.to:Be"}, "package 'nowhere' is not installed"),
    "no engine": ({"engine": "nett"}, "no engine is named 'nett' .did you mean 'net'?"),
    "no path": ({"what": "Linear"}, "should match pattern"),
    "no pattern": ({"include": "("}, "is not a regular expression"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_a_config_error(tmp_path: Path, case: str) -> None:
    entry, message = WRONG[case]
    entry = {"what": "torch.nn:Linear", "by": "harness.wrapper.layers.bitnet:BitLinear"} | entry
    with pytest.raises(ValidationError, match=message):
        tiny_config(tmp_path, optimizations={"replace": [entry]})


def test_usable_alone() -> None:
    """Nothing of the trainer and no DeepSpeed is imported, nor a package that layers are from."""
    loaded = loaded_by("import harness.wrapper")
    own = {name for name in loaded if name.startswith("harness.wrapper")}
    assert not any(name.startswith("harness.wrapper.layers") for name in own)
    zero = {"harness.zero", "harness.zero.parameters"}
    assert loaded - own == {"harness", "harness.errors", "harness.utils", *zero}

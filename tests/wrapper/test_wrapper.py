"""Replacing modules, freezing and growing them, alone and in runs at every ZeRO stage."""

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
from harness.io import load
from harness.run import run_in_world
from harness.testing.pool import RankPool
from harness.wrapper.layers.bitnet import BitLinear, eight_bit, ternary
from harness.wrapper.wrapper import (
    Factory,
    attention,
    compile_model,
    disable_encoder_fast_path,
    freeze,
    inject,
    replace,
    resize_modules,
)
from tests.support.helpers import ROOT, error_of, losses, tiny_config
from tests.support.offload_models import Model, step
from tests.tasks.replaced_task import Same, Twice, same_from
from tests.tasks.tiny_task import Classifier, Points

STAGES = [0, 1, 2, 3]
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


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# ------------------------------------------------------------------------------------------ replace


@pytest.mark.parametrize("by", [Same, same_from])
def test_replaced_by_the_same_it_trains_as_before(by: Factory) -> None:
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
def test_hooks_go_along_and_their_handles_stay_good(by: Factory) -> None:
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


def test_a_hook_that_knows_its_module_gets_the_new_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[nn.Module] = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    state = model.state_dict()
    replace(model, nn.Linear, same_from)
    gc.collect()
    model.load_state_dict(state)
    assert seen == [model[0]]


def test_include_and_exclude_are_for_whole_names() -> None:
    model = Classifier()
    replace(model, nn.Linear, Same, include=".*t", exclude="first")
    assert [n for n in LINEARS if type(model.get_submodule(n)) is Same] == ["last"]
    with pytest.raises(ConfigError, match=r"include = 'las'.*fit no Linear of Classifier.*first"):
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
def test_torchs_own_encoder_calls_what_is_replaced_in_evaluation_too(by: Any) -> None:
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
    "itself": (nn.Linear, nn.Linear, "Linear is the very class"),
    "its own __init__": (nn.Linear, Own, "Own has an __init__ that would not be called"),
    "no module": (nn.Linear, lambda _: 1, "first: the function gave a int, no Module"),
    "a lost weight": (
        nn.Linear,
        lambda _: nn.Identity(),
        r"Identity has no place for 'weight' of Linear: expected \[16, 6\], found none",
    ),
    "a lost bias": (
        nn.Linear,
        lambda old: nn.Linear(old.in_features, old.out_features, bias=False),
        "no place for 'bias'",
    ),
    "another shape": (nn.Linear, lambda _: nn.Linear(6, 16), r"\[16, 16\], found \[16, 6\]"),
    "the whole": (Classifier, Twice, "cannot replace the whole model"),
    "a class of nothing": (nn.Conv1d, Twice, "fit no Conv1d of Classifier; it has: none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case: str) -> None:
    what, by, message = REFUSED[case]
    model = Classifier()
    before = {name: id(module) for name, module in model.named_modules()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        replace(model, what, by)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert kinds == [type(module) for module in model.modules()]


def test_modules_within_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Sequential()))
    with pytest.raises(ConfigError, match=r"'0.1' lies within '0', and both fit"):
        replace(model, nn.Sequential, Twice, include=".+")


# ------------------------------------------------------------------------------------------- inject


def test_what_is_built_in_the_context_is_replaced_and_trains_as_before() -> None:
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


def test_the_replacement_may_have_an_init_of_its_own() -> None:
    with inject(nn.Linear, Own):
        layer: Any = nn.Linear(2, 3, bias=False)
    assert (type(layer), layer.more, layer.bias) == (Own, 1, None)


class Gated(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.gate = nn.Linear(inputs, 1)


def test_what_a_replacement_builds_inside_is_plain() -> None:
    with inject(nn.Linear, Gated):
        models = [nn.Linear(3, 2) for _ in range(2)]
    assert [type(model) for model in models] == [Gated, Gated]
    assert [type(model.gate) for model in models] == [nn.Linear, nn.Linear]


def test_a_class_without_an_init_of_its_own_is_left_without_one() -> None:
    class Wide(nn.ReLU6):
        pass

    before = dict(vars(nn.Identity)), dict(vars(Wide))
    with inject(Wide, type("Wider", (Wide,), {})):
        assert type(Wide()).__name__ == "Wider"
    assert before == (dict(vars(nn.Identity)), dict(vars(Wide)))


def test_torch_is_as_it_was_after_an_exception_and_when_nested() -> None:
    before = nn.Linear.__init__
    with pytest.raises(ZeroDivisionError), inject(nn.Linear, Same), inject(Same, Own2):
        assert type(nn.Linear(1, 1)) is Own2
        raise ZeroDivisionError
    assert nn.Linear.__init__ is before
    assert "__init__" not in vars(Same)
    with pytest.raises(ConfigError, match="Bilinear is no subclass of Linear"):
        inject(nn.Linear, nn.Bilinear).__enter__()


class Own2(Same):
    pass


# ------------------------------------------------------------------------------------------ in runs


@pytest.fixture(scope="module")
def plain_runs(
    two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Config]:
    done: dict[int, Config] = {}

    def run(stage: int) -> Config:
        if stage not in done:
            done[stage] = tiny_config(tmp_path_factory.mktemp("plain"), stage)
            two_ranks.run(run_in_world, done[stage])
        return done[stage]

    return run


def exported(config: Config) -> dict[str, Tensor]:
    return load(config.run_dir / f"exports/step-{config.run.steps:08d}/net.sft")


BY = ["tests.tasks.replaced_task:Same", "tests.tasks.replaced_task:same_from", "inject"]


@pytest.mark.parametrize(
    ("stage", "by"), [(3, by) for by in BY] + [(stage, BY[1]) for stage in (0, 2)]
)
def test_a_run_with_the_same_in_their_place_is_the_same_run(
    two_ranks: RankPool, tmp_path: Path, plain_runs: Any, stage: int, by: str
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
    two_ranks: RankPool, tmp_path: Path, plain_runs: Any, where: str
) -> None:
    task = {"path": str(ROOT / "tests/tasks/replaced_task.py"), "args": {"zero_init": where}}
    config = tiny_config(tmp_path, 3, task=task)
    two_ranks.run(run_in_world, config)
    assert losses(config) == losses(plain_runs(3))
    found, expected = exported(config), exported(plain_runs(3))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_replacement_that_fits_nothing_is_an_error(two_ranks: RankPool, tmp_path: Path) -> None:
    entry = {"what": "torch.nn:Conv1d", "by": "tests.tasks.replaced_task:Twice"}
    config = tiny_config(tmp_path, optimizations={"replace": [entry]})
    (told, _) = two_ranks.run(error_of, config)
    assert "optimizations.replace:\nengine 'net': replace: include = '.*'" in told
    assert not config.run_dir.exists()


def test_a_back_end_that_cannot_attend_here_is_an_error(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, optimizations={"attention": "cudnn"})
    (told, _) = two_ranks.run(error_of, config)
    assert "attention = 'cudnn': no kernel for torch.float32 on cpu" in told
    assert not config.run_dir.exists()


WRONG = {
    "no package": ({"by": "nowhere.to:Be"}, "package 'nowhere' is not installed"),
    "no engine": ({"engine": "nett"}, "there is no engine 'nett' .did you mean 'net'?"),
    "no path": ({"what": "Linear"}, "should match pattern"),
    "no pattern": ({"include": "("}, "is no regular expression"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_an_error_of_the_config(tmp_path: Path, case: str) -> None:
    entry, message = WRONG[case]
    entry = {"what": "torch.nn:Linear", "by": "harness.wrapper.layers.bitnet:BitLinear"} | entry
    with pytest.raises(ValidationError, match=message):
        tiny_config(tmp_path, optimizations={"replace": [entry]})


# ------------------------------------------------------------------------------ frozen, and resumed


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_frozen_stays_and_the_rest_resumes_exactly(
    two_ranks: RankPool, tmp_path: Path, stage: int, plain_runs: Any
) -> None:
    engines = {"net": {"frozen": ["middle", r"last\.bias"]}}
    whole = tiny_config(tmp_path / "whole", stage, engines=engines)
    two_ranks.run(run_in_world, whole)
    parts = [
        tiny_config(tmp_path / "cut", stage, engines=engines, run={"steps": n}) for n in (3, 6)
    ]
    for part in parts:
        two_ranks.run(run_in_world, part)
    first, last = exported(parts[0]), exported(parts[1])
    for name, tensor in last.items():
        is_frozen = name in {"middle.weight", "again.weight", "last.bias", "scale"}
        assert torch.equal(tensor, first[name]) == is_frozen, name
    assert same(list(last.values()), list(exported(whole).values()))
    assert losses(parts[1]) == losses(whole)
    assert losses(whole) != losses(plain_runs(stage))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (0, 2)])
def test_what_is_frozen_moves_to_another_stage(
    two_ranks: RankPool, tmp_path: Path, before: int, after: int
) -> None:
    engines = {"net": {"frozen": ["middle", r"last\.bias"]}}
    whole = tiny_config(tmp_path / "whole", after, engines=engines)
    first = tiny_config(tmp_path / "cut", before, engines=engines, run={"steps": 3})
    rest = tiny_config(tmp_path / "cut", after, engines=engines)
    for config in (whole, first, rest):
        two_ranks.run(run_in_world, config)
    assert losses(rest) == pytest.approx(losses(whole), abs=1e-6)
    for name, tensor in exported(whole).items():
        torch.testing.assert_close(exported(rest)[name], tensor, atol=1e-6, rtol=0)


def test_a_frozen_pattern_that_fits_nothing_is_an_error() -> None:
    model = Classifier()
    with pytest.raises(ConfigError, match=r"'mid' fits no parameter; there are: first\.weight"):
        freeze(model, ["first", "mid"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert freeze(model, [r"again\.weight"]) == ["again.weight"]
    assert not model.middle.weight.requires_grad


# ------------------------------------------------------------------------------- a grown vocabulary


class Tied(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(10, 4, padding_idx=0)
        self.head = nn.Linear(4, 10)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize(("tied", "include"), [(True, "embed"), (False, "embed|head")])
def test_a_vocabulary_grows_with_its_head(tied: bool, include: str) -> None:
    model = Tied(tied).to(torch.bfloat16)
    model.head.bias.requires_grad_(False)
    tokens = torch.arange(10)
    before, rows = model(tokens), model.embed.weight.detach().clone()
    changes = resize_modules(model, include, 13)
    assert [str(c) for c in changes] == ["embed: 10 rows -> 13 rows", "head: 10 rows -> 13 rows"]
    assert (model.head.weight is model.embed.weight) == tied
    assert model.embed.weight.dtype == torch.bfloat16
    assert (model.head.bias.requires_grad, model.head.weight.requires_grad) == (False, True)
    assert torch.equal(model(tokens)[:, :10], before)
    assert torch.equal(model.embed.weight[10:], rows.float().mean(0).bfloat16().expand(3, 4))
    assert (model.embed.num_embeddings, model.head.out_features) == (13, 13)
    model(torch.tensor([12])).sum().backward()


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 6)
        self.other = nn.Linear(3, 6)
        self.bias = self.other.bias = self.decoder.bias


def test_a_shared_bias_stays_shared() -> None:
    model = SharedBias()
    changes = resize_modules(model, "decoder", 8)
    assert list(map(str, changes)) == [
        "decoder: 6 rows -> 8 rows",
        "other: 6 rows -> 8 rows",
    ]
    assert model.bias is model.decoder.bias is model.other.bias
    assert (model.bias.shape, model.other.weight.shape) == ((8,), (8, 3))


@pytest.mark.parametrize(
    ("include", "size", "message"),
    [
        ("embed", 9, "'embed' has 10 rows: 9 are fewer"),
        ("nothing", 11, "'nothing' fits no module of Tied"),
        ("", 11, "'' is a Tied, no Embedding/Linear"),
    ],
)
def test_an_impossible_size_is_refused(include: str, size: int, message: str) -> None:
    model = Tied(True)
    with pytest.raises(ConfigError, match=message):
        resize_modules(model, include, size)
    assert len(model.embed.weight) == len(model.head.weight) == 10


# ----------------------------------------------------------------------------------------- adapters


def test_bitnet_computes_with_three_weights_and_lets_gradients_through() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = BitLinear(8, 4)
    x = torch.randn(3, 8, generator=generator, requires_grad=True)
    mean = layer.weight.abs().mean()
    quantized = ternary(layer.weight) / mean
    assert set(quantized.round(decimals=5).unique().tolist()) == {-1.0, 0.0, 1.0}
    levels = eight_bit(x) / x.abs().amax(-1, keepdim=True) * 127
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (eight_bit(x) - x).abs().max() <= x.abs().max() / 254 + 1e-6
    y = layer(x)
    torch.testing.assert_close(y, eight_bit(x) @ ternary(layer.weight).T + layer.bias)
    y.sum().backward()
    assert layer.weight.grad is not None and x.grad is not None
    torch.testing.assert_close(layer.weight.grad, eight_bit(x).sum(0).expand(4, 8))
    torch.testing.assert_close(x.grad, ternary(layer.weight).sum(0).expand(3, 8))
    assert torch.equal(ternary(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_a_run_with_bitnet_learns(two_ranks: RankPool, tmp_path: Path) -> None:
    entry = {
        "what": "torch.nn:Linear",
        "by": "harness.wrapper.layers.bitnet:BitLinear",
        "exclude": "first|last",
    }
    config = tiny_config(tmp_path, 2, optimizations={"replace": [entry]}, run={"steps": 30})
    two_ranks.run(run_in_world, config)
    found = losses(config)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
def test_a_compiled_model_keeps_its_names_and_computes_the_same(blocks: bool) -> None:
    plain = Model(blocks=2).eval()
    model = copy.deepcopy(plain)
    compile_model(model, blocks=blocks)
    assert list(model.state_dict()) == list(plain.state_dict())
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == (["blocks.0", "blocks.1"] if blocks else [""])
    for found, expected in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_cannot_be_compiled_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Classifier has no nn\.ModuleList"):
        compile_model(Classifier(), blocks=True)
    with pytest.raises(ValidationError, match="engine 'net' is at ZeRO stage 3"):
        tiny_config(tmp_path, 3, optimizations={"compile": "blocks"})


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_has_the_same_losses(
    tmp_path: Path, plain_runs: Callable[[int], Config], stage: int
) -> None:
    config = tiny_config(tmp_path, stage, optimizations={"compile": True})
    with RankPool(2, timeout_s=300) as pool:
        pool.run(run_in_world, config)
    assert losses(config) == pytest.approx(losses(plain_runs(stage)), abs=1e-6)
    assert list(exported(config)) == list(exported(plain_runs(stage)))


def test_only_the_chosen_back_end_attends_and_an_impossible_one_is_told() -> None:
    cpu = torch.device("cpu")
    flags = torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.flash_sdp_enabled
    assert [flag() for flag in flags] == [True, True]
    with attention("math", [torch.float32, torch.bfloat16], cpu):
        assert [flag() for flag in flags] == [True, False]
    message = "attention = 'cudnn': no kernel for torch.float32 on cpu"
    with pytest.raises(ConfigError, match=message), attention("cudnn", [torch.float32], cpu):
        pass
    assert [flag() for flag in flags] == [True, True]

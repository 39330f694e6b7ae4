"""The default feeder, and the kinds of batches and outputs that it takes."""

from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import TaskError
from harness.run import run_in_world
from harness.task import Task, count_batch, default_feeder, validate
from harness.testing.pool import RankPool
from harness.utils import tensor_leaves, to_device
from tests.support.helpers import ROOT, losses, tiny_config
from tests.tasks.batch_task import OUTPUTS as KINDS


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any
    name: str = field(default="a", init=False)


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any

    def __post_init__(self) -> None:
        assert self.x is not None, "a copy does not run this again"


class Encoding(UserDict):
    """Like transformers' BatchEncoding: attributes of its own, and another __init__."""

    def __init__(self, data: dict[str, Any], *, encodings: str):
        super().__init__(data)
        self.encodings = encodings


Named = namedtuple("Named", "x y")

X, Y = torch.ones(4, 3), torch.arange(4)
BATCHES = {
    "dict": {"x": X, "y": Y},
    "UserDict": Encoding({"x": X, "y": Y}, encodings="kept"),
    "frozen dataclass": Frozen(X, Y),
    "dataclass with slots": Slotted(X, Y),
    "named tuple": Named(X, Y),
    "list": [X, Y],
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_kind_of_batch_is_moved_and_counted(batch: Any) -> None:
    nested = {"batch": [batch, None], "name": "a string", "number": 3}
    moved = to_device(nested, torch.device("meta"), torch.bfloat16)
    assert type(moved["batch"][0]) is type(batch)
    found = tensor_leaves(moved)
    assert [(leaf.device.type, leaf.dtype) for leaf in found] == [
        ("meta", torch.bfloat16),
        ("meta", torch.int64),
    ]
    assert (moved["batch"][1], moved["name"], moved["number"]) == (None, "a string", 3)
    assert [leaf.device.type for leaf in tensor_leaves(batch)] == ["cpu", "cpu"]  # not in place
    assert getattr(moved["batch"][0], "encodings", "kept") == "kept"
    assert getattr(moved["batch"][0], "name", "a") == "a"
    assert count_batch(nested) == (4, 0)


def test_a_batch_without_tensors_is_one_sample() -> None:
    for batch in (None, "text", {"text": None}):
        assert to_device(batch, torch.device("cpu")) == batch
        assert count_batch(batch) == (1, 0)


def test_only_integers_and_sequences_of_vectors_are_tokens() -> None:
    ids = torch.ones(4, 7, dtype=torch.long)
    assert count_batch({"ids": ids, "x": X}) == (4, 28)
    assert count_batch([torch.ones(4, 7, 3), Y]) == (4, 28)
    for batch in (torch.ones(4, 3, 8, 8), ids.view(4, 7, 1, 1), X, Y):
        assert count_batch([batch]) == (4, 0)


class Fed:
    """A bare model in place of an engine."""

    name, device, dtype = "net", torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def gather_attribute(self, name: str, kind: type = object) -> dict[str, Any]:
        found = vars(self.module)
        return {"": found.pop(name)} if isinstance(found.get(name), kind) else {}


class Model(nn.Module):
    """Returns, or sets on itself, the sum of x times the sum of y."""

    def __init__(self, returned: Any = None):
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor, y: Tensor, name: str = "") -> Any:
        loss = x.sum() * y.sum()
        if self.returned is None:
            self.loss = loss
            return None
        return self.returned(loss)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_default_feeder_takes_every_kind_of_batch(batch: Any) -> None:
    assert default_feeder(Fed(Model()), batch) == (torch.tensor(72.0), {})


@pytest.mark.parametrize(
    "returned",
    [
        lambda loss: {"loss": loss, "logits": loss},
        lambda loss: UserDict(loss=loss),
        lambda loss: SimpleNamespace(loss=loss),
        lambda loss: Output(loss),
    ],
    ids=["dict", "UserDict", "object", "dataclass"],
)
def test_the_loss_may_be_in_the_output(returned: Any) -> None:
    assert default_feeder(Fed(Model(returned)), [X, Y]) == (torch.tensor(72.0), {})


@dataclass
class Output:
    loss: Tensor


def test_an_output_without_a_loss_is_an_error() -> None:
    for returned in (lambda loss: {"logits": loss}, lambda loss: SimpleNamespace(loss=None)):
        with pytest.raises(TaskError, match="forward set no `loss` on any submodule of Model, and"):
            default_feeder(Fed(Model(returned)), [X, Y])
    with pytest.raises(TaskError, match=r"the loss of the model has shape \[1\], expected a sc"):
        default_feeder(Fed(Model(lambda loss: {"loss": loss[None]})), [X, Y])


def test_a_model_and_a_batch_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    ids = torch.arange(10).view(2, 5)
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": torch.ones(2, 5), "labels": ids}
    )
    model = transformers.GPT2LMHeadModel(config)
    loss, stats = default_feeder(Fed(model), batch)
    assert loss.requires_grad and loss.ndim == 0 and stats == {}
    assert count_batch(batch) == (2, 10)


@pytest.mark.parametrize("stage", [1, 3])
def test_kinds_of_batches_and_outputs_train_alike(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    found = {}
    for name, kind in {"plain": "dict", **{kind: kind for kind in KINDS}}.items():
        zero = {"stage3_param_persistence_threshold": 0}
        config = tiny_config(
            tmp_path / name,
            0 if name == "plain" else stage,
            task={"path": str(ROOT / "tests/tasks/batch_task.py"), "args": {"kind": kind}},
            engines={"net": {"ds_overrides": {"zero_optimization": zero}}},
        )
        two_ranks.run(run_in_world, config)
        found[name] = losses(config)
    for kind in KINDS:
        assert found[kind] == pytest.approx(found["plain"], rel=1e-6), kind


@pytest.mark.parametrize("key", ["init_weights", "exporters"])
def test_what_is_given_for_an_engine_needs_its_model(key: str) -> None:
    given: dict[str, Any] = {key: {"nett": print}}
    task = Task(models={"net": nn.Linear(1, 1)}, train_data=[], **given)
    with pytest.raises(TaskError, match=f"{key}: there is no model 'nett'"):
        validate(task, "x.py")

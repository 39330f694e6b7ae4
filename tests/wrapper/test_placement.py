"""Parts of a model on several devices: where they go, and that the model computes the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from harness.errors import ConfigError
from harness.utils import tensor_leaves
from harness.wrapper import place, plan_placement
from tests.support.offload_models import Block

MB = 1e6
COPY, INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class Devices(TorchDispatchMode):
    """CPUs "cpu:1", "cpu:2", ... that share one memory, apart as devices of different kinds are.

    Torch takes them for the same one; here an operation on tensors of two of them fails, as it does
    between a CPU and a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, str] = {}
        self.used: set[str] = set()

    def of(self, tensor: Tensor) -> str:
        return self.places.get(tensor.untyped_storage().data_ptr(), "cpu")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        here = {self.of(tensor) for tensor in tensor_leaves((args, kwargs)) if tensor.dim()}
        if func is INTO:  # from anywhere; the target stays where it is
            return func(*args, **kwargs)
        if len(here) > 1 and func is not COPY:
            raise RuntimeError(f"{func}: tensors on {sorted(here)}")
        target = str(kwargs["device"]) if kwargs.get("device") else next(iter(here), "cpu")
        self.used.add(target)

        def note(tensor: Tensor) -> Tensor:
            self.places[tensor.untyped_storage().data_ptr()] = target
            return tensor

        return tree_map_only(Tensor, note, func(*args, **kwargs))


class Tower(nn.Module):
    """Blocks between a tied embedding and head, with sums across the blocks."""

    def __init__(self, blocks: int = 4, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.shift = nn.Parameter(torch.randn(16))
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(blocks))})
        self.register_buffer("gain", torch.full((16,), 1.5))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        first = x = self.embed(tokens) + self.shift
        for block in self.body["blocks"].children():
            x = block(x, shift=scale) + first * self.gain
        return {"logits": self.head(self.norm(x))}


BLOCK = 16 * 16 * 4 + 16 * 4
EMBED = 32 * 16 * 4
OWN = 2 * 16 * 4
NORM = 2 * 16 * 4
BLOCKS = [f"body.blocks.{n}" for n in range(4)]


def named(places: dict[str, torch.device]) -> dict[str, str]:
    return {name: str(device) for name, device in places.items()}


def test_each_piece_goes_to_the_first_device_with_space_and_tied_ones_together() -> None:
    with torch.device("meta"):
        model = Tower()
    limits = {"cuda:0": OWN + EMBED + 2 * BLOCK, "cuda:1": BLOCK, "cpu": 2 * BLOCK}
    expected = {"": "cuda:0", "embed": "cuda:0", "head": "cuda:0", "norm": "cpu"}
    expected |= dict(zip(BLOCKS, ["cuda:0", "cuda:0", "cuda:1", "cpu"], strict=True))
    assert named(plan_placement(model, limits)) == expected
    limits["cuda:0"] += NORM  # a small one still fits where the last block did not
    assert named(plan_placement(model, limits)) == expected | {"norm": "cuda:0"}


def test_a_model_without_a_list_is_split_at_the_top_unless_match_selects_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert list(plan_placement(model, {"cpu": MB})) == ["", "0", "1"]
    assert list(plan_placement(model, {"cpu": MB}, match=r"1\.0")) == ["", "0", "1.0", "1.1"]
    tower = Tower(tied=False)
    assert list(plan_placement(tower, {"cpu": MB}, match="body")) == [
        "",
        "embed",
        "body",
        "norm",
        "head",
    ]


@pytest.mark.parametrize(
    ("limits", "match", "message"),
    [
        ({}, None, "limits is empty"),
        (
            {"cpu": OWN + EMBED, "cuda": BLOCK - 1},
            None,
            r"no device has space for 'body.blocks.0' \(0\.001 MB\); free:",
        ),
        ({"cpu": OWN, "cuda": EMBED - 1}, None, r"'embed' with 'head' \(0\.002 MB\); free"),
        ({"cpu": OWN - 1, "cuda": MB}, None, r"own tensors \(0\.000 MB\); free: cpu"),
        ({"cpu": MB}, "blocks", "'blocks' matches no module of Tower"),
    ],
)
def test_a_piece_that_fits_on_no_device_is_refused(
    limits: dict[str, float], match: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_placement(Tower(), limits, match)


def compare(model: nn.Module, limits: dict[str, float], mode: Callable[[], Any]) -> dict[str, str]:
    """Outputs before and after; the devices of the parts."""
    tokens, scale = torch.arange(12).view(3, 4), torch.randn(16)
    model.eval()
    with torch.no_grad():
        expected = model(tokens, scale=scale)["logits"]
        placed = copy.deepcopy(model)
        places = plan_placement(placed, limits)
        with mode():
            hooks = place(placed, places)
            found = placed(tokens, scale=scale)["logits"]
    torch.testing.assert_close(found.cpu(), expected)
    for hook in hooks:
        hook.remove()
    assert list(placed.state_dict()) == list(model.state_dict())
    return named(places)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_on_several_devices_computes_the_same(tied: bool) -> None:
    torch.manual_seed(0)
    devices = Devices()
    limits = {"cpu:1": OWN + EMBED + BLOCK, "cpu:2": 2 * BLOCK, "cpu:3": MB}
    places = compare(Tower(tied=tied), limits, lambda: devices)
    assert set(places.values()) == set(limits) == devices.used - {"cpu"}


def test_without_hooks_the_devices_would_not_match() -> None:
    """That the test above can fail."""
    model = Tower().eval()
    tokens, scale = torch.arange(12).view(3, 4), torch.randn(16)
    with torch.no_grad(), Devices():
        for hook in place(
            model, plan_placement(model, {"cpu:1": OWN + EMBED + BLOCK, "cpu:2": MB})
        ):
            hook.remove()
        with pytest.raises(RuntimeError, match=r"tensors on \['cpu', 'cpu:1'\]"):
            model(tokens, scale=scale)


def test_places_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="Tower has no module '0'"):
        place(Tower(), plan_placement(nn.Sequential(nn.Linear(1, 1)), {"cpu": MB}))


@pytest.mark.gpu
def test_a_model_on_a_gpu_and_a_cpu_computes_the_same() -> None:
    limits = {"cuda:0": OWN + EMBED + BLOCK, "cpu": MB}
    assert set(compare(Tower(), limits, torch.no_grad).values()) == set(limits)

"""Offloading changes nothing that can be computed, for whatever a block takes and gives."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as plain_checkpoint

from harness import offload
from harness.errors import ConfigError
from harness.offload.backends import CpuBackend
from tests.support.imports import loaded_by
from tests.support.offload_models import WIDTH, Block, Model, gradients, one_thread, same, step
from tests.support.quick import quick

MODES: list[offload.Mode] = ["inputs", "saved"]
ALL: dict[str, Any] = {"fraction": "all", "keep_last": 0, "min_bytes": 0, "host_bytes": 1 << 22}


def but(**changes: Any) -> dict[str, Any]:
    """`ALL` with other values."""
    return ALL | changes


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


def equal_offloaded(
    model: nn.Module, run: Callable[[], list[Tensor]], mode: offload.Mode, match: Any = None
) -> offload.OffloadStats:
    """Asserts that `run` gives the same, plain and offloaded. Returns what was moved."""
    expected = run()
    plan = offload.attach(model, match, mode=mode, **ALL)
    try:
        assert same(run(), expected)
        assert same(run(), expected)  # in buffers that are used again
        assert plan.store.pool.leased == 0
    finally:
        plan.detach()
    assert same(run(), expected)
    assert plan.stats().bytes_out > 0
    return plan.stats()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast", "frozen", "frozen input", "compile"])
def test_a_step_is_bit_identical(mode: offload.Mode, how: str) -> None:
    model = Model()
    if how == "bf16":
        model.to(torch.bfloat16)
    if how == "frozen":  # as LoRA does: most weights, and all that the input comes from
        for block in model.blocks:
            block.linear.weight.requires_grad_(False)  # pyright: ignore
    if how == "compile":
        for block in model.blocks:
            block.compile(backend="aot_eager")

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        x = torch.randn(8, WIDTH, requires_grad=how in ("fp32", "autocast"))
        x_in = x.to(torch.bfloat16) if how == "bf16" else x
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model(x_in).square().sum()
        loss.backward()
        inputs = [x.grad] if x.grad is not None else []
        return [loss.detach(), *inputs, *gradients(model), torch.get_rng_state()]

    equal_offloaded(model, run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model(mode: offload.Mode) -> None:
    model = Model(2)
    compiled = torch.compile(model, backend="aot_eager")

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        loss = compiled(torch.randn(8, WIDTH)).square().sum()
        loss.backward()
        return [loss.detach(), *gradients(model)]

    plan = offload.attach(model, mode=mode, **ALL)
    found = run()
    assert plan.stats().bytes_out > 0
    plan.detach()
    torch.compiler.reset()
    assert same(run(), found)


class Nested(nn.Module):
    """Takes and gives nested things: dicts, lists, integers, None, the same tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(
        self, state: dict[str, Any], pair: tuple[Tensor, Tensor], *, order: Tensor, nothing: None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        state["seen"].append(len(state["seen"]))  # the caller sees it, once
        x = self.inner(state["x"] * self.scale + pair[0] * pair[1])
        return {"x": x[order]}, [x, x.detach() + 1, x.mean(0)]


class NestedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nested() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": x}
        self.seen: list[int] = []
        total = x.new_zeros(())
        for block in self.blocks:
            order = torch.randperm(len(x))
            state, outputs = block(
                state | {"seen": self.seen}, (state["x"], state["x"]), order=order, nothing=None
            )
            total = total + sum(output.square().mean() for output in outputs)
        return total + state["x"].sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("match", [Nested, Block, r"blocks\.\d+(\.inner)?", r"blocks\.[02]"])
def test_nested_arguments_outputs_and_modules(mode: offload.Mode, match: Any) -> None:
    model = NestedModel()

    def run() -> list[Tensor]:
        found = step(model)
        assert model.seen == [0, 1, 2, 3]  # the recomputation added nothing
        return found

    equal_offloaded(model, run, mode, match)


@pytest.mark.parametrize("mode", MODES)
def test_strides_views_and_broadcasts(mode: offload.Mode) -> None:
    """Transposed, sliced, expanded, complex and empty tensors come back as they were."""
    seen: list[tuple[Any, ...]] = []

    class Strides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, *tensors: Tensor) -> Tensor:
            seen.append(tuple((t.stride(), t.dtype, t.is_conj()) for t in tensors))
            return self.linear(sum(t.real.sum() for t in tensors) + tensors[0])

    model = nn.Sequential(*(Strides() for _ in range(5)))

    def run() -> list[Tensor]:
        seen.clear()
        torch.manual_seed(2)
        model.zero_grad()
        x = torch.randn(WIDTH, WIDTH, requires_grad=True)
        loss = torch.zeros(())
        for block in model:
            wide = torch.cat([x * 2, x * 3], 1)
            complex_ = torch.complex(x * 2, x * 5)
            parts = (x.t() * 1, wide[:, ::2], wide.chunk(2, 1)[1], (x * 2).t())
            row = x[:1] * 3
            more = (row.expand(4, -1), complex_, complex_.conj(), x[:0], (x * 4).unfold(0, 4, 1))
            loss = loss + block(*parts, *more).square().mean()
        loss.backward()
        assert len(set(seen)) == 1  # the same in forward and recomputation
        assert x.grad is not None
        return [loss.detach(), x.grad, *gradients(model)]

    equal_offloaded(model, run, mode, Strides)


@pytest.mark.parametrize("mode", MODES)
def test_several_backwards_of_one_graph(mode: offload.Mode) -> None:
    model = Model()

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        x = torch.randn(8, WIDTH, requires_grad=True)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        (part,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        return [part, *gradients(model)]

    equal_offloaded(model, run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_double_backward(mode: offload.Mode) -> None:
    model = Model(3).double()

    def run() -> list[Tensor]:
        torch.manual_seed(4)
        model.zero_grad()
        x = torch.randn(8, WIDTH, dtype=torch.double, requires_grad=True)
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        assert x.grad is not None
        return [first.detach(), x.grad, *gradients(model)]

    equal_offloaded(model, run, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["0101", "0110", "0120 12", "00112 2"])
def test_interleaved_micro_batches(mode: offload.Mode, order: str) -> None:
    """One forward, one backward, as pipelines do: a digit's first mention is its forward."""
    model = Model()

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        losses: dict[str, Tensor] = {}
        for batch in order.replace(" ", ""):
            if batch in losses:
                losses.pop(batch).backward()
            else:
                losses[batch] = model(torch.randn(8, WIDTH)).square().sum()
        assert not losses
        return gradients(model)

    equal_offloaded(model, run, mode)


def test_what_blocks_share_stays_on_the_device() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + self.linear(x) * mask

    class MaskedModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Masked() for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.rand(64, WIDTH)
            for block in self.blocks:
                x = block(x, mask)
            return x

    model = MaskedModel()
    stats = equal_offloaded(model, lambda: step(model, rows=64), "inputs")
    size = 64 * WIDTH * 4
    assert stats.bytes_out == 2 * (5 + 1) * size  # in two steps: a stream of each block, a mask
    assert stats.kept == 2 * 4
    assert stats.bytes_in == 2 * (5 - 2) * size  # two streams had not left yet
    assert (stats.prefetch_hits, stats.prefetch_misses) == (6, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["inside", "after"])
def test_an_in_place_change_is_an_error_as_without_offloading(
    mode: offload.Mode, where: str
) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = (x * self.weight).square()
            if where == "inside":
                x += 1
            return y

    model = nn.Sequential(InPlace(), InPlace())

    def run(backward_through: Callable[..., Tensor]) -> None:
        x = torch.randn(8, WIDTH) * 1
        y = backward_through(x)
        if where == "after":
            x += 1
        y.sum().backward()

    message = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        run(lambda x: plain_checkpoint(model[0], x, use_reentrant=False))  # pyright: ignore
    for keep in (0, 2):  # also where the tensor is only kept
        settings = but(min_bytes=1 << 20 if keep else 0)
        plan = offload.attach(model, InPlace, mode=mode, **settings)
        with pytest.raises(RuntimeError, match=message):
            run(model[0])
        assert plan.store.pool.leased == 0
        plan.detach()


@pytest.mark.parametrize("mode", MODES)
def test_parameters_their_views_and_casts_are_not_moved(mode: offload.Mode) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
            self.embedding = nn.Embedding(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.t() + x @ self.weight[:64].to(torch.bfloat16).float()
            y = y @ self.frozen.t() + (x[:1, :1] * self.weight).mean()
            return y.sin()

    model = nn.ModuleDict({"blocks": nn.ModuleList([Views(), Views()])})
    plan = offload.attach(model, Views, mode=mode, **but(min_bytes=64 * 64 * 2))
    block = model["blocks"][0]  # pyright: ignore
    indices = torch.randint(64, (4,))
    block(block.embedding(indices)).sum().backward()  # its tensors are 4 x 64
    assert plan.stats().bytes_out == 0
    plan.detach()
    plan = offload.attach(model, Views, mode=mode, **but(min_bytes=128))
    block(block.embedding(torch.randint(64, (128,)))).sum().backward()
    assert plan.stats().bytes_out == (128 * 64 * 4) * (2 if mode == "saved" else 1)
    plan.detach()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_done_in_eval_mode_or_without_gradients(mode: offload.Mode) -> None:
    model = Model()
    plan = offload.attach(model, mode=mode, **ALL)
    with torch.no_grad():
        model(torch.randn(8, WIDTH))
    model.eval()
    model(torch.randn(8, WIDTH)).sum().backward()
    assert plan.stats() == offload.OffloadStats()
    plan.detach()


@pytest.mark.parametrize("mode", MODES)
def test_exceptions_and_dropped_graphs_leave_nothing(mode: offload.Mode) -> None:
    class Failing(Block):
        fails = False

        def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
            if self.fails:
                raise ValueError("on purpose")
            return super().forward(x, shift=shift)

    model = Model()
    model.blocks[4] = Failing()
    expected = step(model)
    plan = offload.attach(model, Block, mode=mode, **ALL)
    for place in range(3):
        model.blocks[4].fails = place < 2  # pyright: ignore
        if place < 2:  # in forward
            with pytest.raises(ValueError, match="on purpose"):
                step(model)
        else:  # in backward
            loss = model(torch.randn(8, WIDTH)).square().sum()
            loss.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            del loss
    held = model(torch.randn(8, WIDTH))
    assert plan.store.pool.leased > 0
    del held
    assert plan.store.pool.leased == 0
    plan.drain()
    assert plan.store.pool.held == 0
    assert same(step(model), expected)
    plan.detach()


@pytest.mark.parametrize(
    ("mode", "min_bytes"),
    quick(
        [(mode, min_bytes) for mode in MODES for min_bytes in (0, 1 << 20)],
        ("inputs", 0),
        ("saved", 1 << 20),
    ),
)
def test_nothing_grows_in_500_steps(mode: offload.Mode, min_bytes: int) -> None:
    model = Model(2)
    plan = offload.attach(model, mode=mode, **but(min_bytes=min_bytes))

    def left_after(steps: int) -> tuple[int, ...]:
        for seed in range(steps):
            torch.manual_seed(seed)
            loss = model(torch.randn(8 + seed % 4, WIDTH)).sum()
            if seed % 5:
                loss.backward()
            del loss
        gc.collect()
        pool = plan.store.pool
        return pool.held, pool.pins, pool.leased, len(plan.store.known), len(gc.get_objects())

    left_after(100)
    *before, objects = left_after(20)
    *after, objects_after = left_after(400)
    assert after == before and after[2:] == [0, 0]
    assert objects_after <= objects + 5
    plan.detach()


def test_backward_works_after_detach_and_drain() -> None:
    model = Model()
    expected = step(model)
    plan = offload.attach(model, **ALL)
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(torch.randn(8, WIDTH)).square().sum()
    plan.detach()
    plan.detach()
    loss.backward()
    assert same([loss.detach(), *gradients(model), torch.get_rng_state()], expected)


def test_an_offloaded_block_keeps_its_class_and_names() -> None:
    model = Model(3)
    names = list(model.state_dict())
    plan = offload.attach(model, **ALL)
    block = model.blocks[0]
    assert isinstance(block, Block) and type(block).__name__ == "Block"
    assert list(model.state_dict()) == names and repr(model) == repr(Model(3))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is Block and not any("offload" in key for key in vars(twin))
        assert torch.equal(twin.linear.weight, block.linear.weight)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False).blocks[0]) is Block
    with pytest.raises(ConfigError, match=r"blocks\.0 is already offloaded"):
        offload.attach(model)
    plan.detach()
    assert type(block) is Block and not any("offload" in key for key in vars(block))


def test_init_subclass_of_the_block_class_is_not_called() -> None:
    made: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            made.append(cls.__name__)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) + 1

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Registered(), Registered())
    plan = offload.attach(model, Registered, **ALL)
    assert model(torch.zeros(2)).tolist() == [2, 2] and made == []
    plan.detach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "nothing"}, "match = 'nothing' matches no module of Model; it has: blocks"),
        ({"match": nn.Conv2d}, "matches no module"),
        ({"mode": "input"}, "mode = 'input', expected"),
        ({"fraction": "some"}, "fraction = 'some', expected"),
        ({"fraction": 1.5}, "fraction = 1.5, expected"),
        ({"fraction": None}, "fraction = None, expected"),
        ({"fraction": float("nan")}, "fraction = nan, expected"),
        ({"keep_last": -1}, "keep_last = -1, expected"),
        ({"min_bytes": -1}, "min_bytes = -1, expected"),
        ({"host_bytes": -1}, "host_bytes = -1, expected"),
        ({"match": "("}, "match = '(' is not a regular expression"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ConfigError) as caught:
        offload.attach(model, **settings)
    assert message in str(caught.value)
    assert type(model.blocks[0]) is Block


def test_the_repeated_block_is_found_automatically() -> None:
    class Expert(nn.Linear):
        pass

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert(4, 4) for _ in range(8))

    model = nn.ModuleDict(
        {"heads": nn.ModuleList(nn.Linear(64, 64) for _ in range(2)), "one": nn.Linear(200, 200)}
    )
    assert offload.repeated_class(model) is nn.Linear
    model["layers"] = nn.ModuleList(Layer() for _ in range(80))
    assert offload.repeated_class(model) is Layer
    mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert offload.repeated_class(mixed) is None
    with pytest.raises(ConfigError, match="select its blocks with `match`"):
        offload.attach(mixed)


def test_keep_last_and_match_by_function() -> None:
    model = Model(6)
    expected = step(model, rows=64)
    settings = but(keep_last=2)
    plan = offload.attach(model, lambda name, _: name.startswith("blocks.") and "." not in name[7:])
    plan.detach()
    assert list(plan.modules) == [f"blocks.{n}" for n in range(6)]
    plan = offload.attach(model, **settings)
    assert same(step(model, rows=64), expected)
    size = 64 * WIDTH * 4
    assert plan.stats().bytes_out == 4 * 2 * size and plan.stats().kept == 2
    plan.detach()


def test_checkpoint_and_saved_tensors_call_by_call() -> None:
    model = Model(3)
    rows = 40_000  # their tensors are larger than the default of 2 MiB

    def run(how: str) -> list[Tensor]:
        torch.manual_seed(6)
        model.zero_grad()
        x = torch.randn(rows, WIDTH)
        before = offload.stats()
        if how == "saved_tensors":
            with offload.saved_tensors():
                loss = model(x).square().mean()
        else:
            for block in model.blocks:
                shift = x.sigmoid()
                if how == "checkpoint":
                    x = offload.checkpoint(block, x, shift=shift)
                else:
                    x = block(x, shift=shift)
            loss = x.square().mean()
        loss.backward()
        moved = offload.stats().since(before).bytes_out
        assert (moved > 0) == (how != "plain")
        return [loss.detach(), *gradients(model), torch.get_rng_state()]

    expected = run("plain")
    assert same(run("checkpoint"), expected)
    assert same(run("saved_tensors"), expected)
    with torch.no_grad():
        assert torch.equal(offload.checkpoint(torch.sin, torch.ones(2)), torch.ones(2).sin())


def test_usable_alone() -> None:
    """Nothing of the trainer is imported, no DeepSpeed and no transformers."""
    loaded = loaded_by(
        "import torch; from harness import offload\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "plan = offload.attach(m, min_bytes=0, host_bytes=1 << 20)\n"
        "m(torch.ones(2, 4)).sum().backward()\n"
    )
    rooms = ("harness.offload", "harness.wrapper")
    own = {name for name in loaded if name.startswith(rooms)}
    helpers = {
        f"harness.{name}" for name in ("devices", "errors", "utils", "zero", "zero.parameters")
    }
    assert loaded - own == {"harness"} | helpers


def test_an_empty_key_value_cache_is_dropped_and_a_filled_one_refused() -> None:
    class Cache:
        def __init__(self, length: int) -> None:
            self.length = length

        def get_seq_length(self) -> int:
            return self.length

    class Cached(Block):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # type: ignore
            if cache is not None:
                cache.length += len(x)
            return super().forward(x)

    model = nn.Sequential(Cached(), Cached())
    plan = offload.attach(model, Cached, **ALL)
    cache = Cache(0)
    x = torch.randn(8, WIDTH)
    model[1](model[0](x, cache=cache), cache).sum().backward()
    assert cache.length == 0
    with pytest.raises(RuntimeError, match="a Cache that holds 3 tokens"):
        model[0](x, cache=Cache(3))
    plan.detach()


def test_host_memory_that_is_full_keeps_tensors_on_the_device() -> None:
    model = Model()
    expected = step(model, rows=64)
    for limit in (0, 9_000, 20_000):
        plan = offload.attach(model, **but(host_bytes=limit), backend=CpuBackend())
        assert same(step(model, rows=64), expected)
        assert plan.stats().kept == 12 - plan.stats().bytes_out // (64 * WIDTH * 4)
        assert plan.store.pool.held <= limit
        plan.detach()

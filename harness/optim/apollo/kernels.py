"""Triton kernels for `fused = true`: a P in one launch, and all tiles of a group in another.

Without them a P takes about 150 launches, and the update two or three per tile and 28 bytes of
traffic per weight instead of 12. The module needs triton, which comes with torch for CUDA; without
a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# triton has no types for its kernels, and need not be installed

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.optim.apollo.channels import Tile
from harness.optim.apollo.philox import Key

COUNTERS, ELEMENTS = 256, 4096
"""Per program: of random numbers, and of a tile."""


@triton.jit
def _gaussian(
    out,
    rows,
    columns,
    groups,
    first_row,
    first_column,
    refresh: tl.int64,
    key0: tl.int64,
    key1: tl.int64,
    SIZE: tl.constexpr,
):
    """The equations of philox.gaussian, for out (rows, columns)."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, group = at // groups, at % groups + first_column // 4
    c0, c1 = group.to(tl.uint32), (row + first_row).to(tl.uint32)
    c2, c3 = tl.full([SIZE], 0, tl.uint32) + refresh.to(tl.uint32), tl.full([SIZE], 0, tl.uint32)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    for _ in tl.static_range(10):  # philox4x32
        p0, p1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c1, c3, c0, c2 = c2 * 0xCD9E8D57, c0 * 0xD2511F53, p1 ^ c1 ^ k0, p0 ^ c3 ^ k1
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    column = group * 4 - first_column
    for half in tl.static_range(2):
        first, second = (c0, c1) if half == 0 else (c2, c3)
        angle = (second.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * 6.283185307179586
        uniform = (first.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
        radius = tl.sqrt(tl.log(uniform) * -2.0)
        for odd in tl.static_range(2):
            number = (tl.cos(angle) if odd == 0 else tl.sin(angle)) * radius
            to = column + (2 * half + odd)
            mask = (row < rows) & (to >= 0) & (to < columns)
            tl.store(out + row * columns + to, number.to(tl.float32), mask=mask)


@triton.jit
def _update(tiles, addresses, steps, decay, is_finite, DECAYS: tl.constexpr, SIZE: tl.constexpr):
    """For each tile, w <- (w - decay w) - step g, in the order of the unfused update."""
    tile = tl.program_id(1)
    count = tl.load(tiles + 4 * tile)
    width = tl.load(tiles + 4 * tile + 1)
    slot = tl.load(tiles + 4 * tile + 2)
    by_rows = tl.load(tiles + 4 * tile + 3)
    weight = tl.load(addresses + 2 * tile).to(tl.pointer_type(tl.float32))
    gradient = tl.load(addresses + 2 * tile + 1).to(tl.pointer_type(tl.float32))
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    mask = (at < count) & (tl.load(is_finite) != 0)
    line = (first % width).to(tl.int32) + tl.arange(0, SIZE)  # 32 bits: division is slow
    width = width.to(tl.int32)
    channel = tl.where(by_rows != 0, first // width + line // width, line % width)
    w = tl.load(weight + at, mask=mask, other=0.0)
    g = tl.load(gradient + at, mask=mask, other=0.0)
    step = tl.load(steps + slot + channel, mask=mask, other=0.0)
    if DECAYS:
        w = w - w * tl.load(decay)
    tl.store(weight + at, w - g * step, mask=mask)


IS_INTERPRETED = not isinstance(_update, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on a CPU."""


def gaussian(
    rows: range, columns: range, refreshes: Sequence[int], keys: Sequence[Key], device: torch.device
) -> Tensor:
    """As `philox.gaussian`, by one launch per key."""
    made = torch.empty(len(keys), len(rows), len(columns), device=device)
    groups = -(-columns.stop // 4) - columns.start // 4
    grid = (triton.cdiv(len(rows) * groups, COUNTERS),)
    shape = len(rows), len(columns), groups, rows.start, columns.start
    with torch.cuda.device_of(made):
        for out, refresh, key in zip(made, refreshes, keys, strict=True):
            _gaussian[grid](out, *shape, refresh, *key, SIZE=COUNTERS)
    return made


class Update:
    """The update of all tiles of a group, by one launch."""

    def __init__(self, tiles: Sequence[Tile], by_rows: Sequence[bool], device: torch.device):
        """`by_rows`: whether a tile's channels are rows. Raises ValueError for a CPU's tensors."""
        if device.type == "cpu" and not IS_INTERPRETED:
            raise ValueError("fused = true: its kernels step tensors on a GPU, these are on a CPU")
        self._tiles = tiles
        table = []
        for tile, is_rows in zip(tiles, by_rows, strict=True):
            channels, inner = len(tile.channels), len(tile.inner)
            width = inner if is_rows else channels
            table.append((channels * inner, width, tile.slots.start, int(is_rows)))
        self._table = torch.tensor(table, dtype=torch.int64, device=device).view(-1, 4)
        most = max((size for size, *_ in table), default=0)
        self._grid = (triton.cdiv(most, ELEMENTS), len(tiles))
        self._known: list[tuple[int, int]] = []
        self._addresses = self._table

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        steps: Tensor,
        decay: Tensor | None,
        is_finite: Tensor,
    ) -> None:
        """Updates the weights if `is_finite`. fp32; `steps`: by slot; `decay`: ()."""
        if not self._tiles:
            return
        flats = [(w.data_ptr(), g.data_ptr()) for w, g in zip(weights, gradients, strict=True)]
        if flats != self._known:
            self._known = flats
            offsets = [(tile.flat, 4 * tile.offset) for tile in self._tiles]
            table = [(flats[n][0] + offset, flats[n][1] + offset) for n, offset in offsets]
            self._addresses = _without_waiting(table, self._table.device)
        decays = decay is not None
        arguments = self._table, self._addresses, steps, decay if decays else steps, is_finite
        with torch.cuda.device_of(steps):
            _update[self._grid](*arguments, DECAYS=decays, SIZE=ELEMENTS)


def _without_waiting(table: Any, device: torch.device) -> Tensor:
    host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)

"""A plan, as lines of 80 columns, or as an object for JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from textwrap import wrap
from typing import Any

WIDTH = 80
LABELS = {
    "masters": "fp32 masters",
    "optimizer": "optimizer state",
    "buckets": "reduce bucket",
    "gathered": "gathered layers, at most",
    "step": "fp32 gradients of the step",
}


def lines_of(plan: Mapping[str, Any]) -> Iterator[str]:
    """What `command.plan` returns, for people."""
    setting = plan["setting"]
    yield from wrap(f"{plan['model']}: {plan['parameters']:,} parameters", WIDTH)
    of = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in asdict(setting).items())
    yield from wrap(of, WIDTH)
    yield ""
    yield "memory per rank (the rank with the most)"
    for name, size in plan["memory"].items():
        if size:
            where = "  in host memory" if name in plan["on_host"] else ""
            label: str = LABELS.get(name) or name
            yield row(label, size) + where
    if plan["traced"] is False:
        yield "  activations: not traced"
    yield row("device, at the peak", plan["device_bytes"])
    if plan["host_bytes"]:
        yield row("host", plan["host_bytes"])
    yield ""
    yield "sent per rank and step"
    for name, size in plan["sent"].items():
        yield row(name, size)
    yield ""
    yield "checkpoint"
    yield row("all files", plan["checkpoint_bytes"])
    yield f"  {'save, at the disk speed given':<32} {plan['save_s']:>9,.1f} s"
    yield from _fit(plan)


def _fit(plan: Mapping[str, Any]) -> Iterator[str]:
    if plan["limit"] is None:
        return
    yield ""
    if plan["fits"]:
        yield f"fits in {readable(plan['limit'])}"
        return
    yield f"does not fit in {readable(plan['limit'])}; what would, the cheapest first:"
    for change in plan["changes"]:
        text = f"{readable(change.bytes)}: {'; '.join(change.names)}"
        yield from wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if not plan["changes"]:
        yield "  nothing that is known here, nor three changes together"


def row(name: str, size: int) -> str:
    """A size in a column."""
    return f"  {name:<32} {readable(size):>11}"


def readable(size: int) -> str:
    """Bytes in the unit of which there is at least one."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:,.2f} {unit}"
    return f"{size / 1024:,.2f} KiB"


def as_json(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What `command.plan` returns, for programs."""
    changes = [{"names": c.names, "cost": c.cost, "bytes": c.bytes} for c in plan["changes"]]
    return {**plan, "setting": asdict(plan["setting"]), "changes": changes}

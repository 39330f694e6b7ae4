"""What offloading has done so far, in numbers."""

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Stats:
    """Totals since the start, except `pool_peak_bytes`."""

    bytes_out: int = 0
    """Copied to host memory."""
    bytes_in: int = 0
    """Copied back."""
    stall_s: float = 0.0
    """Seconds that compute waited for copies."""
    prefetch_hits: int = 0
    """Tensors whose copy back had started before backward asked for them."""
    prefetch_misses: int = 0
    """Tensors whose copy back started only then."""
    kept: int = 0
    """Tensors, large enough, that stayed on the device: for lack of host memory, by the plan, or
    because several regions share them."""
    pins: int = 0
    """Slabs of host memory that were pinned."""
    pool_peak_bytes: int = 0
    """The most host memory that was in use at one time."""

    def __str__(self) -> str:
        fetched = self.prefetch_hits + self.prefetch_misses
        return (
            f"{self.bytes_out / 1e9:.3f} GB out, {self.bytes_in / 1e9:.3f} GB back, "
            f"{self.stall_s:.3f} s waited for copies, {self.prefetch_hits} of {fetched} tensors "
            f"prefetched, {self.kept} kept on the device, at most "
            f"{self.pool_peak_bytes / 1e9:.3f} GB of host memory in {self.pins} slabs"
        )

    def since(self, earlier: "Stats") -> "Stats":
        """The difference to `earlier`; `pool_peak_bytes` as it is."""
        now, before = asdict(self), asdict(earlier)
        before["pool_peak_bytes"] = 0
        return Stats(**{f.name: now[f.name] - before[f.name] for f in fields(self)})

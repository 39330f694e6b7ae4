"""Totals of offloading, for logs and metrics."""

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class OffloadStats:
    """Totals since the start, except `pool_peak_bytes`."""

    bytes_out: int = 0
    """Bytes copied to host memory."""
    bytes_in: int = 0
    """Bytes copied back."""
    stall_s: float = 0.0
    """Seconds that compute waited for copies."""
    prefetch_hits: int = 0
    """Tensors whose copy back had started before backward needed them."""
    prefetch_misses: int = 0
    """Tensors whose copy back started only when backward needed them."""
    kept: int = 0
    """Tensors of at least `min_bytes` that stayed on the device: for lack of host memory, by the
    plan, or because several regions share them."""
    pins: int = 0
    """Slabs of host memory that were pinned."""
    pool_peak_bytes: int = 0
    """Peak bytes of host memory in use."""

    def __str__(self) -> str:
        fetched = self.prefetch_hits + self.prefetch_misses
        return (
            f"{self.bytes_out / 1e9:.3f} GB out, {self.bytes_in / 1e9:.3f} GB back, "
            f"{self.stall_s:.3f} s waiting for copies, {self.prefetch_hits} of {fetched} tensors "
            f"prefetched, {self.kept} kept on the device, peak host memory "
            f"{self.pool_peak_bytes / 1e9:.3f} GB in {self.pins} slabs"
        )

    def since(self, earlier: "OffloadStats") -> "OffloadStats":
        """The difference from `earlier`, except `pool_peak_bytes`, which is not a difference."""
        now, before = asdict(self), asdict(earlier)
        before["pool_peak_bytes"] = 0
        return OffloadStats(**{f.name: now[f.name] - before[f.name] for f in fields(self)})

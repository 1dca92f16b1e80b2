"""Time and money: storing a recording, or computing it again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What machines do and cost. The defaults are round numbers of 2025, to be replaced by one's own.

    Args:
        gpus: how many compute at once.
        gpu_flops: floating-point operations per second that one GPU achieves: a third of an H100's peak in bfloat16.
        gpu_tokens_per_second: measured tokens per second of one GPU; what `gpu_flops` would give does then not count.
        gpu_price: USD per GPU and hour.
        disk_bytes_per_second: sustained, of all disks together: one NVMe drive.
        storage_price: USD per GB (10^9 bytes) and month: object storage.
    """

    gpus: int = 1
    gpu_flops: float = 3e14
    gpu_tokens_per_second: float | None = None
    gpu_price: float = 2.5
    disk_bytes_per_second: float = 2e9
    storage_price: float = 0.023

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, not {value}")


@dataclass(frozen=True)
class Costs:
    """What a recording of some tokens takes in time and money.

    Args:
        tokens: how many are recorded.
        nbytes: of the recording.
        flops_per_token: of the model's forward.
        rates: of machines.
    """

    tokens: int
    nbytes: int
    flops_per_token: float
    rates: Rates

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU: as measured, or as its operations per second allow."""
        return self.rates.gpu_tokens_per_second or self.rates.gpu_flops / self.flops_per_token

    @property
    def gpu_hours(self) -> float:
        """Of one forward over all tokens: what it takes to compute the recording again."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def forward_seconds(self) -> float:
        """Of one forward over all tokens, on all GPUs."""
        return 3600 * self.gpu_hours / self.rates.gpus

    @property
    def disk_seconds(self) -> float:
        """Of writing all bytes."""
        return self.nbytes / self.rates.disk_bytes_per_second

    @property
    def seconds(self) -> float:
        """Of the recording: computing and writing go on side by side."""
        return max(self.forward_seconds, self.disk_seconds)

    @property
    def bottleneck(self) -> str:
        """Which of the two takes longer."""
        return "forward" if self.forward_seconds >= self.disk_seconds else "disk"

    @property
    def usd_per_month(self) -> float:
        """Of storing the recording."""
        return self.nbytes / 1e9 * self.rates.storage_price

    @property
    def usd_to_recompute(self) -> float:
        """Of one more forward over all tokens."""
        return self.gpu_hours * self.rates.gpu_price

    @property
    def reads_per_month(self) -> float:
        """Readings per month from which on storing costs less than computing everything again for each of them."""
        return self.usd_per_month / self.usd_to_recompute

    @property
    def verdict(self) -> str:
        """When recomputing is cheaper than storing, in words."""
        prices = f"({money(self.usd_per_month)} a month to store, {money(self.usd_to_recompute)} to compute once more)"
        if self.reads_per_month >= 1:
            return (
                f"Recomputing is cheaper than storing, unless the recording is read more than {self.reads_per_month:,.0f} times a "
                f"month {prices}."
            )
        return (
            f"Storing is cheaper than recomputing, as long as the recording is read at least once in {self._months:,.1f} months "
            f"{prices}; what is read less often is cheaper to compute again."
        )

    @property
    def _months(self) -> float:
        return 1 / self.reads_per_month


def money(usd: float) -> str:
    """USD for people: cents where there are few."""
    return f"{usd:,.0f} USD" if usd >= 100 else f"{usd:,.2f} USD" if usd >= 0.01 else "less than 0.01 USD"

"""One number about samples beside the same number about real pictures."""

import math
from dataclasses import dataclass, replace

# Below this many pictures on a side every figure is rough: a share has a standard error of up to
# 7 points, and the Fréchet floor of 32 whitened dimensions alone is over 11.
FEW = 50
FAR = 4  # standard deviations: of some 25 figures about real pictures, about none is so far off
LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True)
class Figure:
    """One number about samples, and the same number for real pictures (`floor`).

    `value` is None where nothing could be measured; `warning` then says why. `floor_std` is the
    floor's standard deviation; `better` is "lower" or "higher"; `n` is the number of samples in
    one measurement; `note` says what the figure is blind to.
    """

    name: str
    value: float | None
    floor: float | None
    floor_std: float | None
    better: str
    n: int
    features: str
    note: str = ""
    warning: str = ""

    @property
    def beyond(self) -> float | None:
        """How much worse than real pictures, in standard deviations of the floor (or None)."""
        if self.value is None or self.floor is None or not self.floor_std:
            return None
        worse = self.value - self.floor if self.better == LOWER else self.floor - self.value
        return worse / self.floor_std

    @property
    def far(self) -> bool:
        """Whether that is more than chance makes of real pictures: over 4."""
        return (self.beyond or 0.0) > FAR

    def warned(self, warning: str) -> "Figure":
        """The same with one more warning."""
        return replace(self, warning="; ".join(part for part in (self.warning, warning) if part))


def unmeasured(name: str, better: str, features: str, why: str, note: str) -> Figure:
    """A figure without value."""
    return Figure(name, None, None, None, better, 0, features, note, f"not measured: {why}")


def share_std(share: float, n: float) -> float:
    """Binomial; by Laplace's rule, so that 0 of n is not taken for certainty."""
    share = (share * n + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / n)

"""Mean and deviation of all scores so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


class RunningMoments:
    r"""The mean and the standard deviation of everything that was seen.

    Two sets of :math:`n_a` and :math:`n_b` numbers with the means :math:`m_a, m_b` and the sums of
    squared deviations :math:`M_a, M_b` are together

    .. math:: m = m_a + \delta \frac{n_b}{n}, \quad M = M_a + M_b + \delta^2 \frac{n_a n_b}{n},
        \quad \delta = m_b - m_a, \quad n = n_a + n_b

    so no number has to be kept, and none is lost to rounding as in a sum of squares.

    References:
        Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing
        sample variances, equation 2.1.

    Example:
        >>> moments = RunningMoments()
        >>> moments.update([1.0, 2.0])
        >>> moments.update([3.0])
        >>> moments.count, moments.mean, moments.std
        (3, 2.0, 1.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The sample deviation, with n - 1; 0 for fewer than two numbers."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, values: Sequence[float]) -> None:
        """Take these numbers in; their order changes nothing.

        Args:
            values: Finite.
        """
        if not values:
            return
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        count, delta = self.count + len(values), mean - self.mean
        self.mean += delta * len(values) / count
        self._squares += squares + delta**2 * self.count * len(values) / count
        self.count = count

    def normalised(self, value: float) -> float:
        """Return how many deviations a number is above the mean; how much, where there is none."""
        return (value - self.mean) / (self.std or 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return what :meth:`load_state_dict` takes."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self.count = int(state["count"])
        self.mean, self._squares = float(state["mean"]), float(state["squares"])

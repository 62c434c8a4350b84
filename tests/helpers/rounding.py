"""Running error analysis: an exact value, and beside it how far rounded arithmetic may be off.

Higham, Accuracy and Stability of Numerical Algorithms (2nd ed. 2002), sections 2.2 and 3.3: what
an operation makes of its operands' errors, plus the rounding of its own result. The oracle runs on
these numbers unchanged, so the bound of every weight and state follows from the formula itself.
"""

import torch

from .oracle import exact

# per operation: its own, that of a number that is no tensor, one for another order of evaluation
ROUNDINGS = 3


class Rounded:
    """`value`, a float64 tensor, and a bound `error` on what arithmetic of unit roundoff `unit`
    and smallest positive number `tiny` may make of it. Infinite where the expression is
    ill-conditioned (a division by what may be 0)."""

    def __init__(self, value: torch.Tensor, error: torch.Tensor, unit: float, tiny: float):
        self.value, self.unit, self.tiny = value, unit, tiny
        self.error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)

    @classmethod
    def exactly(cls, t: torch.Tensor, dtype: torch.dtype) -> "Rounded":
        """t without error, to be computed with in `dtype`."""
        unit, tiny = units(dtype)
        return cls(exact(t), torch.zeros_like(exact(t)), unit, tiny)

    def _result(self, value: torch.Tensor, error: torch.Tensor, other, count: float = 1,
                ) -> "Rounded":
        unit, tiny = self.unit, self.tiny
        if isinstance(other, Rounded):
            unit, tiny = max(unit, other.unit), max(tiny, other.tiny)
        own = ROUNDINGS * count * (unit * value.abs() + tiny)
        return Rounded(value, error + own, unit, tiny)

    def __add__(self, other) -> "Rounded":
        x, e = parts(other)
        return self._result(self.value + x, self.error + e, other)

    def __mul__(self, other) -> "Rounded":
        x, e = parts(other)
        error = self.value.abs() * e + abs(x) * self.error + self.error * e
        return self._result(self.value * x, error, other)

    def __sub__(self, other) -> "Rounded":
        return self + other * -1

    def __rsub__(self, other) -> "Rounded":
        return self * -1 + other

    def inverse(self) -> "Rounded":
        size = self.value.abs()
        error = self.error / (size * (size - self.error).clamp_min(0))
        return self._result(1 / self.value, error, None)

    def __truediv__(self, other) -> "Rounded":
        return self * (other.inverse() if isinstance(other, Rounded) else 1 / other)

    def __rtruediv__(self, other) -> "Rounded":
        return self.inverse() * other

    def __pow__(self, power: float) -> "Rounded":
        if power == 2:
            return self * self
        if power == -0.5:
            return (self ** 0.5).inverse()
        assert power == 0.5, power
        low, high = (self.value - self.error).clamp_min(0), self.value + self.error
        root = self.value.sqrt()
        error = torch.where(self.error == 0, 0, torch.maximum(high.sqrt() - root,
                                                              root - low.sqrt()))
        return self._result(root, error, None)

    def __abs__(self) -> "Rounded":
        return Rounded(self.value.abs(), self.error, self.unit, self.tiny)

    def sum(self) -> "Rounded":
        """The errors of n roundings grow like sqrt(n), whatever the order."""
        size, n = self.value.abs().sum(), self.value.numel()
        own = ROUNDINGS * (4 + n ** 0.5) * (self.unit * size + self.tiny)
        return Rounded(self.value.sum(), self.error.sum() + own, self.unit, self.tiny)

    def __float__(self) -> float:
        return float(self.value)

    __radd__, __rmul__ = __add__, __mul__

    def allows(self, t: torch.Tensor) -> torch.Tensor:
        """Where t can be this number, computed in rounded arithmetic and stored in t's dtype."""
        unit, tiny = units(t.dtype)
        stored = unit * (self.value.abs() + self.error) + tiny
        return (exact(t) - self.value).abs() <= self.error + stored

    def is_bounded(self) -> bool:
        return bool(self.error.isfinite().all())


def units(dtype: torch.dtype) -> tuple[float, float]:
    """The unit roundoff of a dtype, and its smallest positive number."""
    finfo = torch.finfo(dtype)
    return finfo.eps / 2, finfo.smallest_normal * finfo.eps


def parts(x) -> tuple:
    return (x.value, x.error) if isinstance(x, Rounded) else (x, 0.0)

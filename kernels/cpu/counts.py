"""How often m and v were updated."""

from collections.abc import Callable
from functools import lru_cache

from numba import int32, int64

from .memory import NUMBERS, accumulates_in, address_in, count_in
from .tables import MOMENTUM, compiled


@lru_cache
def count_loop(by_momentum: bool, dtype: str) -> Callable:
    """counts[i] = slot i's m_steps, or v_steps, and one more where there is a gradient; by_momentum
    only in a group whose momentum is not 0."""
    F = NUMBERS[accumulates_in(dtype)]

    @compiled(int64[:, ::1], F[:, ::1], int64, int64, int32[::1])
    def loop(layout, hyper, steps, g_table, counts):
        for slot in range(len(layout)):
            updated = address_in(g_table, slot) != 0 and (
                not by_momentum or hyper[layout[slot, 2], MOMENTUM] != 0)
            counts[slot] = count_in(steps, slot) + updated

    return loop

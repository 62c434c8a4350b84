"""How often m and v were updated."""

from collections.abc import Callable
from functools import lru_cache

from numba import int64

from .memory import NUMBERS, accumulates_in, add_one, address_in
from .tables import MOMENTUM, compiled


@lru_cache
def count_loop(by_momentum: bool, dtype: str) -> Callable:
    """Add 1 to the m_steps, or v_steps, of each slot with a gradient; by_momentum only in a group
    whose momentum is not 0. Where no block was taken, and when it is asked for again, nothing."""
    F = NUMBERS[accumulates_in(dtype)]

    @compiled(int64[::1], int64[:, ::1], F[:, ::1], int64, int64)
    def loop(ticket, layout, hyper, steps, g_table):
        if ticket[0] == 0 or ticket[1] != 0:
            return
        for slot in range(len(layout)):
            if address_in(g_table, slot) != 0 and (
                    not by_momentum or hyper[layout[slot, 2], MOMENTUM] != 0):
                add_one(steps, slot)
        ticket[1] = 1

    return loop

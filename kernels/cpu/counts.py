"""How often m and v were updated."""

from functools import lru_cache

import numpy as np
from numba import carray

from .memory import accumulates_in, add_one, address_in
from .tables import (
    ARGUMENTS,
    COUNTED,
    G_TABLE,
    MOMENTUM,
    STEPS,
    TICKET,
    Loop,
    compiled,
    tables_of,
)


@lru_cache
def count_loop(by_momentum: bool, dtype: str) -> Loop:
    """Add 1 to the m_steps, or v_steps, of each slot with a gradient; by_momentum only in a group
    whose momentum is not 0. Where no block was taken, and when it is asked for again, nothing."""
    F = np.dtype(accumulates_in(dtype)).type

    @compiled
    def loop(arguments):
        args = carray(arguments, ARGUMENTS)
        if args[TICKET] == 0 or args[COUNTED] != 0:
            return
        _, layout, hyper, _, _, _ = tables_of(args, F)
        for slot in range(len(layout)):
            if address_in(args[G_TABLE], slot) != 0 and (
                    not by_momentum or hyper[layout[slot, 2], MOMENTUM] != 0):
                add_one(args[STEPS], slot)
        args[COUNTED] = 1

    return loop

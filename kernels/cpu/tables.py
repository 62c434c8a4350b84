"""What the loops take: a table of arguments, columns and types; and how a loop is compiled, and
kept."""

from collections.abc import Callable, Iterable
from ctypes import CFUNCTYPE, c_void_p
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, int64, njit, types, void

from fastsam import hyper, space
from fastsam.hyper import COLUMN, COLUMNS
from fastsam.space import CONTROL

from .memory import pointer

BLOCK = 16384

# columns of a group's row in `hyper`, and cells of `control`
ALPHA, SHARE = COLUMN["alpha"], CONTROL.index("share")
RHO, SIGMA, LMBDA, EMA_SHARE = (COLUMN[c] for c in ("rho", "sigma", "lmbda", "ema_share"))
LR, WEIGHT_DECAY = COLUMN["lr"], COLUMN["weight_decay"]
MOMENTUM, DAMPENING, NESTEROV, MOMENTUM_SHARE = (
    COLUMN[c] for c in ("momentum", "dampening", "nesterov", "momentum_share"))
BETA1, BETA2, BETA1_SHARE, BETA2_SHARE, LOG_BETA1, LOG_BETA2, EPS, DECOUPLED = (
    COLUMN[c] for c in ("beta1", "beta2", "beta1_share", "beta2_share", "log_beta1", "log_beta2",
                        "eps", "decoupled"))
NORM, INV_SCALE1, INV_SCALE2 = map(CONTROL.index, ("norm", "inv_scale1", "inv_scale2"))
N_COLUMNS, N_CELLS = len(COLUMNS), len(CONTROL)

# A loop's arguments, int64: the number of blocks that threads have taken; whether what it updates
# is counted (see `count_loop`); the addresses of tables, and their lengths; those of m_steps or
# v_steps, of w_table and of g_table; then what is this loop's own.
(TICKET, COUNTED, BLOCKS, N_BLOCKS, LAYOUT, N_SLOTS, HYPER, N_GROUPS, SCALINGS, CELLS, SUMS, STEPS,
 W_TABLE, G_TABLE, OWN) = range(15)
ARGUMENTS = OWN + 8


@njit(inline="always")
def tables_of(args, F):
    """blocks, layout, hyper, scalings, control (see `fastsam.space.Space`), and room for three sums
    of each block."""
    return (carray(pointer(args[BLOCKS]), (args[N_BLOCKS], 2), np.int32),
            carray(pointer(args[LAYOUT]), (args[N_SLOTS], 3), np.int64),
            carray(pointer(args[HYPER]), (args[N_GROUPS], N_COLUMNS), F),
            carray(pointer(args[SCALINGS]), (args[N_SLOTS], 2), F),
            carray(pointer(args[CELLS]), (N_CELLS,), F),
            carray(pointer(args[SUMS]), (3, args[N_BLOCKS]), np.float64))


def fingerprint(files: Iterable[Path]) -> str:
    """Of the contents of these files."""
    by_name = sorted(files, key=lambda file: file.name)
    return sha256(b"".join(file.read_bytes() for file in by_name)).hexdigest()[:16]


# all that the loops take names and numbers from: numba itself looks only at a loop's own file
SOURCES = (*Path(__file__).parent.glob("*.py"), Path(hyper.__file__), Path(space.__file__))
MADE_FROM = fingerprint(SOURCES)


class Loop(NamedTuple):
    """A compiled loop, which takes the address of its arguments: called from Python, without the
    GIL; and where it is. The code goes with `code`."""

    call: Callable[[int], None]
    address: int
    code: Any


def held(function: Callable) -> list[Any]:
    """What a function inside another has of it: strings, numbers and types."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def compiled(function: Callable) -> Loop:
    """A function of an int64* compiled, or found in numba's cache where it can keep one, made from
    the same sources."""
    # A part of the names of the cache's files, which each kind of loop has of its own: where two
    # processes write one index at once, one's code can come to stand under the other's key.
    kind_of_loop = sha256(repr(held(function)).encode()).hexdigest()[:16]
    function.__qualname__ = f"{function.__name__}.{MADE_FROM}.{kind_of_loop}"
    kind, how = void(types.CPointer(int64)), dict(error_model="numpy")
    try:
        code = cfunc(kind, cache=True, **how)(function)
    except Exception:
        # A cache without a folder (RuntimeError), without room or rights (OSError), or with a
        # broken file, whose unpickling raises anything. An error in the loop comes again.
        code = cfunc(kind, **how)(function)
    return Loop(CFUNCTYPE(None, c_void_p)(code.address), code.address, code)

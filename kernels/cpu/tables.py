"""The tables that the loops read: columns and types; and how a loop is compiled, and kept."""

from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from numba import int32, int64, njit, void

from fastsam import hyper, space
from fastsam.hyper import COLUMN
from fastsam.space import CONTROL

from .memory import NUMBERS, accumulates_in

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
INV_SCALE1, INV_SCALE2 = CONTROL.index("inv_scale1"), CONTROL.index("inv_scale2")


def fingerprint(files: Iterable[Path]) -> str:
    """Of the contents of these files."""
    by_name = sorted(files, key=lambda file: file.name)
    return sha256(b"".join(file.read_bytes() for file in by_name)).hexdigest()[:16]


# all that the loops take names and numbers from: numba itself looks only at a loop's own file
SOURCES = (*Path(__file__).parent.glob("*.py"), Path(hyper.__file__), Path(space.__file__))
MADE_FROM = fingerprint(SOURCES)


def compiled(*arguments) -> Callable:
    """numba's decorator for these types, which are compiled at once, or found in its cache where
    it can keep one, made from the same sources."""
    def compile_now(function: Callable) -> Callable:
        # a part of the names of the cache's files
        function.__qualname__ = f"{function.__name__}.{MADE_FROM}"
        how = dict(nogil=True, error_model="numpy")
        try:
            return njit(void(*arguments), cache=True, **how)(function)
        except Exception:
            # A cache without a folder (RuntimeError), without room or rights (OSError), or with a
            # broken file, whose unpickling raises anything. An error in the loop comes again.
            return njit(void(*arguments), **how)(function)

    return compile_now


def tables(dtype: str) -> tuple:
    """The types of every loop's first arguments: ticket, blocks, layout, hyper, scalings, control,
    and the addresses of m_steps or v_steps, w_table and g_table."""
    F = NUMBERS[accumulates_in(dtype)]
    return (int64[::1], int32[:, ::1], int64[:, ::1], F[:, ::1], F[:, ::1], F[::1], int64, int64,
            int64)

"""Random sequences of events, drawn by Hypothesis and played by `player`.

    python -m tests.helpers.sequences --examples 20000          fresh seeds, printed when drawn
    python -m tests.helpers.sequences --seed 7 --examples 250   one of them again

A failure ends the run: it is shrunk to the shortest sequence that fails, which is printed as the
Setup and the events that `play` takes, with the command that draws it again.
"""

import argparse
import random
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .player import Player
from .setups import CLASSES, Grads, Group, Setup, Weight

CHUNK = 250  # examples of one seed: Hypothesis keeps the tree of everything it has drawn

SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (0, 3), (3, 5), (5, 3, 2), (2, 3, 2, 2),
          (4, 2, 3, 3)]
LARGE = [(1023,), (1024,), (1025,), (31, 34)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
METHODS = {  # with the options of their classes; by default none
    **{method: [{}] for method in CLASSES},
    "asam": [dict(scale="all"), dict(scale="weights", eta=0.03)],
    "fisher": [dict(eta=0.8)],
    "fsam": [dict(convention=c, projection=p) for c in ("algorithm1", "official")
             for p in ("constant", "cosine", "orthogonal")],
    "full": [dict(projection="cosine"), dict(projection="orthogonal")],
    "noise": [dict(projection="cosine"), dict(projection="orthogonal")],
}
COMMON = dict(rho=[0.05, 0.0, 0.3, 1.7], lr=[0.1, 0.0, 0.01, 0.7], weight_decay=[0.0, 0.02, 0.3],
              perturb=[True, True, True, False])
OF_METHOD = {
    **{method: dict(adaptive=[False, True]) for method in CLASSES},
    "asam": dict(adaptive=[True, True, False], eta=[0.03, 0.0, 0.5]),
    "fisher": dict(adaptive=[True, True, False], eta=[0.8, 0.0, 20.0]),
    "fsam": dict(adaptive=[False, True], sigma=[1.0, 0.0, 0.7, 1.3, -0.5],
                 lmbda=[0.9, 0.0, 0.3, 0.9999]),
    "full": dict(adaptive=[False, False, True]),
    "noise": dict(adaptive=[False, False, True]),
}
OF_BASE = {
    "sgd": dict(momentum=[0.0, 0.9, 0.5], dampening=[0.0, 0.2], nesterov=[False, True]),
    "adam": dict(betas=[(0.9, 0.999), (0.0, 0.6), (0.8, 0.97)], eps=[1e-8, 1e-3]),
}
OF_BASE["adamw"] = OF_BASE["adam"]


@dataclass(frozen=True)
class Menu:
    """What there is to draw from for a backend; `most` groups, and weights in one."""

    palettes: list
    forms: list
    most: int


BASES = ("sgd", "sgd", "adam", "adamw", "own sgd", "own adamw")
NARROW = [(F32,), (BF16,), (F16,), (F32, BF16), (F32, F16, BF16)]
DENSE = ["contiguous", "channels_last", "transposed"]
MENUS = {
    "reference": Menu([*NARROW, (F64,), (F64, F32, BF16)], [*DENSE, "gapped"], 3),
    "numba": Menu([*NARROW, (F64,), (F64, F32, BF16)], DENSE, 3),
    "triton": Menu(NARROW, DENSE, 2),
}


def hypers(method: str, base: str) -> dict[str, list]:
    return {**COMMON, **OF_METHOD[method], **OF_BASE[base.split()[-1]]}


def pick(values) -> st.SearchStrategy:
    return st.sampled_from(list(values))


def weights(menu: Menu, palette) -> st.SearchStrategy[Weight]:
    shapes = st.integers(0, 14).flatmap(lambda i: pick(LARGE if i == 14 else SHAPES))
    return st.builds(Weight, shape=shapes, dtype=pick(palette), form=pick(menu.forms),
                     lodger=pick([False, False, True]))


def groups(menu: Menu, method: str, base: str, palette) -> st.SearchStrategy[Group]:
    values = {k: pick(x) for k, x in hypers(method, base).items()}
    return st.builds(
        Group, weights=st.lists(weights(menu, palette), min_size=1, max_size=menu.most).map(tuple),
        hyper=st.fixed_dictionaries(values),
        tensors=pick([False, False, True]) if not base.startswith("own") else st.just(False))


@st.composite
def setups(draw, backend: str) -> tuple[Setup, st.SearchStrategy[Group]]:
    """An optimizer, and the groups that may be added to it."""
    menu = MENUS[backend]
    method = draw(pick(["fsam", *METHODS]))
    base = draw(pick(BASES))
    palettes = menu.palettes
    if base == "own adamw":  # torch's: in float16 its eps is 0, in float64 its 1 - beta^t cancels
        palettes = [dtypes for dtypes in palettes if not {F16, F64} & set(dtypes)]
    new = groups(menu, method, base, draw(pick(palettes)))
    options = dict(interval=draw(pick([1, 1, 2, 3])), start=draw(pick([0, 0, 2])))
    if not base.startswith("own"):
        options["master_weights"] = draw(pick([False, False, True]))
    return Setup(tuple(draw(st.lists(new, min_size=1, max_size=menu.most))), method,
                 draw(pick(METHODS[method])), base, backend, options,
                 wrapped=draw(pick([False, False, True])), named=draw(st.booleans())), new


def masks() -> st.SearchStrategy[int]:
    return st.just(0) | st.just(0) | st.integers(0, 255)


GRADS = st.builds(Grads, seed=st.integers(0, 9999), size=pick([1.0, 1e-3, 30.0]), missing=masks(),
                  zero=masks(), layout=pick(["own", "contiguous", "transposed", "bucket",
                                             "gapped"]),
                  wide=pick([False, False, True]))
SCALES = pick([8.0, 0.5, 3.0, 1024.0])
WHERE = st.integers(0, 99)


def happenings(values: dict[str, list], new: st.SearchStrategy[Group]) -> dict[str, dict]:
    """Every event of `Player` and what its arguments are drawn from."""
    return {
        "step": dict(first=GRADS, second=GRADS, zero_grad=st.booleans()),
        "plain": dict(second=GRADS),
        "give_up": dict(first=GRADS, scale=st.none() | SCALES),
        "bad": dict(first=GRADS, second=GRADS, where=WHERE,
                    value=pick([float("inf"), float("-inf"), float("nan")])),
        "closure": dict(first=GRADS, second=GRADS, ascent=st.booleans(), fails=st.booleans()),
        "amp": dict(first=GRADS, second=GRADS, scale=SCALES, climbs=pick([True, True, False]),
                    bad=st.none() | WHERE, unscale=st.booleans()),
        "flags": dict(first=GRADS, second=GRADS, scale=SCALES, found_inf=st.booleans()),
        "stash": dict(batches=st.lists(st.tuples(GRADS, GRADS), min_size=1, max_size=3).map(tuple),
                      bad=st.none() | st.none() | st.integers(0, 2), scale=st.none() | SCALES,
                      given_up=pick([False, False, True])),
        "hyper": dict(group=WHERE, tensor=st.booleans(), changes=st.fixed_dictionaries(
            {}, optional={k: pick(x) for k, x in values.items()})),
        "grow": dict(group=new),
        "append": dict(group=new, where=WHERE),
        "rearrange": dict(how=pick(["reverse", "move"]), which=WHERE, to=WHERE),
        "forget": dict(how=pick(["clear", "pop", "replace"]), which=WHERE),
        "reload": dict(fresh=st.booleans(), file=st.booleans()),
        "copy": dict(way=pick(["deepcopy", "pickle"])),
        "write": dict(which=WHERE, seed=WHERE),
        "move": dict(form=pick(["contiguous", "channels_last", "transposed"])),
        "full_gradient": dict(seed=WHERE),
        "misuse": dict(first=GRADS, perturbed=st.booleans(), kind=WHERE),
    }


EVENTS = tuple(happenings({}, st.nothing()))


def events(setup: Setup, new: st.SearchStrategy[Group], most: int) -> st.SearchStrategy[list]:
    options = happenings(hypers(setup.method, setup.base), new)
    if setup.method not in ("full", "noise"):
        del options["full_gradient"]
    return st.lists(st.sampled_from(["step", *options]).flatmap(
        lambda name: st.tuples(st.just(name), st.fixed_dictionaries(options[name]))),
        min_size=2, max_size=most)


@st.composite
def sequences(draw, backend: str, most: int) -> tuple[Setup, list]:
    setup, new = draw(setups(backend))
    return setup, draw(events(setup, new, most))


def play(setup: Setup, sequence: list, device="cpu", census: Counter | None = None) -> None:
    """One sequence: each event on the optimizer and on the oracle, then what must hold.

    Raises:
        AssertionError: the optimizer was wrong.
    """
    player = Player(setup, device, census)
    player.check()
    for name, arguments in sequence:
        player.census[name] += 1
        getattr(player, name)(**arguments)
        player.check()


def run(backend: str, examples: int, seed: int, most: int = 8, device="cpu",
        shrink: bool = True, census: Counter | None = None) -> Counter:
    """Draw and play `examples` sequences of up to `most` events.

    Returns:
        How often each event was played, and how many tensors were judged.

    Raises:
        AssertionError: as `play`, with the shortest sequence that fails printed before it.
    """
    census = Counter() if census is None else census
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @hypothesis.seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, phases=phases,
              report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
    @given(sequences(backend, most))
    def played(drawn) -> None:
        census["sequences"] += 1
        census[f"method {drawn[0].method}"] += 1
        census[f"base {drawn[0].base}"] += 1
        play(*drawn, device, census)

    played()
    return census


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.sequences", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument("--seed", type=int, help="of the first 250 sequences; default: drawn")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--events", type=int, default=8, help="at most, per sequence")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for message in ("the weights are 16-bit", "the closure left no gradients"):  # as drawn
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's inf and NaN
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    total, began = Counter(), time.monotonic()
    while total["sequences"] < args.examples:
        examples = min(CHUNK, args.examples - total["sequences"])
        try:
            total += run(args.backend, examples, seed, args.events, args.device)
        except BaseException:
            print(f"again: python -m tests.helpers.sequences --seed {seed} --examples {examples} "
                  f"--backend {args.backend} --events {args.events} --device {args.device}")
            raise
        print(f"seed {seed}: {examples} sequences right; {total['sequences']} in "
              f"{time.monotonic() - began:.0f} s", flush=True)
        seed += 1
    for name, count in sorted(total.items()):
        print(f"{count:9d}  {name}")


if __name__ == "__main__":
    from .. import conftest  # noqa: F401  (the interpreter, where there is no GPU)

    main()

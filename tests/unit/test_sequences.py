"""Right in any sequence of events: drawn sequences against the oracle, and that they can fail.

`make fuzz` draws others, and more of them.
"""


import pytest
import torch

from fastsam import all_spaces, choose, layout, reference, shown

from ..helpers.rounding import Rounded
from ..helpers.sequences import EVENTS, METHODS, run

# what is drawn on purpose; the interpreter is NumPy, which warns of inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore:the weights are 16-bit:UserWarning",
                                        "ignore:the step is a GradScaler.s:UserWarning",
                                        "ignore:the closure left no gradients:UserWarning",
                                        "ignore:(invalid|overflow|divide):RuntimeWarning")
# sequences, and the most events of one
DRAWN = {"reference": (200, 8), "numba": (20, 8), "triton": (40, 4)}


@pytest.mark.parametrize("backend", choose.BACKENDS)
def test_any_sequence_of_events_is_right(backend, device):
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    examples, most = DRAWN[backend]
    census = run(backend, examples, seed=0, most=most, device=device)
    assert census["sequences"] >= examples
    if backend == "reference":  # the others are too slow for as many
        drawn = [*EVENTS, *(f"method {name}" for name in METHODS)]
        assert all(census[what] >= examples / 100 for what in drawn), census
    assert census["unbounded"] < 0.01 * census["judged"]


# ---- that it can fail


def wrong_sigma(direction):
    return lambda g, m, sigma: direction(g, m, 1.01 * sigma)


def forgotten_average(climb):
    def mutated(p, sums):
        before = [None if s.m is None else s.m.clone() for s in p.space.slots]
        done = climb(p, sums)
        for s, m in zip(p.space.slots, before, strict=True):
            if m is not None:
                s.m.copy_(m)
        return done
    return mutated


def wrong_bias_correction(adam):
    return lambda w, g, v, u, t, h: adam(w, g, v, u, t + 1, h)


def one_weight_left_perturbed(go_back):
    return lambda climbs: go_back([c._replace(moved=[*c.moved[:-1], False]) for c in climbs])


def lost_step_counts(load):
    return lambda space, slot, state: load(
        space, slot, {k: x for k, x in state.items() if k not in ("step", "momentum_steps")})


def overflow_unseen(set_cell):
    return lambda self, i, name, value, neutral: set_cell(
        self, i, name, value if name != "found_inf" else None, neutral)


def edits_of_the_state_unseen(is_as_seen):
    return lambda self, state: True


def order_of_memory_unseen(lies_as):
    return lambda w, slot: True


MUTATIONS = [(reference, "direction", wrong_sigma), (reference, "climb", forgotten_average),
             (reference, "adam", wrong_bias_correction),
             (all_spaces, "go_back", one_weight_left_perturbed),
             (shown, "load_slot", lost_step_counts), (layout.Layout, "set_cell", overflow_unseen)]


@pytest.mark.parametrize("owner, name, mutate", MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_optimizer_is_caught(owner, name, mutate, monkeypatch):
    """Within the sequences that the test above draws, and most of these within the first ten."""
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    with pytest.raises(AssertionError):
        run("reference", 300, seed=0, shrink=False)


def test_the_bound_on_rounding_errors_holds_and_is_tight():
    torch.manual_seed(3)
    a, b, c = (torch.randn(1000) for _ in range(3))

    def expression(a, b, c):
        norm = ((a * b - 0.3 * c) ** 2).sum() ** 0.5
        return abs(a) * (a * b - 0.3 * c) / (norm + 1e-12) + (1 + b * b) ** -0.5

    bounded = expression(*(Rounded.exactly(t, torch.float32) for t in (a, b, c)))
    error = (expression(a, b, c).double() - bounded.value).abs()
    assert bounded.allows(expression(a, b, c)).all()
    assert bounded.error.max() < 30 * error.max()
    assert not bounded.allows(expression(a, b, c * (1 + 1e-4))).all()


def test_what_may_be_a_division_by_zero_has_no_bound():
    x = Rounded.exactly(torch.tensor(0.1), torch.float32) * 3
    zero = x - 0.1 * Rounded.exactly(torch.tensor(3.0), torch.float32)
    assert (x / x).is_bounded() and not (x / zero).is_bounded()

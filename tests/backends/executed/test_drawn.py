"""Drawn sequences of events over the whole optimizer, on the executed code, beside the oracle."""

import pytest

from ...helpers.sequences import run

pytestmark = [pytest.mark.long,
              pytest.mark.filterwarnings("ignore:the weights are 16-bit:UserWarning",
                                         "ignore:the closure left no gradients:UserWarning",
                                         "ignore::RuntimeWarning")]


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_events_is_right_in_executed_code(executed, seed):
    census = run("triton", 4, seed=100 + seed, most=4, shrink=False)
    assert census["sequences"] >= 4
    assert executed.traffic, "nothing was launched"

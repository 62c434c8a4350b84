"""A base optimizer beside SAM: they share groups and parameters, and each has its own keys.

A key that both have, as SAM and Adadelta have `rho`, is SAM's in the groups; the base's value is
kept as `base_rho`, and takes the name's place while the base is at work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .state_dict import bases_part

Group = dict[str, Any]


def without(groups: Sequence[Group], own: Group) -> list[Group]:
    """The groups as a base that is to be built gets them."""
    return [{k: x for k, x in group.items() if k not in own} for group in groups]


def own_part(base: Optimizer, own: Group) -> list[Group]:
    """An existing base's groups as SAM's constructor gets them."""
    shared = shared_keys(base, own)
    return [{k: x for k, x in group.items()
             if k in ("params", "param_names") or (k in own and k not in shared)}
            for group in base.param_groups]


def shared_keys(base: Optimizer, own: Group) -> list[str]:
    return [key for key in own if key in base.defaults]


def join(base: Optimizer, groups: Sequence[Group], own: Group, shared: Sequence[str],
         ) -> list[Group]:
    """Put SAM's own keys into the base's groups, which are everybody's from here on."""
    for group, mine in zip(base.param_groups, groups, strict=True):
        group.update({"base_" + key: group[key] for key in shared})
        group.update({key: mine[key] for key in own})
    return base.param_groups


def exchanged(group: Group, shared: Sequence[str]) -> Group:
    """The group with SAM's and the base's values in each other's places."""
    return {**group, **{key: group["base_" + key] for key in shared},
            **{"base_" + key: group[key] for key in shared}}


@contextmanager
def as_base_sees(base: Optimizer, shared: Sequence[str]) -> Iterator[None]:
    """While the block runs, a shared key has the base's value."""
    for group in base.param_groups:
        group.update(exchanged(group, shared))
    try:
        yield
    finally:
        for group in base.param_groups:
            group.update(exchanged(group, shared))


def load(base: Optimizer, state_dict: dict[str, Any], shared: Sequence[str],
         ) -> tuple[list[Group], dict[Tensor, Any]]:
    """Load the base's part of a saved state.

    Returns:
        Its groups and its state.
    """
    theirs = {i: bases_part(state) if isinstance(state, dict) else state
              for i, state in state_dict["state"].items()}
    groups = [exchanged(group, shared) for group in state_dict["param_groups"]]
    with as_base_sees(base, shared):
        base.load_state_dict({**state_dict, "param_groups": groups,
                              "state": {i: part for i, part in theirs.items() if part}})
    for p in [p for p, state in base.state.items() if state is None]:
        del base.state[p]  # ZeroRedundancyOptimizer's sign for another process's
    return base.param_groups, base.state

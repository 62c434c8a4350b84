"""Following what others do to an optimizer's groups, state and parameters between its calls.

Whatever has changed is taken over, or refused by name before a weight changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_containers
from .layout import Group, Layout, Traits
from .passes import Pass
from .phase import Phase
from .shown import adopt, merged

State = dict[Tensor, Any]  # of all parameters


def follow(phase: Phase, traits: Traits, groups: Sequence[Group], state: State) -> Layout:
    """The layout of the parameters and values as they are now, which is `phase.layout` then.

    Raises:
        PhaseError: the groups' parameters, or masters, changed while the weights are moved.
        ValueError: what has changed is refused; nothing else has changed then.
    """
    layout = placed(phase, traits, groups, state)
    if phase.perturbed and traits.masters and not layout.is_untouched(state):
        phase.need(False, "changing the state of float32 masters")
    # what is turned between the halves of a step is seen after it: to ask twice costs host time
    while not (layout.follow_values(groups) and layout.has_its_memory(not phase.perturbed)):
        layout = lay_out(phase, traits, groups, state)
    layout.follow_state(state)
    layout.containers, layout.groups = (groups, state), list(groups)
    return layout


def placed(phase: Phase, traits: Traits, groups: Sequence[Group], state: State) -> Layout:
    """The layout of the parameters that the groups have now; their values may be others, and wrong,
    where a load is to repair them.

    Raises:
        PhaseError, ValueError: as `follow`.
    """
    check_containers(groups)
    layout = phase.layout
    if layout is None or not layout.has(groups):
        phase.need(False, "changing the groups' parameters")
        layout = lay_out(phase, traits, groups, state)
    return layout


@torch.inference_mode(False)  # whose tensors nobody else could write
def lay_out(phase: Phase, traits: Traits, groups: Sequence[Group], state: State,
            hidden: State | None = None) -> Layout:
    """Make a new layout, in which everything goes on where it was.

    Args:
        hidden: what a copied optimizer had, and its state does not show.
    """
    old, new = phase.layout, Layout(traits, groups)
    new.follow_values(groups)
    if old is None:
        adopt(new.shown, new.params, merged(state, hidden or {}))
    else:
        phase.climbs = new.inherit(old, state, phase.climbs)
        old.shown.take_away(state, set(old.params).difference(new.params))
    phase.layout = new  # before its tensors are shown: after a Ctrl-C it knows which are its own
    new.show(state)
    return new


def read(phase: Phase, traits: Traits, groups: Sequence[Group], state: State, first: bool,
         inverse: Tensor | None) -> list[Pass]:
    """What a pass reads of every space, after `follow`; whatever can be refused is, before a
    weight changes.

    Args:
        first: it is a first pass.
        inverse: 1 / the loss scale of the gradients, if they are scaled.
    """
    layout, passes = phase.layout, list[Pass]()
    while len(passes) < len(layout.spaces):
        i = len(passes)
        p = layout.read(i, first, layout.tables[i])
        if p is None:  # begin again, with a new layout
            layout, passes = lay_out(phase, traits, groups, state), []
            continue
        passes.append(p if inverse is None else p._replace(
            inv_scale=inverse.to(p.space.kind.device, p.space.kind.acc)))
    if not (first and traits.along_v):  # whose inv_scale1 is -1 for good
        for i, p in enumerate(passes):
            layout.set_cell(i, "inv_scale1" if first else "inv_scale2", p.inv_scale, 1)
    return passes

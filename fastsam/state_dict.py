"""Saving and loading an optimizer: its state and its base's, and its hooks around them."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from . import foreign
from .checks import check_containers, check_groups, params_of
from .entries import FOREIGN, Entry, as_torch_saves, check_entry, without_published
from .hyper import KEEPING
from .interrupts import Result, surely
from .layout import Group, Layout, Traits
from .memory import storage_at
from .shown import adopt

Saved = dict[str, Any]  # a whole state
HOOKS = "_optimizer_state_dict_post_hooks"
SHARED = ("the state lies in memory that processes share, and this copy of the optimizer keeps its "
          "own: the processes share the weights, but no momentum or average that fastsam keeps "
          "(fork instead; or pass a subclass of the base, to run its own step over its own state)")
LOADING = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"


def save(optimizer: Optimizer, base: Optimizer, traits: Traits, layout: Layout,
         torchs: Callable[[], Saved]) -> Saved:
    """The optimizer's whole state, its base's included (see `SAM.state_dict`).

    Args:
        torchs: torch's own `state_dict` of the optimizer.
    """
    state = without_hooks(optimizer, [HOOKS], torchs)
    if traits.base:
        state["state"] = {i: as_torch_saves(x) for i, x in state["state"].items()}
    else:
        own = {i: layout.shown.tensors[p] for i, p in enumerate(params_of(optimizer.param_groups))}
        state = foreign.save(base, state["param_groups"], own, traits.shared, keys_of(traits))
    for hook in getattr(optimizer, HOOKS).values():
        state = hook(optimizer, state) or state
    return state


def keys_of(traits: Traits) -> tuple[str, ...]:
    """SAM's own keys of the groups."""
    return *traits.own, "sam_steps"


def is_shared(state: dict[Tensor, Entry]) -> bool:
    """Whether tensors of the state lie in memory that processes share."""
    return any(isinstance(x, Tensor) and x.device.type == "cpu" and storage_at(x) is not None
               and x.is_shared() for entry in state.values()
               if isinstance(entry, dict) for x in entry.values())


def fitting(state_dict: Saved, mine: list[Group], base: Optimizer, traits: Traits, layout: Layout,
            ) -> tuple[Saved, dict[Tensor, Entry]]:
    """A saved state with the groups that it gives this optimizer, and its parameters' states.

    Args:
        mine: the optimizer's groups.

    Raises:
        ValueError: it is none of an optimizer, another class's, or another model's, or has a value
            that is refused.
    """
    if not traits.base:
        state_dict = foreign.as_saved(state_dict, mine, traits.shared)
    refuse_no_state(state_dict)
    theirs, saved, params = state_dict["param_groups"], state_dict["state"], params_of(mine)
    refuse_others_keys(mine, theirs, saved.values(), traits)
    groups = merged_groups(mine, theirs)
    states = [saved.get(i, {}) for group in groups for i in group["params"]]
    for p, state in zip(params, states, strict=False):
        check_entry(p, state, traits.base, traits.mode)
    keep_decoupled(groups, base)
    keep_adaptive(groups, mine, theirs, traits)
    if len(groups) == len(mine):  # torch has words of its own for others
        layout.seen(groups)
    check_containers(groups)
    check_groups(groups, traits.own, traits.base, traits.along_v, traits.mode)
    return {**state_dict, "param_groups": groups}, dict(zip(params, states, strict=False))


def refuse_no_state(state_dict: Saved) -> None:
    """Refuse what no optimizer has saved, such as a whole checkpoint, or a model's."""
    for name in ("state", "param_groups"):
        if name not in state_dict:
            has = ", ".join(map(repr, [*state_dict][:4])) or "nothing"
            raise ValueError(f"a state without {name!r}, which has {has}: load what an optimizer's "
                             "state_dict() returned, and not all of the checkpoint that it is in")


def load(optimizer: Optimizer, base: Optimizer, traits: Traits, layout: Layout, state_dict: Saved,
         entries: dict[Tensor, Entry], torchs: Callable[[Saved], None]) -> None:
    """Load what was found `fitting` (see `SAM.load_state_dict`).

    Args:
        entries: the saved states, by parameter.
        torchs: torch's own `load_state_dict` of the optimizer.
    """
    containers = optimizer.param_groups, optimizer.state
    torchs({**state_dict, "state": {}})
    if traits.base:
        optimizer.state.update((p, without_published(x)) for p, x in entries.items() if x)
        ids = {i for group in state_dict["param_groups"] for i in group["params"]}
        optimizer.state.update((k, x) for k, x in state_dict["state"].items() if k not in ids)
    else:
        optimizer.param_groups, optimizer.state = foreign.load(
            base, state_dict, traits.shared, keys_of(traits))
    keep_containers(optimizer, base, *containers)
    adopt(layout.shown, list(entries), entries)
    layout.show(optimizer.state)


def keep_containers(optimizer: Optimizer, base: Optimizer, groups: list[Group], state: Any,
                    ) -> None:
    """Go on with these containers, which others hold, such as Lightning's wrapper."""
    new_groups, new_state = list(optimizer.param_groups), dict(optimizer.state)
    groups[:] = new_groups
    state.clear()
    state.update(new_state)
    optimizer.param_groups, optimizer.state = groups, state
    foreign.join_containers(optimizer, base)


def merged_groups(mine: list[Group], theirs: list[Group]) -> list[Group]:
    """The saved groups, with this optimizer's value for every key that they lack. Another number
    of groups stays as it is, for torch to refuse in its own words."""
    if len(mine) != len(theirs):
        return theirs
    return [{**{k: x for k, x in group.items() if k != "params"}, **saved}
            for group, saved in zip(mine, theirs, strict=True)]


def refuse_others_keys(mine: list[Group], theirs: list[Group], states: Collection[Entry],
                       traits: Traits) -> None:
    """Refuse a group key that another class has under a name of this one's: `eta` is ASAM's, which
    has a `scale` too, or FisherSAM's; `alpha` is LookSAM's, whose states have a g_v, or GSAM's.

    Args:
        states: the saved states of the parameters.
    """
    mode = traits.mode
    entries = [x for x in states if isinstance(x, dict) and x]
    looks = any(FOREIGN + "g_v" in x or "g_v" in x for x in entries)
    for own, saved in zip(mine, theirs, strict=False):
        others = ["eta"] if ("scale" in own) != ("scale" in saved) else []
        others += ["alpha"] if mode in KEEPING and entries and looks != (mode == "looksam") else []
        for key in others:
            if key in traits.own and key in own and key in saved:
                raise ValueError(f"{key}={saved[key]!r} in a state is another class's {key}: "
                                 f"delete it from the groups to keep {own[key]!r}")


def keep_decoupled(groups: list[Group], base: Optimizer) -> None:
    """AdamW stays AdamW, also with the groups of an Adam, as in torch."""
    if type(base) is AdamW:
        for group in groups:
            group["decoupled_weight_decay"] = True


def keep_adaptive(groups: list[Group], mine: list[Group], theirs: list[Group], traits: Traits,
                  ) -> None:
    """ASAM and FisherSAM stay adaptive, also with the groups of a class without an `eta`."""
    if "eta" in traits.own:
        for group, own, saved in zip(groups, mine, theirs, strict=False):
            if "eta" not in saved:
                group["adaptive"] = own["adaptive"]


def without_hooks(optimizer: Any, names: Collection[str], call: Callable[[], Result]) -> Result:
    """Call, while the optimizer has no hooks of these names."""
    hooks = {name: getattr(optimizer, name) for name in names}

    def call_without_them() -> Result:
        vars(optimizer).update((name, OrderedDict()) for name in names)
        return call()

    return surely(call_without_them, lambda: vars(optimizer).update(hooks))


def between_hooks(optimizer: Any, state_dict: Saved, load: Callable[[Saved], None]) -> None:
    """Run the hooks of load_state_dict on the whole state, before it is loaded and after it, and
    none of them inside."""
    before, after = LOADING
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state is a {type(state_dict).__name__}: load the dict that an "
                         "optimizer's state_dict() returned")
    state_dict = state_dict.copy()  # which a hook may write into, as in torch
    for hook in getattr(optimizer, before).values():
        state_dict = hook(optimizer, state_dict) or state_dict
    without_hooks(optimizer, LOADING, lambda: load(state_dict))
    for hook in getattr(optimizer, after).values():
        hook(optimizer)

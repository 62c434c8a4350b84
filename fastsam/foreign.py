"""A base optimizer beside SAM: they share groups and parameters, and each has its own keys.

A key that both have, as SAM and Adadelta have `rho`, is SAM's in the groups; the base's value is
kept as `base_rho`, and takes the name's place while the base is at work.

A base that wraps another, as Lookahead does, may save itself in a form of its own; that is kept
whole under BASE, beside ours in torch's form.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .entries import OWN, bases_part
from .interrupts import Result, surely
from .shown import Shown

Group = dict[str, Any]
BASE = "base_optimizer"
SOME_HAVE = {"sigma", "lmbda", "scale", "eta", "alpha"}  # of SAM's own keys


def plain_names(kwargs: dict[str, Any], own: Group) -> dict[str, Any]:
    """The base's arguments under its own names: `base_rho` is Adadelta's rho."""
    names = {key: key.removeprefix("base_") for key in kwargs}
    return {name if key.startswith("base_") and name in own else key: kwargs[key]
            for key, name in names.items()}


def unless_counted(group: Any) -> Any:
    """What was given as a group: itself, or a copy of a dict in which another optimizer of ours
    counts its steps."""
    if isinstance(group, dict) and "sam_steps" in group:
        return {k: x for k, x in group.items() if k != "sam_steps"}
    return group


def given(params: Iterable[Any], own: Group) -> list[Any]:
    """What a constructor is given, with copies of dicts in which another of ours counts."""
    params = list(params)
    if params and all(isinstance(x, dict) for x in params):
        return [unless_counted(x) for x in without_anothers(params, own)]
    return params


@contextmanager
def lent(optimizer: Optimizer, params: Any) -> Iterator[None]:
    """Around a call that takes groups over. Of the user's dicts, those that the optimizer does not
    keep, and all where the call fails, are left as they were; their parameters stay a list, as an
    iterator is used up."""
    dicts = [] if isinstance(params, Tensor) else [x for x in params if isinstance(x, dict)]
    before = [dict(group) for group in dicts]
    kept = set[int]()
    try:
        yield
        kept = {id(group) for group in optimizer.param_groups}
    finally:
        for group, was in zip(dicts, before, strict=True):
            if id(group) not in kept:
                was.update((k, group[k]) for k in ("params", "param_names") if k in group)
                group.clear()
                group.update(was)


def build(kind: Any, groups: Sequence[Group], own: Group, kwargs: dict[str, Any]) -> Optimizer:
    """A base over these very dicts, which are without SAM's keys then: some bases refuse keys
    that they do not know."""
    for group in groups:
        for key in own:
            del group[key]
    return kind(list(groups), **kwargs)


def own_part(base: Optimizer, own: Group) -> list[Group]:
    """An existing base's groups as SAM's constructor gets them."""
    shared = shared_keys(base, own)
    return [{k: x for k, x in group.items() if k in ("params", "param_names")
             or (k in own and (k not in shared or "base_" + k in group))}
            for group in without_anothers(base.param_groups, own)]


def without_anothers(groups: Sequence[Group], own: Group) -> list[Group]:
    """Groups without what another optimizer of ours has left in those in which it counts its
    steps: values that all of these have, rather than those that the user gave some. The new one
    has values of its own."""
    counted = [group for group in groups if "sam_steps" in group]
    others = {key for key in own if key != "sam_steps"
              and all(is_same(group.get(key), counted[0].get(key)) for group in counted)}
    return [{k: x for k, x in group.items() if k not in others} if "sam_steps" in group else group
            for group in groups]


def forget_another(base: Optimizer, own: Group, m: Collection[str] | None) -> None:
    """Take from groups and state of a base what only another class around it had; a key that the
    two shared is the base's again.

    Args:
        m: the names of this class's average and its count, which stay; None: the base is not
            fused, and the names are its own.
    """
    defaults = defaults_of(base)
    if not any("sam_steps" in group for group in base.param_groups):
        return
    for group in base.param_groups:
        for key in SOME_HAVE - own.keys():
            if "base_" + key in group:
                group[key] = group.pop("base_" + key)
            elif "sam_steps" in group and key not in defaults:
                group.pop(key, None)
    stale = set() if m is None else set(OWN).difference(m)
    for entry in base.state.values():
        for name in stale if isinstance(entry, dict) else ():
            entry.pop(name, None)


def is_same(x: Any, y: Any) -> bool:
    return x is y or not (isinstance(x, Tensor) or isinstance(y, Tensor)) and bool(x == y)


def defaults_of(base: Optimizer) -> Group:
    """Of a base that wraps another, as PostLocalSGDOptimizer does, and has none itself: that
    one's."""
    return next((one.defaults for one in with_inner(base) if hasattr(one, "defaults")), {})


def shared_keys(base: Optimizer, own: Group) -> tuple[str, ...]:
    return tuple(key for key in own if key in defaults_of(base))


def join(base: Optimizer, groups: Sequence[Group], own: Group, shared: Sequence[str],
         ) -> list[Group]:
    """Put SAM's own keys into the base's groups, which are everybody's from here on."""
    for group, mine in zip(base.param_groups, groups, strict=True):
        for key in shared:
            if key not in group and "base_" + key not in group:
                raise ValueError(f"a parameter group of the base lacks {key!r}: add groups with "
                                 "add_param_group, which fills the defaults in")
            group.setdefault("base_" + key, group.get(key))
        group.update({key: mine[key] for key in own})
    return base.param_groups


def exchanged(group: Group, shared: Sequence[str]) -> Group:
    """SAM's and the base's values of the shared keys that a group has twice, in each other's
    places."""
    pairs = [(key, "base_" + key) for key in shared if {key, "base_" + key} <= group.keys()]
    return {to: group[key] for pair in pairs for to, key in (pair, pair[::-1])}


def as_base_sees(base: Optimizer, shared: Sequence[str], call: Callable[[], Result]) -> Result:
    """Call, while a shared key has the base's value; after it SAM's, in the groups that there were
    and in those that the call has put in. What the call has written is kept."""
    groups = list(base.param_groups)
    theirs = [exchanged(group, shared) for group in groups]
    back: list[tuple[Group, Group]] | None = [
        (group, {key: group[key] for key in values})
        for group, values in zip(groups, theirs, strict=True)]

    def exchanged_call() -> Result:
        nonlocal back
        put_values(zip(groups, theirs, strict=True))
        back = None
        return call()

    def put_back() -> None:
        nonlocal back
        if back is None:
            known = {id(group) for group in groups}
            new = [group for group in base.param_groups if id(group) not in known]
            back = [(group, exchanged(group, shared)) for group in [*groups, *new]]
        put_values(back)

    return surely(exchanged_call, put_back)


def method_of(base: Optimizer, name: str) -> Callable[..., Any] | None:
    """A public method of the base's own, such as schedule-free's `train` and `eval` or Lookahead's
    `sync_lookahead`; None if it has none of this name."""
    method = None if name.startswith("_") else getattr(base, name, None)
    return method if callable(method) else None


def zero_grad(base: Optimizer, set_to_none: bool) -> None:
    """Let a base with a `zero_grad` of its own clear what it has: opacus' DPOptimizer keeps the
    gradients of all samples beside `.grad`, and adds those of the next pass up."""
    own = base.zero_grad
    if getattr(own, "__func__", None) is not Optimizer.zero_grad:
        taken = inspect.signature(own).parameters.values()
        if any(p.name == "set_to_none" or p.kind is p.VAR_KEYWORD for p in taken):
            own(set_to_none=set_to_none)
        else:
            own()


def put_values(values: Iterable[tuple[Group, Group]]) -> None:
    for group, those in values:
        group.update(those)


def step(base: Optimizer, shared: Sequence[str], shown: Shown, state: dict[Tensor, Any],
         ) -> set[Tensor]:
    """The base's own step, without what is SAM's alone in the state.

    Returns:
        The parameters beside whose state what is SAM's may stand from here on (see `Shown.put`).
    """
    waiting = [p for p in shown.hidden() if p.grad is not None]
    before = shown.marks(waiting)
    shown.aside(state, lambda: as_base_sees(base, shared, base.step))
    after = shown.marks(waiting)
    written = {p for p, x, y in zip(waiting, before, after, strict=True) if x != y}
    return written | shown.nothing_of_ours()


def set_container(base: Optimizer, name: str, container: Any) -> None:
    """Let a base, and one that it wraps and shares its container with, use this one.

    Args:
        name: "param_groups" or "state".
    """
    was = getattr(base, name)
    for inner in list(vars(base).values()):
        if isinstance(inner, Optimizer) and getattr(inner, name) is was:
            set_container(inner, name, container)
    if getattr(base, name) is not container:  # it may be a property that asks the inner one
        setattr(base, name, container)


def join_containers(optimizer: Optimizer, base: Optimizer, groups: object = None,
                    state: object = None) -> None:
    """Someone may have replaced the groups or the state of one of the two, who share them: both
    get the new ones, the optimizer's own where both were replaced.

    Args:
        groups, state: those that they shared when they were last seen.
    """
    for name, seen in (("param_groups", groups), ("state", state)):
        mine, theirs = getattr(optimizer, name), getattr(base, name)
        if mine is not theirs:
            if mine is seen:
                setattr(optimizer, name, theirs)
            set_container(base, name, getattr(optimizer, name))


def with_inner(base: Optimizer) -> list[Optimizer]:
    """A base and the optimizers that it wraps, one or several."""
    found = [base]
    for optimizer in found:
        known = set(map(id, found))
        found += {id(x): x for x in held(optimizer)
                  if isinstance(x, Optimizer) and id(x) not in known}.values()
    return found


def held(optimizer: Optimizer) -> Iterator[Any]:
    """What an optimizer holds, by itself or in a list or dict."""
    for x in vars(optimizer).values():
        yield from x if isinstance(x, (list, tuple)) else x.values() if isinstance(x, dict) else [x]


@contextmanager
def all_or_nothing(optimizer: Optimizer, base: Optimizer) -> Iterator[None]:
    """Where the block fails, the groups and states of both are those that they were, with what
    was in them. The tensors themselves are not kept: a load makes new ones."""
    everyone = [optimizer, *with_inner(base)]
    attributes = [(one, dict(vars(one))) for one in everyone]
    containers: list[Any] = [x for one in everyone for x in (
        one.param_groups, *one.param_groups, one.state, *one.state.values())]
    inside = [(x, x.copy()) for x in containers if isinstance(x, (dict, list))]
    try:
        yield
    except BaseException:
        for one, values in attributes:
            vars(one).update(values)
        for x, was in inside:
            x.clear()
            x.update(was) if isinstance(x, dict) else x.extend(was)
        raise


def save(base: Optimizer, groups: Sequence[Group], own: dict[int, dict[str, Tensor]],
         shared: Sequence[str], keys: Collection[str]) -> dict[str, Any]:
    """The base's whole saved state, and in it SAM's own tensors and its part of these groups. The
    rest of the groups is as the base saves it, which may leave something out.

    Args:
        keys: SAM's own keys of the groups.
    """
    state = as_base_sees(base, shared, base.state_dict)
    # it may have a form of its own, or other groups
    if "state" not in state or len(state.get("param_groups", ())) != len(groups):
        return {"state": {i: x for i, x in own.items() if x}, "param_groups": groups, BASE: state}
    theirs, ours = state["state"], {"params", *keys, *("base_" + key for key in shared)}
    groups = [{**group, **{k: x for k, x in mine.items() if k in ours}}
              for group, mine in zip(state["param_groups"], groups, strict=True)]
    return {**state, "param_groups": groups, "state": {
        **theirs, **{i: {**theirs.get(i, {}), **x} for i, x in own.items() if x}}}


def as_saved(state_dict: dict[str, Any], groups: Sequence[Group], shared: Sequence[str],
             ) -> dict[str, Any]:
    """A state in the form that `save` gives it, also where a base alone saved it: its `rho` is
    Adadelta's own then, and its form may be Lookahead's."""
    if "state" in state_dict and "param_groups" in state_dict:
        return {**state_dict, "param_groups": [
            {"base_" + k if k in shared and "base_" + k not in group else k: x
             for k, x in theirs_alone(group, groups).items()}
            for group in state_dict["param_groups"]]}
    first, numbered = 0, []
    for group in groups:
        numbered.append({"params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return {"state": {}, "param_groups": numbered, BASE: state_dict}


def theirs_alone(group: Group, mine: Sequence[Group]) -> Group:
    """A saved group in which a key that another class shared with the base is the base's alone."""
    known = set().union(*mine)
    names = {"base_" + key: key for key in SOME_HAVE
             if "base_" + key in group and "base_" + key not in known and key in known}
    return {**{k: x for k, x in group.items() if k not in names},
            **{key: group[name] for name, key in names.items()}}


def load_alone(base: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state of the base's own. One that wraps another, as PostLocalSGDOptimizer does, may go
    on with the groups that the inner one has no more."""
    groups = base.param_groups
    inner = [one for one in with_inner(base)[1:] if one.param_groups is groups]
    base.load_state_dict(state_dict)
    for one in inner:
        if base.param_groups is groups and one.param_groups is not groups:
            base.param_groups = one.param_groups


def load(base: Optimizer, state_dict: dict[str, Any], shared: Sequence[str],
         own: Collection[str]) -> tuple[list[Group], Any]:
    """Load the base's part of a saved state.

    Args:
        own: SAM's own keys of the groups, which the saved groups have.

    Returns:
        Its groups and its state.
    """
    if BASE in state_dict:
        load_alone(base, state_dict[BASE])
        for group, mine in zip(base.param_groups, state_dict["param_groups"], strict=True):
            group.update({"base_" + key: group[key] for key in shared})
            group.update({key: mine[key] for key in own})
        return base.param_groups, base.state
    theirs = {i: bases_part(state) for i, state in state_dict["state"].items()}
    groups = [{**group, **exchanged(group, shared)} for group in state_dict["param_groups"]]
    part = {**state_dict, "param_groups": groups, "state": {
        i: x for i, x in theirs.items() if not isinstance(x, dict) or x}}
    as_base_sees(base, shared, lambda: load_alone(base, part))
    for p in [p for p, state in base.state.items() if state is None]:
        del base.state[p]  # ZeroRedundancyOptimizer's sign for another process's
    return base.param_groups, base.state

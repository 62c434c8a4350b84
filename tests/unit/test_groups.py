"""Whatever is done to `param_groups` between steps is followed as torch's optimizers follow it, or
refused by name before a weight changes."""

import copy

import pytest
import torch
from torch import nn

from fastsam import ASAM, SAM, FriendlySAM, FullGradientSAM, LookSAM, PhaseError

from ..helpers.beside import RHO, Beside, close

# ---- followed


def append(opt, params):
    opt.param_groups[0]["params"].append(params[4])


def append_without_dimensions(opt, params):
    opt.param_groups[1]["params"].append(params[5])


def replace(opt, params):
    opt.param_groups[0]["params"][0] = params[4]


def replace_by_another_shape(opt, params):
    opt.param_groups[1]["params"][0] = params[4]


def remove(opt, params):
    del opt.param_groups[0]["params"][1]


def insert(opt, params):
    opt.param_groups[0]["params"].insert(0, params[4])


def reorder(opt, params):
    opt.param_groups[0]["params"].reverse()


def move_to_another_group(opt, params):
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(0))


def exchange_between_groups(opt, params):
    first, second = (group["params"] for group in opt.param_groups)
    first[1], second[0] = second[0], first[1]


def clear_a_group(opt, params):
    opt.param_groups[0]["params"].clear()


def another_list(opt, params):
    opt.param_groups[0]["params"] = [params[2], params[4]]


def a_tuple(opt, params):
    opt.param_groups[0]["params"] = (params[4], params[0])


def exchange_whole_lists(opt, params):
    first, second = opt.param_groups
    first["params"], second["params"] = second["params"], first["params"]


def reverse_groups(opt, params):
    opt.param_groups.reverse()


def delete_a_group(opt, params):
    del opt.param_groups[0]


def append_a_whole_group(opt, params):
    opt.param_groups.append({**opt.param_groups[1], "params": [params[4]], "lr": 0.2})


def insert_a_whole_group(opt, params):
    opt.param_groups.insert(0, {**opt.param_groups[1], "params": [params[4], params[5]]})


def another_list_of_groups(opt, params):
    opt.param_groups = [dict(group) for group in reversed(opt.param_groups)]


def another_list_of_groups_in_the_base(opt, params):
    base = getattr(opt, "base_optimizer", opt)
    base.param_groups = [{**base.param_groups[0], "params": [params[4], params[1]], "lr": 0.3}]


def one_group_of_two(opt, params):
    first, second = opt.param_groups
    first["params"].extend(second["params"])
    opt.param_groups.remove(second)


def split(opt, params):
    group = opt.param_groups[0]
    opt.param_groups.append({**group, "params": [group["params"].pop()], "weight_decay": 0.3})


def add_param_group(opt, params):
    opt.add_param_group(dict(params=[params[4]], lr=0.2))


FOLLOWED = [append, append_without_dimensions, replace, replace_by_another_shape, remove, insert,
            reorder, move_to_another_group, exchange_between_groups, clear_a_group, another_list,
            a_tuple, exchange_whole_lists, reverse_groups, delete_a_group, append_a_whole_group,
            insert_a_whole_group, another_list_of_groups, another_list_of_groups_in_the_base,
            one_group_of_two, split, add_param_group]


@pytest.mark.parametrize("edit", FOLLOWED, ids=lambda f: f.__name__)
def test_edited_groups_train_as_in_torch(edit, backend):
    pair = Beside("sgd", backend)
    pair.step()
    pair.both(edit)
    pair.step(2)


@pytest.mark.parametrize("base", ["adamw", "plain sgd", "rmsprop"])
@pytest.mark.parametrize("edit", FOLLOWED, ids=lambda f: f.__name__)
def test_edited_groups_train_as_in_torch_over_other_bases(edit, base):
    pair = Beside(base, "reference")
    pair.step()
    pair.both(edit)
    pair.step(2)


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_edits_in_a_row_before_the_first_step_and_after(base):
    pair = Beside(base, "reference")
    for edit in (append, exchange_between_groups, reverse_groups, reorder):
        pair.both(edit)
        pair.step()
    pair.both(clear_a_group)
    pair.step()
    pair.both(lambda opt, params: opt.param_groups[0]["params"].extend(params[5:]))
    pair.step()


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
def test_a_parameter_that_comes_back_finds_its_state(base):
    """As in torch, whose state stays while a parameter is in no group."""
    pair = Beside(base, "reference")
    pair.step()
    pair.both(remove)
    pair.step()
    pair.both(lambda opt, params: opt.param_groups[0]["params"].append(params[1]))
    pair.step()


def test_the_average_follows_its_parameter(backend):
    """Friendly-SAM's m, for which torch has no counterpart: it stays with a parameter that moves
    to another place, begins anew with a new one, and d = g - m at every one of them."""
    pair = Beside("sgd", backend, make=FriendlySAM, sigma=1.0, lmbda=0.5, convention="official")
    pair.step()
    opt, params = pair.ours.opt, pair.ours.params
    m = {p: opt.state[p]["ema"].clone() for p in pair.ours.members()}
    pair.both(exchange_between_groups)
    pair.both(append)
    assert len(opt.spaces) == 1  # followed here
    for p in params[:4]:
        assert torch.equal(opt.state[p]["ema"], m[p])
    assert not opt.state[params[4]]["ema"].any() and int(opt.state[params[4]]["ema_steps"]) == 0
    w = [p.detach().clone() for p in params]
    g = pair.gradients(77)
    pair.set(pair.ours, g)
    opt.first_step()
    d = [x - m.get(p, 0) for x, p in zip(g[:5], params, strict=False)]
    norm = torch.stack([x.norm() for x in d]).norm()
    for p, x, before in zip(params, d, w, strict=False):
        close(p, before + RHO / norm * x, "moved")
    opt.restore()


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_densified_points_keep_the_state_that_was_moved_by_hand(base, backend):
    """As Gaussian splatting grows its tensors."""
    def grow(opt, params):
        for i in (0, 4):
            old = params[i]
            new = nn.Parameter(torch.cat([old.detach(), torch.ones_like(old[:2])]))
            state = opt.state.pop(old, None)
            if state is not None:
                for name, x in state.items():
                    if isinstance(x, torch.Tensor) and x.ndim:
                        state[name] = torch.cat([x, torch.zeros_like(x[:2])])
                opt.state[new] = state
            for group in opt.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            params[i] = new

    def prune(opt, params):
        old = params[0]
        keep = torch.tensor([True, False, True, True, False])
        new = nn.Parameter(old.detach()[keep])
        state = opt.state.pop(old)
        for name, x in state.items():
            if isinstance(x, torch.Tensor) and x.ndim:
                state[name] = x[keep]
        opt.state[new] = state
        opt.param_groups[0]["params"][0] = params[0] = new

    pair = Beside(base, backend)
    pair.step(2)
    pair.both(grow)
    pair.step()
    pair.both(prune)
    pair.step(2)


def test_saved_groups_are_those_of_now(backend):
    pair = Beside("sgd", backend)
    pair.step()
    pair.both(append)
    pair.both(move_to_another_group)
    state = pair.ours.opt.state_dict()
    assert [len(group["params"]) for group in state["param_groups"]] == [3, 2]
    again = copy.deepcopy((pair.ours.params, pair.ours.opt))
    pair.step()
    params, pair.ours.params = pair.ours.params, again[0]
    pair.t, pair.ours.opt = 1, again[1]
    pair.torch = copy.deepcopy(pair.torch)
    pair.climb()
    pair.set(pair.ours, pair.gradients(1002))
    pair.ours.opt.second_step()
    for p, q in zip(params, again[0], strict=True):
        assert torch.equal(p, q)


def pop_a_group(opt):
    return opt.param_groups.pop()["params"]


def remove_a_parameter(opt):
    return [opt.param_groups[0]["params"].pop()]


def replace_a_parameter(opt):
    was, opt.param_groups[0]["params"][0] = (opt.param_groups[0]["params"][0],
                                             nn.Parameter(torch.ones(2)))
    return [was]


class OwnStep(torch.optim.SGD):
    """Is not fused."""


PLAIN_SGD = [(torch.optim.SGD, {}), (OwnStep, {})]
WITH_STATE = [(torch.optim.SGD, dict(momentum=0.9)), (OwnStep, dict(momentum=0.9)),
              (torch.optim.Adam, {}), (torch.optim.RMSprop, {})]


def two_groups(kind, hyper, make=SAM, **options):
    params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return params, make(groups, kind, lr=0.1, **hyper, **options)


def step_all(opt, params):
    for p in params:
        p.grad = torch.ones(2)
    opt.step()


@pytest.mark.parametrize("edit", [pop_a_group, remove_a_parameter, replace_a_parameter])
@pytest.mark.parametrize("base, steps", [
    *((base, steps) for base in PLAIN_SGD for steps in (0, 1)), *((x, 0) for x in WITH_STATE)],
    ids=str)
def test_what_was_never_updated_leaves_with_its_parameter(base, steps, edit, backend):
    """A state is saved then as torch's optimizers save it. A parameter that comes back begins
    anew."""
    params, opt = two_groups(*base, backend=backend)
    for _ in range(steps):
        step_all(opt, params)
    left = edit(opt)
    saved = opt.state_dict()
    assert not any(p in opt.state for p in left)
    assert saved["state"].keys() <= set(range(sum(len(g["params"]) for g in opt.param_groups)))
    opt.load_state_dict(copy.deepcopy(saved))
    opt.add_param_group({"params": left})
    step_all(opt, params)
    assert len(opt.state_dict()["param_groups"]) == len(opt.param_groups)


@pytest.mark.parametrize("base", WITH_STATE, ids=str)
def test_what_torch_keeps_of_a_parameter_that_left_is_kept(base, backend):
    params, opt = two_groups(*base, backend=backend)
    step_all(opt, params)
    before = {p: {k: torch.as_tensor(x).clone() for k, x in opt.state[p].items()}
              for p in params[2:]}
    opt.param_groups.pop()
    with pytest.raises(KeyError):
        opt.state_dict()
    for p, entry in before.items():
        assert entry.keys() == opt.state[p].keys()
        assert all(torch.equal(torch.as_tensor(opt.state[p][k]), x) for k, x in entry.items())


@pytest.mark.parametrize("mine", [
    {"mine": 1}, {"momentum_buffer": torch.full((2,), 2.0)}, {"momentum_steps": torch.tensor(3)}])
def test_what_somebody_put_into_an_entry_is_kept(mine):
    params, opt = two_groups(torch.optim.SGD, dict(momentum=0.9))
    opt.state[params[3]].update(mine)
    opt.param_groups.pop()
    opt.spaces  # noqa: B018
    assert params[2] not in opt.state
    assert all(opt.state[params[3]][name] is x for name, x in mine.items())


def test_a_momentum_that_was_written_in_place_is_kept():
    params, opt = two_groups(torch.optim.SGD, dict(momentum=0.9))
    opt.state[params[3]]["momentum_buffer"].fill_(2.0)
    opt.param_groups.pop()
    opt.spaces  # noqa: B018
    assert params[2] not in opt.state
    assert torch.equal(opt.state[params[3]]["momentum_buffer"], torch.full((2,), 2.0))


@pytest.mark.parametrize("lost", [False, True])
def test_a_master_leaves_with_its_parameter_unless_it_knows_more(lost):
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3)]
    opt = SAM([{"params": [p]} for p in params], torch.optim.SGD, lr=0.001, master_weights=True)
    params[2].grad = torch.ones(2, dtype=torch.bfloat16)
    opt.step()
    del opt.param_groups[1:]
    if lost:
        for p in params[1:]:
            p.data.untyped_storage().resize_(0)
    opt.spaces  # noqa: B018
    assert [p in opt.state for p in params] == [True, lost, True]
    opt.state.pop(params[1], None)
    del opt.state[params[2]]
    assert len(opt.state_dict()["state"]) == 1


@pytest.mark.parametrize("base, kind, options", [
    (torch.optim.SGD, FriendlySAM, {}), (torch.optim.RMSprop, FriendlySAM, {}),
    (torch.optim.SGD, LookSAM, {}), (torch.optim.SGD, FullGradientSAM, dict(part="full")),
    (torch.optim.RMSprop, FullGradientSAM, dict(part="full"))])
def test_an_average_leaves_with_its_parameter_before_the_first_step(base, kind, options):
    params, opt = two_groups(base, {}, kind, **options)
    opt.param_groups.pop()
    assert opt.state_dict()["state"].keys() <= {0, 1}
    assert not any(p in opt.state for p in params[2:])


# ---- refused


def twice_in_a_group(opt, params):
    opt.param_groups[0]["params"].append(params[0])


def in_two_groups(opt, params):
    opt.param_groups[1]["params"].append(params[0])


def over_the_same_memory(opt, params):
    opt.param_groups[0]["params"].append(nn.Parameter(params[0].detach()))


def a_generator(opt, params):
    opt.param_groups[0]["params"] = (p for p in params[:3])


def an_iterator(opt, params):
    opt.param_groups[0]["params"] = iter(params[:3])


def one_tensor(opt, params):
    opt.param_groups[0]["params"] = params[0]


def nothing(opt, params):
    opt.param_groups[0]["params"] = None


def no_tensor(opt, params):
    opt.param_groups[0]["params"].append(("name", params[4]))


def complex_numbers(opt, params):
    opt.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.complex64)))


def result_of_a_computation(opt, params):
    opt.param_groups[0]["params"].append(2 * params[4])


def integers(opt, params):
    opt.param_groups[0]["params"].append(torch.ones(2, dtype=torch.int64))


def uninitialized(opt, params):
    opt.param_groups[0]["params"].append(nn.UninitializedParameter())


def no_params(opt, params):
    del opt.param_groups[0]["params"]


def a_group_without_rho(opt, params):
    opt.param_groups.append(dict(params=[params[4]], lr=0.1))


def a_group_without_anything(opt, params):
    opt.param_groups.insert(0, dict(params=[params[4]]))


def a_group_with_a_bad_rho(opt, params):
    opt.param_groups.append({**opt.param_groups[0], "params": [params[4]], "rho": -1.0})


def steps_that_are_none(opt, params):
    opt.param_groups[0]["sam_steps"] = None


def half_a_step(opt, params):
    opt.param_groups[1]["sam_steps"] = 2.5


def a_group_that_is_none(opt, params):
    opt.param_groups.append([params[4]])


def no_groups(opt, params):
    opt.param_groups.clear()


def groups_without_parameters(opt, params):
    for group in opt.param_groups:
        group["params"].clear()


REFUSED = {
    twice_in_a_group: "given twice", in_two_groups: "given twice",
    over_the_same_memory: "share memory", a_generator: "params.*generator",
    an_iterator: "params.*list_iterator", one_tensor: "params.*Parameter",
    nothing: "params.*NoneType", no_tensor: "tuple", complex_numbers: "complex64",
    result_of_a_computation: "of a computation", integers: "int64",
    uninitialized: "lazy", no_params: "'params'",
    a_group_without_rho: "'rho'", a_group_without_anything: "lacks",
    a_group_with_a_bad_rho: "rho=-1.0", a_group_that_is_none: "list",
    steps_that_are_none: "sam_steps=None", half_a_step: "sam_steps=2.5",
    no_groups: "no parameters", groups_without_parameters: "no parameters",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda f: f.__name__)
def test_groups_that_are_refused_change_no_weight_and_no_state(edit, backend):
    pair = Beside("sgd", backend)
    pair.step()
    side = pair.ours
    kept = [dict(group, params=list(group["params"])) for group in side.opt.param_groups]
    weights = [p.detach().clone() for p in side.params]
    state = {p: {k: x.clone() for k, x in s.items()} for p, s in side.opt.state.items()}
    edit(side.opt, side.params)
    for call in (side.opt.first_step, side.opt.step, side.opt.second_step):
        with pytest.raises(PhaseError if call == side.opt.second_step else ValueError,
                           match=None if call == side.opt.second_step else REFUSED[edit]):
            call()
        assert not side.opt.is_perturbed
        assert all(torch.equal(p, w) for p, w in zip(side.params, weights, strict=True))
    for p, entry in state.items():
        assert all(torch.equal(side.opt.state[p][name], x) for name, x in entry.items())
    side.opt.param_groups[:] = kept
    pair.step(2)


@pytest.mark.parametrize("edit", [append, replace, remove, reorder, reverse_groups, delete_a_group,
                                  append_a_whole_group, clear_a_group, move_to_another_group,
                                  no_groups, a_generator, add_param_group],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_groups_edited_while_perturbed_are_refused_and_restore_goes_back(edit, base):
    pair = Beside(base, "reference")
    pair.step()
    pair.climb()
    moved = [p.detach().clone() for p in pair.ours.params]
    kept = [dict(group, params=list(group["params"])) for group in pair.ours.opt.param_groups]
    if edit is add_param_group:
        with pytest.raises(PhaseError, match="perturbed"):
            edit(pair.ours.opt, pair.ours.params)
    else:
        edit(pair.ours.opt, pair.ours.params)
        pair.set(pair.ours, pair.gradients(3))
        with pytest.raises((PhaseError, ValueError), match="perturbed|params"):
            pair.ours.opt.step()
        assert pair.ours.opt.is_perturbed
        for p, w in zip(pair.ours.params, moved, strict=True):
            assert torch.equal(p, w)
    pair.restored()
    pair.ours.opt.param_groups[:] = kept
    pair.t = 9
    pair.step()


# ---- names


def test_names_that_do_not_keep_up_matter_only_where_names_decide():
    p, q, r = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    plain = SAM([("a.weight", p), ("b.weight", q)], torch.optim.SGD, lr=0.1)
    plain.param_groups[0]["params"].append(r)
    r.grad = torch.ones(2, 2)
    plain.step()
    close(r, torch.full((2, 2), 0.9), "r")
    asam = ASAM([("a.weight", p), ("b.weight", q)], torch.optim.SGD, scale="weights", lr=0.1)
    asam.param_groups[0]["params"].append(r)
    with pytest.raises(ValueError, match="param_names.*2 names.*3 parameters"):
        asam.first_step()
    asam.param_groups[0]["param_names"].append("c.weight")
    asam.first_step()
    asam.restore()


def named(name: str | None, backend: str) -> ASAM:
    p = nn.Parameter(torch.arange(1.0, 5.0))
    return ASAM([p if name is None else (name, p)], torch.optim.SGD, scale="weights", eta=0.1,
                rho=0.5, lr=0.1, backend=backend)


def radius(opt: ASAM) -> float:
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.full_like(p, 2.0)
    opt.first_step()
    opt.restore()
    return opt.last_radius


def test_names_that_are_loaded_edited_or_copied_decide_asams_scaling(backend):
    """By its name it is a weight, without one a vector is none."""
    weight, shift = (radius(named(name, backend)) for name in ("bn.weight", "bn.shift"))
    assert weight != pytest.approx(shift) and shift == pytest.approx(0.5)
    of_weight, loaded = named("bn.weight", backend), named(None, backend)
    loaded.load_state_dict(of_weight.state_dict())
    renamed = named("bn.weight", backend)
    radius(renamed)
    renamed.param_groups[0]["param_names"][0] = "bn.shift"
    nameless = named("bn.weight", backend)
    radius(nameless)
    del nameless.param_groups[0]["param_names"]
    for opt, expected in ((loaded, weight), (renamed, shift), (nameless, shift)):
        assert radius(opt) == radius(copy.deepcopy(opt)) == pytest.approx(expected)


# ---- the very dicts that the user passed in

OVER = {"sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
        "adamw": (torch.optim.AdamW, dict(lr=0.1)),
        "rmsprop": (torch.optim.RMSprop, dict(lr=0.1)),
        "adadelta": (torch.optim.Adadelta, dict(lr=0.1))}


def in_the_constructor(kind, hyper, groups):
    return SAM(groups, kind, rho=0.0, backend="reference", **hyper)


def in_wrap(kind, hyper, groups):
    return SAM.wrap(kind(groups, **hyper), rho=0.0, backend="reference")


@pytest.mark.parametrize("make", [in_the_constructor, in_wrap])
@pytest.mark.parametrize("base", OVER)
def test_groups_are_the_dicts_that_were_given(base, make):
    """As torch's: filled in, with their parameters in a list, and followed when they are edited."""
    kind, hyper = OVER[base]
    sides = []
    for build in (make, lambda kind, hyper, groups: kind(groups, **hyper)):
        params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        dicts = [{"params": iter(params[:1]), "lr": 0.2}, {"params": params[1]},
                 {"params": iter(params[2:])}]
        opt = build(kind, hyper, iter(dicts[:2]))
        opt.add_param_group(dicts[2])
        assert all(x is y for x, y in zip(opt.param_groups, dicts, strict=True))
        sides.append((params, dicts, opt))
    (params, dicts, opt), (theirs, their_dicts, alone) = sides
    for mine, torchs in zip(dicts, their_dicts, strict=True):
        assert type(mine["params"]) is list and torchs.keys() <= mine.keys()
    for i in range(3):
        for group in (dicts[i], their_dicts[i]):
            group["lr"] = 0.5 + i
        for p in (*params, *theirs):
            p.grad = torch.full((2,), 1.0 + i)
        opt.step()
        alone.step()
        for p, q in zip(params, theirs, strict=True):
            close(p, q, base)


@pytest.mark.parametrize("base", OVER)
@pytest.mark.parametrize("bad", [dict(rho=-1.0), dict(lr=-1.0), dict(backend="none")])
def test_dicts_of_a_failed_construction_are_as_they_were(base, bad):
    """So that the right values, given after it, are not those of the failure."""
    kind, hyper = OVER[base]
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [("p", p)], "lr": 0.2, "adaptive": True}, {"params": iter([("q", q)])}]
    with pytest.raises(ValueError, match=r"rho|lr|learning rate|backend"):
        SAM(groups, kind, **{**hyper, **bad})
    values = [{k: x for k, x in group.items() if not k.startswith("param")} for group in groups]
    assert values == [{"lr": 0.2, "adaptive": True}, {}]
    opt = SAM(groups, kind, rho=0.3, **hyper)
    assert [group["rho"] for group in opt.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("base", OVER)
def test_a_base_whose_wrapping_fails_is_as_it_was(base):
    kind, hyper = OVER[base]
    alone = kind([nn.Parameter(torch.ones(2))], **hyper)
    before = dict(alone.param_groups[0])
    with pytest.raises(ValueError, match="backend"):
        FriendlySAM.wrap(alone, rho=0.3, backend="none")
    assert alone.param_groups == [before] and not alone.state


@pytest.mark.parametrize("base", OVER)
@pytest.mark.parametrize("bad", [
    lambda p: dict(rho=-1.0), lambda p: dict(params=[p]),
    lambda p: dict(params=[torch.ones(2, dtype=torch.int64)])], ids=["rho", "twice", "integers"])
def test_a_group_that_cannot_be_added_is_as_it_was(base, bad):
    kind, hyper = OVER[base]
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = SAM([p], kind, rho=0.3, **hyper)
    mine = dict(opt.param_groups[0])
    group = {"params": [q], "lr": 0.2, **bad(p)}
    before = dict(group)
    with pytest.raises(ValueError, match="rho|more than one|int64"):
        opt.add_param_group(group)
    assert group == before and opt.param_groups == [mine]
    with pytest.raises(TypeError, match="list"):
        opt.add_param_group([q])
    group.update(params=[q], rho=0.1)
    opt.add_param_group(group)
    assert opt.param_groups[1] is group and group["rho"] == 0.1


@pytest.mark.parametrize("base", OVER)
def test_a_group_is_added_to_groups_that_were_replaced(base):
    kind, hyper = OVER[base]
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = SAM([p], kind, **hyper)
    opt.param_groups = [dict(group) for group in opt.param_groups]
    opt.add_param_group({"params": [q]})
    assert [group["params"] for group in opt.param_groups] == [[p], [q]]


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("base", OVER)
def test_groups_that_are_all_new_go_on_with_the_count_of_steps(base, loaded):
    kind, hyper = OVER[base]

    def build():
        p = nn.Parameter(torch.ones(2))
        return p, SAM([p], kind, start=2, interval=2, **hyper)

    p, opt = build()
    for _ in range(3):
        p.grad = torch.ones(2)
        opt.step()
    if loaded:
        state = opt.state_dict()
        p, opt = build()
        opt.load_state_dict(state)
    opt.param_groups.clear()
    opt.state.clear()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.param_groups[0]["sam_steps"] == 3 and not opt.climbs_next


class Copies(torch.optim.SGD):
    """Keeps dicts of its own, as some bases of other people's do."""

    def __init__(self, params, **hyper):
        super().__init__([dict(group) for group in params], **hyper)

    def add_param_group(self, param_group):
        super().add_param_group(dict(param_group))


def test_dicts_that_a_base_does_not_keep_are_left_alone():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups, more = [{"params": [p], "rho": 0.2}], {"params": [q], "rho": 0.3}
    opt = SAM(groups, Copies, lr=0.1)
    opt.add_param_group(more)
    assert groups == [{"params": [p], "rho": 0.2}] and more == {"params": [q], "rho": 0.3}
    assert [group["rho"] for group in opt.param_groups] == [0.2, 0.3]


def climbs(opt: SAM, steps: int) -> list[bool]:
    """Whether each of these steps climbed."""
    found = []
    for _ in range(steps):
        found.append(opt.climbs_next)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        if opt.climbs_next:
            opt.first_step()
        opt.step()
    return found


@pytest.mark.filterwarnings("ignore:10 steps without a climb")
def test_optimizers_that_are_given_the_same_dict_count_their_own_steps():
    """One after the other, at once, and added to another."""
    group = {"params": [nn.Parameter(torch.ones(3))]}
    first = SAM([group], torch.optim.SGD, lr=0.01, start=3)
    assert climbs(first, 5) == [False, False, False, True, True]
    assert climbs(SAM([group], torch.optim.SGD, lr=0.01, start=3), 4) == [False, False, False, True]
    group = {"params": [nn.Parameter(torch.ones(3))]}
    two = [SAM([group], torch.optim.SGD, lr=0.01, interval=2) for _ in range(2)]
    for i in range(4):
        assert [climbs(opt, 1) for opt in two] == [[i % 2 == 0]] * 2
    other = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.01)
    other.add_param_group(group)
    assert [x["sam_steps"] for x in (*two[0].param_groups, *other.param_groups)] == [4, 0, 0]
    mixed = SAM([{"params": [nn.Parameter(torch.ones(2))]}, group], torch.optim.SGD, lr=0.01,
                start=2)
    assert climbs(mixed, 3) == [False, False, True]


def test_a_list_of_parameters_that_is_a_module_is_a_list():
    params = nn.ParameterList([torch.ones(2), torch.ones(3)])
    opt = SAM(params, torch.optim.SGD, lr=0.1)
    assert all(p is q for p, q in zip(opt.param_groups[0]["params"], params, strict=True))
    with pytest.raises(TypeError, match="pass its parameters"):
        SAM(nn.Linear(2, 2), torch.optim.SGD, lr=0.1)

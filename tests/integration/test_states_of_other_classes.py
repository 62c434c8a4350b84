"""A state of one class in another: the base's part goes along, and nothing is taken for what it is
not because it has the same place or the same name."""

import copy

import pytest
import torch
from torch import nn

from fastsam import (
    ASAM,
    GSAM,
    SAM,
    FisherSAM,
    FriendlySAM,
    FullGradientSAM,
    LookSAM,
    MomentumSAM,
)

SGD = dict(lr=0.1, momentum=0.9)
OWN = {  # the classes that keep a buffer of their own, under its name
    "ema": lambda ps, base, **how: FriendlySAM(ps, base, **how),
    "full_gradient": lambda ps, base, **how: FullGradientSAM(ps, base, "full", **how),
    "g_v": lambda ps, base, **how: LookSAM(ps, base, k=1, **how),
}


def begins_anew(mine, entry) -> bool:
    """A full gradient is not there until it is given; the others begin at 0."""
    return mine not in entry if mine == "full_gradient" else not entry[mine].any()


def trained(make, base=torch.optim.SGD, **hyper):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    opt = make(net.parameters(), base, **(hyper or SGD))
    if isinstance(opt, FullGradientSAM):
        opt.set_full_gradient([torch.ones_like(p) for p in net.parameters()])

    def closure():
        loss = net(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    return opt


@pytest.mark.parametrize("theirs, mine", [(a, b) for a in OWN for b in OWN if a != b])
def test_another_class_s_buffer_is_refused_by_name(theirs, mine):
    saved, opt = trained(OWN[theirs]).state_dict(), trained(OWN[mine])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=f"has {theirs!r}.*keeps {mine!r}"):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    for i, entry in before["state"].items():
        assert all(torch.equal(x, after["state"][i][k]) for k, x in entry.items())
    for entry in saved["state"].values():
        del entry[theirs]
    opt.load_state_dict(saved)  # the way out: begins anew
    assert all(begins_anew(mine, entry) for entry in opt.state_dict()["state"].values())
    for i, entry in saved["state"].items():
        assert torch.equal(opt.state_dict()["state"][i]["momentum_buffer"],
                           entry["momentum_buffer"])


@pytest.mark.parametrize("theirs, mine", [("ema", "full_gradient"), ("full_gradient", "ema")])
def test_nor_is_it_beside_a_base_that_is_not_fused(theirs, mine):
    rmsprop = dict(lr=0.01)
    saved = trained(OWN[theirs], torch.optim.RMSprop, **rmsprop).state_dict()
    with pytest.raises(ValueError, match=f"has 'sam_{theirs}'.*keeps {mine!r}"):
        trained(OWN[mine], torch.optim.RMSprop, **rmsprop).load_state_dict(saved)


@pytest.mark.parametrize("mine", OWN)
def test_the_state_of_a_class_without_one_begins_it_anew(mine):
    opt = trained(OWN[mine])
    saved = trained(SAM).state_dict()
    opt.load_state_dict(saved)
    for i, entry in opt.state_dict()["state"].items():
        assert begins_anew(mine, entry)
        assert torch.equal(entry["momentum_buffer"], saved["state"][i]["momentum_buffer"])


@pytest.mark.parametrize("theirs", OWN)
@pytest.mark.parametrize("cls", [SAM, ASAM, GSAM, MomentumSAM])
def test_a_class_without_one_takes_the_base_s_part(cls, theirs):
    opt, saved = trained(cls), trained(OWN[theirs]).state_dict()
    if cls is GSAM and theirs == "g_v":
        saved["param_groups"][0].pop("alpha")
    opt.load_state_dict(saved)
    for i, entry in opt.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], saved["state"][i]["momentum_buffer"])


def test_an_edited_state_is_held_to_the_same():
    opt = trained(OWN["g_v"])
    p = opt.param_groups[0]["params"][0]
    opt.state[p] = {"ema": torch.ones_like(p)}
    with pytest.raises(ValueError, match="has 'ema'.*keeps 'g_v'"):
        opt.first_step()


def test_the_published_f_sam_s_average_is_no_g_v():
    saved = trained(SAM).state_dict()
    for entry, p in zip(saved["state"].values(), (torch.ones(2, 3), torch.ones(2)), strict=True):
        entry.update(old_p=p, momentum=p)
    trained(OWN["ema"]).load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match="has 'momentum'.*keeps 'g_v'"):
        trained(OWN["g_v"]).load_state_dict(saved)


# ---- group keys of one name


@pytest.mark.parametrize("theirs, mine, key, own", [
    (lambda ps, base, **how: ASAM(ps, base, scale="weights", eta=0.02, **how), FisherSAM, "eta",
     1.0),
    (FisherSAM, lambda ps, base, **how: ASAM(ps, base, scale="weights", **how), "eta", 0.01),
    (lambda ps, base, **how: GSAM(ps, base, alpha=0.3, **how), LookSAM, "alpha", 0.7),
    (lambda ps, base, **how: LookSAM(ps, base, alpha=0.6, **how), GSAM, "alpha", 0.4),
], ids=["asam-fisher", "fisher-asam", "gsam-looksam", "looksam-gsam"])
def test_a_key_that_means_something_else_is_refused_by_name(theirs, mine, key, own):
    saved, opt = trained(theirs).state_dict(), trained(mine)
    with pytest.raises(ValueError, match=f"{key}=.*another class"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0][key] == own
    for group in saved["param_groups"]:
        del group[key]
    opt.load_state_dict(saved)
    assert opt.param_groups[0][key] == own


@pytest.mark.parametrize("make", [
    *OWN.values(), SAM, GSAM, MomentumSAM, FisherSAM, ASAM,
    lambda ps, base, **how: ASAM(ps, base, scale="weights", **how)])
def test_every_class_takes_its_own(make):
    saved = copy.deepcopy(trained(make).state_dict())
    trained(make).load_state_dict(saved)

"""What frameworks do to an optimizer: share its attributes, reuse its gradients' memory, call it
with closures that do nothing."""

import copy

import pytest
import torch

from fastsam import SAM, FullGradientSAM, PhaseError


def one(lr: float = 0.5):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return p, SAM([p], torch.optim.SGD, 0.1, lr=lr)


def test_a_wrapper_with_copied_attributes_shares_the_phase():
    """Lightning's wrapper is a subclass whose instances get the optimizer's __dict__."""
    p, opt = one()
    wrapper = object.__new__(type("Wrapped", (SAM,), {}))
    wrapper.__dict__ = {k: x for k, x in opt.__dict__.items() if k != "step"}
    p.grad = torch.tensor([3.0, 4.0])
    wrapper.first_step(zero_grad=True)
    assert opt.is_perturbed and wrapper.is_perturbed
    with pytest.raises(PhaseError):
        opt.first_step()
    p.grad = torch.tensor([1.0, -2.0])
    opt.second_step()
    assert not wrapper.is_perturbed
    assert torch.equal(p.detach(), torch.tensor([0.5, 3.0]))


def test_gradients_set_aside_survive_the_reuse_of_their_memory():
    """DistributedDataParallel's gradients are views of buckets that the next pass overwrites."""
    p, opt = one(lr=1.0)
    bucket = torch.empty(4)
    for first, second in (([3.0, 4.0], [0.1, 0.2]), ([4.0, -3.0], [0.3, 0.5])):
        p.grad = torch.tensor(first)
        opt.first_step(zero_grad=True)
        p.grad = bucket[1:3].copy_(torch.tensor(second))
        opt.stash_grad()
    bucket.fill_(7.0)
    opt.unstash_grad()
    torch.testing.assert_close(p.grad, torch.tensor([0.4, 0.7]))
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.6, 1.3]))


@pytest.mark.parametrize("kind", ["one buffer", "one tensor", "repeated", "the weights"])
def test_gradients_set_aside_are_copies(kind):
    """A static buffer, as for CUDA graphs; one tensor as two parameters' gradient; one number seen
    three times; and a gradient in the memory of the weights, which go back."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = SAM([p, q], torch.optim.SGD, rho=2.0, lr=1.0)
    static = torch.empty(3)
    for x in (1.0, 2.0):
        p.grad, q.grad = torch.ones(3), None
        opt.first_step(zero_grad=True)
        moved = p.detach().clone()
        if kind == "one buffer":
            p.grad = static.fill_(x)
        elif kind == "one tensor":
            p.grad = q.grad = torch.full((3,), x)
        elif kind == "repeated":
            p.grad = torch.tensor([x]).expand(3)
        else:
            p.grad = p.data
        opt.stash_grad()
    static.fill_(7.0)
    opt.unstash_grad()
    total = 2 * moved if kind == "the weights" else torch.full((3,), 3.0)
    assert moved.all() and torch.equal(p.grad, total)
    assert q.grad is None if kind != "one tensor" else torch.equal(q.grad, total)
    opt.step()
    assert torch.equal(p, -total)


def test_a_parameter_that_left_the_groups_gets_its_gradient_back_and_no_step():
    """As in torch, where a gradient stays with its parameter; a new one has none."""
    p, q, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = SAM([p, q], torch.optim.SGD, lr=0.5)
    for _ in range(2):
        p.grad, q.grad = torch.ones(3), torch.full((3,), 2.0)
        opt.first_step()
        opt.stash_grad()
    opt.param_groups[0]["params"][1] = new
    opt.unstash_grad()
    assert torch.equal(q.grad, torch.full((3,), 4.0)) and new.grad is None
    opt.step()
    assert [x.tolist() for x in (p, q, new)] == [[0.0] * 3, [1.0] * 3, [1.0] * 3]


def test_gradients_set_aside_of_a_model_that_was_converted_are_refused():
    p, opt = one()
    q = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group(dict(params=[q]))
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    opt.stash_grad()
    q.data = torch.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(2,\).* of shape \(3,\).*restore"):
            opt.unstash_grad()
        assert p.grad is None
    q.data = torch.ones(2)
    opt.unstash_grad()
    opt.step()
    assert torch.equal(q.detach(), torch.tensor([0.5, 0.5]))


def test_what_a_step_must_not_be_in_the_middle_of_leaves_the_gradients_set_aside():
    p, opt = one()
    state = opt.state_dict()
    p.grad = torch.ones(2)
    opt.stash_grad()
    for call in (lambda: opt.load_state_dict(state), opt.state_dict, lambda: copy.deepcopy(opt),
                 lambda: opt.step(lambda: pytest.fail("a pass"))):
        with pytest.raises(PhaseError, match=r"with gradients set aside: .*restore\(\)"):
            call()
    opt.unstash_grad()
    opt.step()
    assert torch.equal(p.detach(), torch.tensor([0.5, 1.5]))
    opt.load_state_dict(state)


def test_gradients_that_cannot_be_set_aside_give_the_step_up():
    """Out of memory, say, with some of them set aside: none is then, and the weights are back."""
    p, opt = one()
    q = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group(dict(params=[q]))

    class Full(torch.Tensor):
        def clone(self, **how):
            raise torch.OutOfMemoryError("(pretended)")

    before = p.detach().clone()
    p.grad = torch.ones(2)
    opt.first_step(zero_grad=True)
    p.grad, q.grad = torch.ones(2), torch.ones(2).as_subclass(Full)
    with pytest.raises(torch.OutOfMemoryError):
        opt.stash_grad()
    assert not opt.is_perturbed and torch.equal(p.detach(), before)
    with pytest.raises(PhaseError, match="nothing set aside"):
        opt.unstash_grad()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("size", [0, 4])
def test_a_gradient_that_was_freed_is_not_set_aside(size, perturbed, base):
    """Reading it would end the process. It comes last: the first is not set aside either."""
    ps = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = SAM(ps, base, lr=0.5)
    for freed in (False, True):
        for p in ps:
            p.grad = torch.ones(2)
        if perturbed:
            opt.first_step()
        if freed:
            ps[1].grad.untyped_storage().resize_(size)
            with pytest.raises(ValueError, match=r"\(2,\) has lost its memory.*zero_grad"):
                opt.stash_grad()
        else:
            opt.stash_grad()
    assert not opt.is_perturbed and all(torch.equal(p, torch.ones(2)) for p in ps)
    assert torch.equal(ps[0].grad, torch.ones(2))
    with pytest.raises(PhaseError, match="nothing set aside"):
        opt.unstash_grad()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_sparse_gradients_are_set_aside_as_they_are(base):
    p, g = torch.nn.Parameter(torch.ones(2)), torch.tensor([0.0, 2.0])
    opt = SAM([p], base, lr=0.5)
    p.grad = g.to_sparse()
    opt.stash_grad()
    opt.unstash_grad()
    assert torch.equal(p.grad.to_dense(), g)


@pytest.mark.parametrize("way", ["given", "in .grad", "measured"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_full_gradient_that_was_freed_is_refused(base, way):
    ps = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = FullGradientSAM(ps, base, part="full", lr=0.5)
    opt.set_full_gradient([torch.ones(2), torch.ones(2)])
    for p in ps:
        p.grad = torch.full((2,), 3.0)
    opt.step()
    before = copy.deepcopy(opt.state_dict()["state"])
    gradients = [torch.zeros(2), torch.zeros(2)]
    gradients[1].untyped_storage().resize_(0)

    def loss(batch):
        for p, g in zip(ps, gradients, strict=True):
            p.register_post_accumulate_grad_hook(lambda p, g=g: setattr(p, "grad", g))
        return sum(p.sum() for p in ps), 1

    with pytest.raises(ValueError, match=r"\(2,\) has lost its memory.*zero_grad"):
        if way == "measured":
            opt.measure_full_gradient([1], loss)
        elif way == "given":
            opt.set_full_gradient(gradients)
        else:
            for p, g in zip(ps, gradients, strict=True):
                p.grad = g
            opt.set_full_gradient()
    now = opt.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(now[i][name]))
               for i, entry in before.items() for name, x in entry.items())


def test_a_closure_that_does_nothing_is_noticed():
    p, opt = one()
    p.grad = torch.tensor([3.0, 4.0])
    with pytest.warns(UserWarning, match="the closure left no gradients"):
        opt.step(lambda: None)
    opt.step(lambda: None)  # nothing was lost here

"""What frameworks do to an optimizer: share its attributes, reuse its gradients' memory, call it
with closures that do nothing."""

import pytest
import torch

from fastsam import SAM, PhaseError


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


def test_a_closure_that_does_nothing_is_noticed():
    p, opt = one()
    p.grad = torch.tensor([3.0, 4.0])
    with pytest.warns(UserWarning, match="the closure left no gradients"):
        opt.step(lambda: None)
    opt.step(lambda: None)  # nothing was lost here

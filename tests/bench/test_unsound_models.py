"""Networks whose numbers would be too good, and what cannot be evaluated at all."""

import pytest
import torch
from torch import nn

from bench.attacks.by_name import attempt
from bench.attacks.pgd import evaluation_attack
from bench.data.datasets import Split
from bench.evaluation import masked_gradients
from bench.evaluation.evaluate import correct, evaluate, report, robust, withstand

from ..helpers.trained import EPS, evaluation, model

# ---- warnings


class Behind(nn.Module):
    """The trained model, and what happens to its logits."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = model(), change

    def forward(self, x):
        return self.change(self.net(x))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda z: 1e4 * z, "the gradient is exactly 0 for"),
        (lambda z: 6 * z, "cross-entropy's gradient is below 1e-10 for"),
        (lambda z: z + 0.01 * torch.randn_like(z), "the model is random"),
        (lambda z: z.softmax(1), "look like probabilities"),
        (lambda z: 10 * (6 * z).softmax(1) - 3, "look like scaled or shifted probabilities"),
        (lambda z: z.sigmoid(), "all lie in [0, 1], as sigmoids do"),
        (lambda z: 5 * (3 * z).tanh(), "as if it had a bound"),
        (lambda z: z.clamp(max=2), "as if it had a bound"),
        (lambda z: z.log_softmax(1) + 5, "log-probabilities that were shifted or cut off"),
        (lambda z: (z.softmax(1) + 1e-3).log(), "log-probabilities that were shifted or cut off"),
        (lambda z: (3 * z).softmax(1).clamp(1e-6).log(), "that were shifted or cut off"),
        (lambda z: z.round() + 0 * z, "the gradient is exactly 0 for 128 of 128 images"),
        (lambda z: z.detach() + 1e-41 * z, "the gradient is 0 or too small for float32 for 128"),
    ],
    ids=["saturated", "sure", "random", "softmax", "affine", "sigmoid", "tanh", "clamped",
         "shifted", "raised", "floored", "rounded", "denormal"],
)  # fmt: skip
def test_a_model_that_hides_its_gradients_is_noticed(split, change, said):
    torch.manual_seed(0)
    x, y = split.batch(slice(0, 128))
    assert any(said in text for text in masked_gradients.of_model(Behind(change), x, y))
    found = evaluate(Behind(change), split, evaluation(samples=128))
    assert any(line.startswith("warning: ") and said in line for line in report(found).split("\n"))


def test_a_gradient_that_vanishes_on_the_way_is_noticed(split):
    """The network is itself at the images, and flat wherever an attack goes."""
    x, _ = split.batch(slice(0, 60))

    class Flat(nn.Module):
        def forward(self, z):
            clean = (z.detach()[:, None] == x).flatten(2).all(2).any(1, keepdim=True)
            logits = model()(z)
            return torch.where(clean, logits, logits.detach() + 0 * logits)

    part = split.take(torch.arange(60))
    found = evaluate(Flat(), part, evaluation(attacks=("pgd-4", "apgd-ce-4")))
    for name in ("pgd-4", "apgd-ce-4"):
        said = f"l_inf 16/255 {name}: where it ended, the gradient is exactly 0 for "
        assert any(text.startswith(said) for text in found["warnings"]), name
    assert not any("cannot move" in text for text in found["warnings"])
    assert evaluate(model(), part, evaluation(attacks=("pgd-4", "apgd-ce-4")))["warnings"] == []


class Misled(torch.autograd.Function):
    """The images, with another gradient than theirs."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


@pytest.mark.parametrize("name, change", [
    ("fgsm", torch.neg), ("pgd-4", torch.neg), ("apgd-ce-4", torch.neg),
    ("fgsm", lambda g: g.flip(0, 2, 3)), ("pgd-4", lambda g: g.flip(0, 2, 3)),
    ("fgsm", torch.randn_like), ("pgd-4", torch.randn_like),
])  # fmt: skip
def test_a_gradient_that_is_not_the_outputs_is_noticed(split, name, change):
    (text,) = evaluate(misled(change), split, evaluation(attacks=(name,)))["warnings"]
    assert text.startswith(f"l_inf 16/255 {name}: where it ended, the model is surer of the label")


@pytest.mark.parametrize("name, change", [
    ("apgd-ce-4", torch.randn_like), ("apgd-ce-4", lambda g: g.flip(0, 2, 3)),
    ("apgd-ce-20", torch.randn_like), ("apgd-t-4", torch.randn_like), ("apgd-t-4", torch.neg),
])  # fmt: skip
@pytest.mark.parametrize("norm, eps, at", [
    ("linf", 8 / 255, "l_inf 8/255"), ("l2", 1.0, "l2 255/255"),
])  # fmt: skip
def test_it_is_where_an_attack_returns_to_its_best_point(split, name, change, norm, eps, at):
    """Auto-PGD ends above where it began by noise, too."""
    given = {"linf": (), norm: (eps,), "attacks": (name,)}
    (text,) = evaluate(misled(change), split, evaluation(**given))["warnings"]
    assert text.startswith(f"{at} {name}: a step along the gradient leaves the model surer of the")


def misled(change):
    class Other(nn.Module):
        def forward(self, x):
            return model()(Misled.apply(x, change))

    torch.manual_seed(0)
    return Other()


@pytest.mark.parametrize("eps", [1e-8, 1e-4, 16 / 255, 0.25])
def test_a_gradient_that_is_about_the_outputs_is_not_warned_of(split, eps):
    """A straight-through gradient through rounding, and coarse outputs: attacks do climb."""
    class Through(nn.Module):
        def forward(self, x):
            return model()(x + ((x * 64).round() / 64 - x).detach())

    split, attacks = split.take(torch.arange(60)), ("fgsm", "pgd-10", "apgd-ce-4", "apgd-t-2")
    for net in (model(), Through(), Behind(lambda z: z.bfloat16()), Behind(lambda z: 20 * z)):
        found = evaluate(net, split, evaluation(linf=(eps,), l2=(4 * eps,), attacks=attacks))
        assert not any("surer" in text for text in found["warnings"]), net


@pytest.mark.parametrize("n, warned", [(19, False), (20, True)])
def test_a_few_fallen_images_are_no_sign(n, warned):
    """A step that is too long may lead down, in a small network at a large radius."""
    x, y = torch.rand(n, 3), torch.zeros(n, dtype=torch.int64)
    surer = x + torch.tensor([9.0, 0.0, 0.0])
    said = masked_gradients.of_ascent("here", nn.Identity(), [(surer, y, x)])
    assert bool(said) == warned


def test_a_sound_model_is_not_warned_of(split):
    assert masked_gradients.of_model(model(), *split.batch(slice(None))) == []
    for fine in (lambda z: z.log_softmax(1), lambda z: z - z.mean(1, keepdim=True),
                 lambda z: z / 50, lambda z: z + 7, lambda z: z[:, :3], lambda z: z - 1e3):
        x, y = split.batch(slice(None))
        assert masked_gradients.of_model(Behind(fine), x, y.clamp(max=2)) == [], fine


@pytest.mark.parametrize("fine", [
    lambda z: 1e-3 * z, lambda z: 1e-30 * z, lambda z: 1e-3 * (z - z.mean(1, keepdim=True)),
    lambda z: (1e-3 * z).half(), lambda z: z.bfloat16(),
])  # fmt: skip
def test_logits_that_are_small_or_coarse_are_still_logits(split, fine):
    said = masked_gradients.of_model(Behind(fine), *split.batch(slice(None)))
    assert not any("look like" in text or "batch" in text for text in said), said


@pytest.mark.parametrize("off", [-1e9, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("classes", [1, 90])
def test_classes_that_are_switched_off_are_not_looked_at(split, off, classes):
    """By them the outputs seemed to have a bound, and none of their differences any size."""
    x, y = split.batch(slice(0, 128))

    def beside(change):
        return Behind(lambda z: torch.cat([change(z), z.new_full((len(z), classes), off)], 1))

    assert masked_gradients.of_model(beside(lambda z: z), x, y) == []
    torch.manual_seed(0)
    for change, said in ((lambda z: z + 0.01 * torch.randn_like(z), "random"),
                         (lambda z: z.softmax(1), "look like probabilities"),
                         (lambda z: z.clamp(max=2), "as if it had a bound")):  # fmt: skip
        assert said in masked_gradients.of_model(beside(change), x, y)[-1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_few_images_are_no_sign(split, number):
    for start in range(10):
        x, y = split.batch(slice(start, start + number))
        assert masked_gradients.of_model(model(), x, y) == []


class OfBatches(nn.Module):
    """Normalises by the batch's own statistics, whatever mode it is in."""

    def __init__(self, norm):
        super().__init__()
        self.net, self.norm = model(), norm

    def train(self, mode=True):
        return self

    def forward(self, x):
        return self.net(0.4 * self.norm(x) + 0.3)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(1),
                                  lambda: nn.BatchNorm2d(1, track_running_stats=False)])
@pytest.mark.parametrize("batch_size", [1, 2, 50, 500])
def test_answers_that_depend_on_the_batch_are_noticed(split, norm, batch_size):
    part = split.take(torch.arange(60))
    found = evaluate(OfBatches(norm()), part, evaluation(attacks=("clean",), batch_size=batch_size))
    assert any("batch that it comes in" in text for text in found["warnings"])
    assert evaluate(model(), part, evaluation(attacks=("clean",), batch_size=batch_size))[
        "warnings"] == []  # fmt: skip


# ---- networks and images that cannot be evaluated


@pytest.mark.parametrize("change", [
    lambda x: model()(x).detach(), lambda x: model()(x.detach()),
    lambda x: model()((x * 255).to(torch.uint8) / 255), lambda x: torch.eye(10)[[0] * len(x)],
], ids=["detached", "images detached", "bytes", "constant"])  # fmt: skip
@pytest.mark.parametrize("name", ["fgsm", "pgd-2", "apgd-ce-2", "apgd-t-2"])
def test_a_network_without_a_gradient_is_refused(split, change, name):
    class Cut(nn.Module):
        def forward(self, x):
            return change(x)

    part = split.take(torch.arange(20))
    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match="no gradient .* images"):
            evaluate(Cut(), part, evaluation(attacks=(name,), precision=precision))
    a = attempt(name, "linf", EPS, 10, 10)
    with pytest.raises(ValueError, match="no gradient .* images"):
        withstand(Cut().eval(), part, a.perturb, 1, 20)
    assert evaluate(Cut(), part, evaluation(attacks=("clean",)))["images"] == 20


@pytest.mark.parametrize("levels", [4, 15])
def test_images_outside_0_and_1_are_refused(split, levels):
    """An attack that starts by clamping them is an attack on other images."""
    part = Split(split.images, split.labels, levels)
    normalised = Split((split.images.float() / 16 - 0.3) / 0.38, split.labels, 1)
    for images in (part, normalised):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            evaluate(model(), images, evaluation())
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            correct(model(), images, 100)


@pytest.mark.parametrize("change, said", [
    (lambda z: (z, z), "tuple"), (lambda z: {"logits": z}, "dict"),
    (lambda z: z[:, :, None, None], r"\(100, 10, 1, 1\)"), (lambda z: z[:, 0], r"\(100,\)"),
    (lambda z: z[:, :1], r"\(100, 1\)"), (lambda z: z[:1], r"\(1, 10\)"),
    (lambda z: z.long(), "int64"),
])  # fmt: skip
def test_outputs_that_are_no_logits_of_every_image_are_refused(split, change, said):
    with pytest.raises(ValueError, match=said):
        correct(Behind(change).eval(), split, 100)


def test_a_random_model_is_not_said_to_mislead(split):
    """Its outputs differ from pass to pass by more than a small radius moves them."""
    class Noisy(nn.Module):
        def forward(self, x):
            return model()(x + 0.05 * torch.randn_like(x))

    torch.manual_seed(0)
    attacks = ("fgsm", "pgd-4", "apgd-ce-4", "apgd-t-2")
    found = evaluate(Noisy(), split, evaluation(linf=(1 / 255,), l2=(0.2,), attacks=attacks))
    assert any("random" in text for text in found["warnings"])
    assert not any("surer" in text for text in found["warnings"])


@pytest.mark.parametrize("change, said", [
    (lambda y: y + 1, "from 1 to 10, and the model has 10 classes"), (lambda y: y - 1, "from -1"),
    (lambda y: y[:, None], r", 1\) of"), (lambda y: nn.functional.one_hot(y), r", 10\) of"),
    (lambda y: y.int(), "int32"), (lambda y: y.float(), "float32"),
], ids=["from 1", "ignored", "column", "one-hot", "int32", "float"])  # fmt: skip
def test_labels_that_are_no_classes_of_the_model_are_refused(split, change, said):
    """None of them could be right, and -1 would be right where the logits are NaN."""
    part = Split(split.images[:60], change(split.labels[:60]), split.levels)
    for attacks in (("clean",), ("pgd",)):
        with pytest.raises(ValueError, match=said):
            evaluate(model(), part, evaluation(attacks=attacks))
    with pytest.raises(ValueError, match=said):
        correct(model(), part, 20)


@pytest.mark.parametrize("restarts, batch_size, said", [
    (0, 20, "restarts=0"), (-1, 20, "restarts=-1"), (1, 0, "batch_size=0"),
    (1, -20, "batch_size=-20"),
])  # fmt: skip
def test_an_attack_that_would_try_nothing_is_refused(split, restarts, batch_size, said):
    """All images withstood it."""
    a = attempt("pgd-2", "linf", EPS, 10, 10)
    with pytest.raises(ValueError, match=f"{said} .*at least 1"):
        withstand(model(), split, a.perturb, restarts, batch_size)
    if batch_size < 1:
        with pytest.raises(ValueError, match=f"{said} .*at least 1"):
            correct(model(), split, batch_size)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_an_attack_where_gradients_are_off_is_refused_without_blaming_the_model(split, off):
    a, part = attempt("pgd-2", "linf", EPS, 10, 10), split.take(torch.arange(20))
    for ask in (lambda: withstand(model(), part, a.perturb, 1, 20),
                lambda: evaluate(model(), part, evaluation())):  # fmt: skip
        with off(), pytest.raises(ValueError, match="^gradients are off .*no_grad.*outside of it"):
            ask()


@pytest.mark.parametrize("images, labels", [(60, 50), (50, 60), (60, 0)])
def test_as_many_labels_as_images_are_asked_for(split, images, labels):
    """Images without a label were left out where a batch ended there."""
    with pytest.raises(ValueError, match=f"{images} images and {labels} labels"):
        Split(split.images[:images], split.labels[:labels], 16)


def test_a_model_that_drops_the_batch_of_one_image_is_refused(split):
    for attacks in (("clean",), ("pgd",)):
        with pytest.raises(ValueError, match=r"of 1 images the model returns \(10,\)"):
            evaluate(Behind(lambda z: z.squeeze()), split, evaluation(attacks=attacks))


def test_a_model_that_changes_its_images_is_refused(split):
    """It was the images that were blamed, or left alone, and judged after they were changed."""
    class InPlace(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return model()(x.mul_(self.by))

    for by in (0.5, 3.0):
        with pytest.raises(ValueError, match="changes the images"):
            evaluate(InPlace(by), split, evaluation(attacks=("clean",)))


@pytest.mark.parametrize("ask", [
    lambda net, split: correct(net, split, 20),
    lambda net, split: withstand(net, split, attempt("fgsm", "linf", EPS, 1, 10).perturb, 1, 20),
    lambda net, split: robust(net, split, evaluation_attack("linf", EPS, 2), 20),
], ids=["correct", "withstand", "robust"])  # fmt: skip
def test_a_model_in_training_mode_is_refused(split, ask):
    """Its statistics moved with every batch of images, attacked ones too, and dropout was on."""
    part, norm = split.take(torch.arange(60)), nn.BatchNorm2d(1)
    net = nn.Sequential(norm, nn.Dropout(0.2), model())
    before = [t.clone() for t in norm.state_dict().values()]
    with pytest.raises(ValueError, match="training mode.*model.eval()"):
        ask(net, part)
    assert all(map(torch.equal, before, norm.state_dict().values())) and net.training
    ask(net.eval(), part)


def test_a_model_that_stays_in_training_mode_is_not_attacked(split):
    """Its clean accuracy is told, with a warning; attacks would move its statistics."""
    net, part = OfBatches(nn.BatchNorm2d(1)), split.take(torch.arange(60))
    with pytest.raises(ValueError, match="model.eval.* set its `training` to False"):
        evaluate(net, part, evaluation(attacks=("fgsm",)))
    net.training = False
    said = evaluate(net, part, evaluation(attacks=("fgsm",)))["warnings"]
    assert any("batch that it comes in" in text for text in said)


def test_a_function_has_no_mode(split):
    """As an exported program's, which cannot be put into eval mode."""
    part, attack = split.take(torch.arange(60)), attempt("pgd-2", "linf", EPS, 1, 10)
    program = torch.export.export(
        model(), (part.batch(slice(2))[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    own, exported = ([correct(net, part, 20), withstand(net, part, attack.perturb, 1, 20)[0]]
                     for net in (model(), lambda x: program(x)))  # fmt: skip
    assert all(map(torch.equal, own, exported))


def test_right_answers_are_counted_in_inference_mode_too(split):
    expected = correct(model(), split, 64)
    with torch.inference_mode():
        assert torch.equal(correct(model(), split, 64), expected)


def test_no_images_are_refused(split):
    with pytest.raises(ValueError, match="no images"):
        evaluate(model(), split.take(torch.arange(0)), evaluation())


def numbers(each=(), by_eps=(), images=1000):
    return {"images": images, "each": {"linf": {"8/255": dict(each)}},
            "robust": {"linf": dict(by_eps)}}  # fmt: skip


def test_numbers_that_contradict_each_other_are_noticed():
    said = masked_gradients.of_numbers(numbers({"fgsm": 0.3, "pgd-20": 0.4, "pgd": 0.5}))
    assert len(said) == 1 and "FGSM (30.00%) fools more images than PGD (40.00%)" in said[0]
    said = masked_gradients.of_numbers(numbers(by_eps={"16/255": 0.4, "8/255": 0.3, "2/255": 0.6}))
    assert len(said) == 1 and "40.00% at 16/255 and 30.00% at the smaller 8/255" in said[0]
    fine = {"fgsm": 0.396, "pgd-20": 0.4}
    assert masked_gradients.of_numbers(numbers(fine, {"8/255": 0.4, "16/255": 0.404})) == []
    one_image = numbers({"fgsm": 0.37, "pgd": 0.4}, images=30)
    assert masked_gradients.of_numbers(one_image) == []
    assert len(masked_gradients.of_numbers(numbers({"fgsm": 0.33, "pgd": 0.4}, images=30))) == 1

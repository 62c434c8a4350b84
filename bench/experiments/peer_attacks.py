"""Our attacks beside torchattacks', foolbox's, ART's and AutoAttack's, at equal budgets.

python -m bench.experiments.peer_attacks [--rows FILE], with `pip install -e ".[bench,peers]"`: a
small network on scikit-learn's digits, its logits as they are, times 6 (a network that is surer)
and times 1/20 (one that is less). Or `--checkpoint last.pt`: a network that `bench train` trained,
its logits as they are, on its own test images, at l_inf 1/255 and l2 32/255. Every tool gets the
same images, radius, step size and number of steps, one random start, and its own random numbers;
the network itself judges what comes out.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.attacks.apgd import apgd, apgd_targeted
from bench.attacks.objectives import answers
from bench.attacks.pgd import Attack, evaluation_attack, fgsm, pgd
from bench.evaluation.evaluate import shuffled
from bench.files import append_jsonl, refuse_unwritable
from bench.models import build_model
from bench.provenance import git_hash, package_version, stamp
from bench.reports.tables import markdown
from bench.settings.config import Config
from bench.training.checkpoint import changed_data, load_checkpoint, rebuild
from bench.training.train import data_of

FACTORS = (1.0, 6.0, 0.05)
RADII = {"linf": 16 / 255, "l2": 0.5}
SMALL = {"linf": 1 / 255, "l2": 32 / 255}  # where SAM's advantage lies
IMAGES = 1200  # that it learns from; the other 597 are attacked
NORMS = {"linf": "Linf", "l2": "L2"}
NAMES = ("fgsm", "pgd-10", "pgd-40", "apgd-ce-50", "apgd-t-20")
PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "autoattack": "pyautoattack",
            "art": "adversarial-robustness-toolbox"}  # fmt: skip

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(bunch.target).long()


def trained(x: Tensor, y: Tensor, epochs: int = 6) -> nn.Module:
    torch.manual_seed(0)
    net = build_model("smallconv", 8, 1, 10, [0.3], [0.38])
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(50):
            F.cross_entropy(net(x[index]), y[index]).backward()
            opt.step()
            opt.zero_grad()
    return net.eval()


def ours(norm: str, eps: float) -> dict[str, Run]:
    def start() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def pgd_of(steps: int) -> Run:
        return lambda net, x, y: pgd(net, x, y, evaluation_attack(norm, eps, steps), start())

    return {
        "fgsm": lambda net, x, y: fgsm(net, x, y, Attack(norm, eps, eps, 1)),
        "pgd-10": pgd_of(10),
        "pgd-40": pgd_of(40),
        "apgd-ce-50": lambda net, x, y: apgd(net, x, y, norm, eps, 50, None, start())[0],
        "apgd-t-20": lambda net, x, y: apgd_targeted(net, x, y, norm, eps, 20, start())[0],
    }


def torchattacks(norm: str, eps: float) -> dict[str, Run]:
    import torchattacks as them

    def pgd_of(steps: int) -> Run:
        pgd = {"linf": them.PGD, "l2": them.PGDL2}[norm]
        alpha = evaluation_attack(norm, eps, steps).alpha
        return lambda net, x, y: pgd(net, eps=eps, alpha=alpha, steps=steps)(x, y)

    one_step = {"fgsm": lambda net, x, y: them.FGSM(net, eps=eps)(x, y)} if norm == "linf" else {}
    options = {"norm": NORMS[norm], "eps": eps}
    return one_step | {
        "pgd-10": pgd_of(10),
        "pgd-40": pgd_of(40),
        "apgd-ce-50": lambda net, x, y: them.APGD(net, steps=50, **options)(x, y),
        "apgd-t-20": lambda net, x, y: them.APGDT(net, steps=20, **options)(x, y),
    }


def foolbox(norm: str, eps: float) -> dict[str, Run]:
    import foolbox as them

    attacks = them.attacks
    one_step = {"linf": attacks.LinfFastGradientAttack, "l2": attacks.L2FastGradientAttack}[norm]
    pgd, share = {"linf": (attacks.LinfPGD, 1 / 4), "l2": (attacks.L2PGD, 1 / 8)}[norm]

    def run(attack: Any) -> Run:
        def perturb(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return attack(them.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=eps)[1]

        return perturb

    return {
        "fgsm": run(one_step(random_start=False)),
        "pgd-10": run(pgd(rel_stepsize=share, steps=10)),
        "pgd-40": run(pgd(rel_stepsize=share, steps=40)),
    }


def art(norm: str, eps: float) -> dict[str, Run]:
    from art.attacks.evasion import (
        AutoProjectedGradientDescent,
        FastGradientMethod,
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import PyTorchClassifier

    ball = {"norm": {"linf": float("inf"), "l2": 2}[norm], "eps": eps, "batch_size": 1000}
    alpha = evaluation_attack(norm, eps, 1).alpha

    def run(attack: Callable, **options: Any) -> Run:
        def perturb(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            wrapped = PyTorchClassifier(
                net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
            )
            found = attack(wrapped, **ball, **options).generate(x.numpy(), y.numpy())
            return torch.from_numpy(found)

        return perturb

    pgd = {"eps_step": alpha, "num_random_init": 1, "verbose": False}
    return {
        "fgsm": run(FastGradientMethod, eps_step=eps),
        "pgd-10": run(ProjectedGradientDescentPyTorch, max_iter=10, **pgd),
        "pgd-40": run(ProjectedGradientDescentPyTorch, max_iter=40, **pgd),
        "apgd-ce-50": run(
            AutoProjectedGradientDescent, eps_step=2 * eps, max_iter=50, nb_random_init=1,
            loss_type="cross_entropy", verbose=False,
        ),
    }  # fmt: skip


def autoattack(norm: str, eps: float) -> dict[str, Run]:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    options = {"norm": NORMS[norm], "eps": eps, "seed": 0, "device": "cpu"}
    return {
        "apgd-ce-50": lambda net, x, y: APGDAttack(net, n_iter=50, **options).perturb(x, y),
        "apgd-t-20": lambda net, x, y: APGDAttack_targeted(net, n_iter=20, **options).perturb(x, y),
    }


TOOLS = {"fastsam": ours, "torchattacks": torchattacks, "foolbox": foolbox, "art": art,
         "autoattack": autoattack}  # fmt: skip


def on_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the small network, and images with labels that it has not seen."""
    x, y = digits()
    return trained(x[:IMAGES], y[:IMAGES]), x[IMAGES:], y[IMAGES:]


def of_checkpoint(path: Path) -> tuple[dict[str, Any], nn.Module, Tensor, Tensor]:
    """Return a trained network's settings, itself, and its own test images and labels, in the order
    in which `bench evaluate --n-examples` takes them. Raises ValueError where those are others by
    now, or of other than 10 classes, which not every tool takes."""
    checkpoint = load_checkpoint(path)
    config, classes = checkpoint["config"], len(checkpoint["classes"])
    if classes != 10:
        raise ValueError(f"{str(path)!r} knows {classes} classes: give a network of 10")
    data = data_of(Config(**config))
    if parts := changed_data(checkpoint, data):
        raise ValueError(f"the {parts} images are not those that {str(path)!r} was trained with; "
                         "restore them")  # fmt: skip
    return config, rebuild(checkpoint, path), *data.test.batch(shuffled(data.test))


def measure(
    net: nn.Module, x: Tensor, y: Tensor, radii: dict[str, float] = RADII,
    factors: tuple[float, ...] = FACTORS, names: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield a row an attack: which images of those that are right clean it leaves right.

    names: of the attacks; None: all. Raises ValueError for a network that is right on none."""
    with torch.no_grad():
        right = answers(net(x)) == y
    of, x, y = len(x), x[right], y[right]
    if not len(x):
        raise ValueError(f"the network is right on none of {of} images: nothing to attack")
    for factor, (norm, eps), tool in product(factors, radii.items(), TOOLS):
        scaled = Scaled(net, factor).eval()
        for name, perturb in TOOLS[tool](norm, eps).items():
            if names is not None and name not in names:
                continue
            torch.manual_seed(0)
            np.random.seed(0)  # ART's
            with redirect_stdout(sys.stderr):
                x_adv = perturb(scaled, x, y).detach()
            yield {
                "tool": tool, "attack": name, "norm": norm, "eps": eps, "factor": factor,
                "images": len(x), "of": of, "left": left(net, x, x_adv, y, norm, eps),
                "release": package_version(PACKAGES.get(tool, tool)),
            }  # fmt: skip


def left(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, norm: str, eps: float) -> int:
    """Return how many images stay right; raise ValueError where one has left the ball or the
    box."""
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    if size.max() > eps * (1 + 1e-4) or x_adv.min() < 0 or x_adv.max() > 1:
        raise ValueError(f"an image at {size.max():.4g} of {eps:.4g}: not the same budget")
    with torch.no_grad():
        return int((answers(net(x_adv)) == y).sum())


def by_attack(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float], dict[str, float]]:
    """Return (norm, attack, factor) -> tool -> the share of images left right."""
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for r in rows:
        own = found.setdefault((r["norm"], r["attack"], r["factor"]), {})
        own[r["tool"]] = r["left"] / r["images"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return images left right, in %: a line an attack and factor, a column a tool."""
    lines = []
    for (norm, attack, factor), own in by_attack(rows).items():
        cells = [f"{100 * own[tool]:.1f}" if tool in own else "" for tool in TOOLS]
        lines.append([norm, attack, f"{factor:g}", *cells])
    return markdown(["norm", "attack", "logits times", *TOOLS], lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.peer_attacks", description=__doc__
    )
    parser.add_argument("--rows", type=Path, help="append a row an attack to this JSONL file")
    parser.add_argument("--checkpoint", type=Path, help="of `bench train`, instead of the digits'")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--attacks", nargs="+", choices=NAMES, help="instead of all")
    options, git = parser.parse_args(), git_hash()
    try:
        rows = rows_of(options.checkpoint, options.images, options.attacks, options.rows)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(table(rows))
    if options.rows is not None:
        append_jsonl(options.rows, [row | stamp("cpu", git) for row in rows])


def rows_of(
    checkpoint: Path | None, images: int | None, names: list[str] | None, written: Path | None
) -> list[dict[str, Any]]:
    refuse_unwritable(written)
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    if checkpoint is None:
        refuse_missing()
        net, x, y = on_digits()
        return list(measure(net, x[:images], y[:images], names=names))
    config, net, x, y = of_checkpoint(checkpoint)
    refuse_missing()
    rows = list(measure(net, x[:images], y[:images], SMALL, (1.0,), names))
    print(f"{config['method']}, seed {config['seed']}, right on {rows[0]['images']} of "
          f"{rows[0]['of']} test images of {config['data']}\n")  # fmt: skip
    return [row | {"config": config} for row in rows]


def refuse_missing() -> None:
    """Raise ValueError where a peer is not installed."""
    if missing := [name for name in PACKAGES.values() if package_version(name) is None]:
        raise ValueError(f"{', '.join(missing)}: not installed; pip install -e '.[bench,peers]'")


if __name__ == "__main__":
    main()

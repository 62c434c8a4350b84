"""python -m bench train | compare | sweep | study | evaluate | recipes | unpack | step |
throughput | gpu | report | export | theory: the command line, in a checkout."""

import argparse
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

OPTIMIZERS = (
    "sgd, adamw, sam, asam, fishersam, fsam, fasam, sam-interval, sam-late, sam-part, sam-micro, "
    "sam-full, sam-noise, sam-db, sam-batches"
)
METHODS = f"{OPTIMIZERS}, at-linf, at-l2, fgsm-rs, n-fgsm, trades, or two of them as at-linf+sam"
PIPE_CLOSED = 128 + signal.SIGPIPE  # the exit code that shells give
SHOWN = ("train_loss", "train_acc", "val_acc")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of Config. Absent ones stay out of the namespace, so that presets fill them."""
    add = parser.add_argument
    add("--recipe", help="a published setting, such as sam-at/cifar10/sam-rho0.2, or a JSON file "
        "like those in bench/recipes; `python -m bench recipes` lists them")  # fmt: skip
    add(
        "--preset",
        default=None,
        help="the papers' values: sam-at-cifar10, sam-at-cifar100, "
        "fsam-cifar10, fsam-cifar100; ours: digits, cifar6k (default: by data)",
    )
    add("--augment", help="none, crop, or crop-flip; resized-crop reads photographs as needed")
    add("--pad", type=int, help="pixels that a crop can move")
    add("--padding", help="what surrounds the image: reflect or zero")
    add("--cutout", type=int, help="side of a square that half of the images lose; 0 for none")
    add("--normalisation", help="f-sam or imagenet (default: the data's own)")
    add("--val", type=float, help="fraction of the training images that chooses best.pt; 0: none, "
        "and the last epoch is the best")  # fmt: skip
    add("--label-noise", type=float, metavar="RATE", help="share of the training labels")
    add("--noise-kind", help="published (F-SAM's: redrawn, some to the right class) or true")
    add("--model", help="preactresnet18, resnet18, vgg16bn, wrn28-10, wrn28-10-fsam, "
        "pyramidnet110, airbench, airbench-relu, smallconv, resnet50, deit-small, "
        "torchvision:NAME, timm:NAME")  # fmt: skip
    add("--width", type=int, help="64: as published; others scale all channels (smallconv: the "
        "first layer's channels)")  # fmt: skip
    add("--weights", metavar="FILE", help="weights to start from: a checkpoint of this bench or a "
        "state_dict, of any number of classes")  # fmt: skip
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--optimizer", help=f"with an adversary, or --method standard: {OPTIMIZERS}")
    add("--base", help="the optimizer under SAM: sgd (default) or adamw")
    add("--lr", type=float, help="learning rate")
    add("--schedule", help="piecewise (x0.1 at 75%% and 90%% of the epochs), cosine or linear")
    add("--warmup", type=float, help="share of the steps in which the learning rate grows from 0")
    add("--momentum", type=float)
    add("--nesterov", action=argparse.BooleanOptionalAction)
    add("--weight-decay", type=float)
    add("--rho", type=float, help="SAM's radius")
    add("--sigma", type=float, help="F-SAM: how much of the gradient's average is removed")
    add("--lmbda", type=float, help="F-SAM: the average's decay, in [0, 1)")
    add("--convention", help="F-SAM: algorithm1 (the paper's, default) or official (the published "
        "code's, whose average starts at the first gradient)")  # fmt: skip
    add("--eta", type=float, help="ASAM: added to |w|; FisherSAM: weight of the Fisher diagonal")
    add("--interval", type=int, help="sam-interval: climb at every so-many-th step")
    add("--late", type=float, help="sam-late: share of the epochs before the first climb")
    add("--ascent-part", type=float, help="sam-part: share of the batch to climb from")
    add("--ascent-batches", type=int, help="sam-batches: of how many batches, this one among them, "
        "the gradient to climb by is")  # fmt: skip
    add("--full-every", type=int, help="sam-full, sam-noise: steps between full gradients")
    add("--projection", help="sam-full, sam-noise: cosine (as printed, default) or orthogonal")
    add("--micro", type=int, help="sam-micro: parts of the batch, each with a climb of its own")
    add("--scale", help="ASAM: all, or weights (the authors' form)")
    add("--eps", help="training attack's radius: 8/255, 8 (the same), or 0.031")
    add("--alpha", help="training attack's step, written like eps (default: the preset's share "
        "of eps)")  # fmt: skip
    add("--attack-steps", type=int)
    add(
        "--attack-bn",
        help="BatchNorm in the training attack: eval (default), train (batch statistics), or "
        "moving (batch statistics, and the running ones move)",
    )
    add("--second-bn", help="running statistics in SAM's second pass: frozen (default) or moving")
    add("--beta", type=float, help="TRADES: weight of the robust term")
    add("--awp-gamma", type=float, help="adversarial weight perturbation, of each layer's norm")
    add("--awp-warmup", type=int, help="epochs before it (default 0)")
    add("--amp", help="off, bf16 or fp16, for training; evaluation is always float32")
    add("--channels-last", action=argparse.BooleanOptionalAction)
    add("--backend", help="fastsam's: triton, numba or reference (default: fastsam chooses)")
    add("--threads", type=int, help="CPU threads of one run")
    add("--workers", type=int, help="processes that read photographs (default: by CPUs)")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        help="digits (default), cifar10, cifar100, or a directory of images with "
        "train/<class>/ and test/<class>/, or <class>/ alone",
    )
    add("--data-dir", help="where torchvision keeps CIFAR (default .data)")
    add("--download", action="store_true", default=False, help="let torchvision fetch CIFAR")
    add("--image-size", type=int, help="resize a directory's images to this many pixels square")
    add("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
    add("--force", action="store_true", default=False, help="allow an l_inf eps above 0.25")


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--eval-linf", nargs="+", metavar="EPS", help="radii, like --eps (default 1 2 8; "
        "for digits 16 32 too)")  # fmt: skip
    add("--eval-l2", nargs="+", metavar="EPS", help="radii, like --eps (default 16 32 128; "
        "for digits 256 too)")  # fmt: skip
    add("--eval-steps", type=int, help="PGD steps of the evaluation (default 10)")
    add("--n-examples", "--eval-samples", type=int, dest="eval_samples",
        help="attack this many test images, drawn once for all (default all)")  # fmt: skip
    add("--eval-batch-size", type=int, help="images attacked at a time (default 500)")
    add("--eval-on", help="test (default), or held-out: the images that --val took from training, "
        "by which settings are chosen")  # fmt: skip
    add("--eval-data", metavar="DIR", help="the test images of this directory, such as another "
        "encoding, in place of the data's own")  # fmt: skip
    add("--eval-precision", help="of the attacks' gradients: fp32 (default) or bf16 (in "
        "channels_last); what they find is judged in float32")  # fmt: skip


def add_sitting_options(parser: argparse.ArgumentParser) -> None:
    """Options of bench.training.session.Sitting, and those of several processes."""
    add = parser.add_argument
    add("--save-every", type=float, metavar="MINUTES", help="checkpoints within an epoch (default "
        "10); every epoch ends with one")  # fmt: skip
    add("--time-budget", type=float, metavar="MINUTES", help="save and stop when they are over; "
        "repeat the command to go on")  # fmt: skip
    add("--track", metavar="TRACKER", help="tensorboard, wandb, mlflow or trackio: give it the "
        "numbers of metrics.jsonl too")  # fmt: skip
    add("--sync-bn", action="store_true", help="under torchrun on GPUs: BatchNorm over the whole "
        "batch (default: over each process's share)")  # fmt: skip
    add("--local-ascent", action="store_true", help="under torchrun: SAM climbs in each process by "
        "its own share's gradient (default: by the whole batch's)")  # fmt: skip


def add_evaluate_command(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add("checkpoint", type=Path, help="last.pt or best.pt of a run")
    add_evaluation_options(evaluate)
    add("--attacks", nargs="+", dest="eval_attacks", metavar="NAME",
        help="of clean, fgsm, pgd[-STEPS[-RESTARTS]], apgd-ce[-STEPS[-RESTARTS]], "
        "apgd-t[-STEPS[-RESTARTS]], autoattack (default pgd); an image is robust when none of them "
        "fools the model")  # fmt: skip
    add("--norms", nargs="+", metavar="NORM", help="of linf, l2 (default both)")
    add("--other-data", action="store_true", default=False, help="--data are other images than the "
        "checkpoint was trained with, and none of the training images is among the test images")
    add("--rows", type=Path, help="append the result as a row to this JSONL file")
    add("--robustbench", type=Path, metavar="FILE", help="write RobustBench's model_info there: "
        "needs autoattack on all test images of CIFAR at a leaderboard's radius")  # fmt: skip


def add_step_command(commands: Any) -> None:
    """The options of bench.speed.step.StepConfig; absent ones stay out of the namespace."""
    text = "time the optimizer's step alone beside its peers, after checking that they agree"
    add = commands.add_parser(
        "step", help=text, description=text, argument_default=argparse.SUPPRESS
    ).add_argument
    add("--model", help="a network of train's (default preactresnet18), or torchvision's "
        "resnet50, vit_b_16, ...")  # fmt: skip
    add("--width", type=int, help="64: as published; others scale all channels (smallconv: the "
        "first layer's channels)")  # fmt: skip
    add("--params", type=int, help="instead of a model: so many parameters")
    add("--tensors", type=int, help="with --params: in so many equal tensors (default 62)")
    add("--methods", nargs="+", help="of sgd, sam, asam, fsam, fasam (default all)")
    add("--base", help="sgd (default) or adamw")
    add("--dtype", help="of weights and gradients: fp32 (default) or bf16")
    add("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also time the per-parameter peers through torch.compile (default: on a GPU)",
    )
    add("--graph", action="store_true", help="replay each pass as a CUDA graph")
    add("--keep-memory", action="store_true", help="let the C library keep freed memory, as it "
        "does in a training loop (glibc)")  # fmt: skip
    add("--reps", type=int, help="timed steps (default 20, on a GPU 100, for about a minute)")
    add("--threads", type=int, help="CPU threads")
    add("--host", action="store_true", help="instead: how long a step keeps the host, without a "
        "GPU, at 10, 62, 161 and 1000 tensors (or --tensors) of one element")  # fmt: skip
    add("--rows", type=Path, help="append a row per optimizer to this JSONL file")


def add_report_command(commands: Any) -> None:
    text = "tables, figures and one HTML page from what runs or benchmarks left"
    sub = commands.add_parser("report", help=text, description=text)
    sub.add_argument("runs", type=Path, nargs="*", metavar="DIR",
                     help="directories of runs, or JSONL of `bench compare --rows`")  # fmt: skip
    sub.add_argument("--step", type=Path, nargs="+", metavar="FILE",
                     help="instead: JSONL files of `bench step --rows`")  # fmt: skip
    sub.add_argument("--out", type=Path, default=Path("runs/report"), help="default runs/report")


def add_export_command(commands: Any) -> None:
    text = "a finished run's network for others: safetensors, its source, a model card"
    add = commands.add_parser("export", help=text, description=text).add_argument
    add("run", type=Path, metavar="RUN", help="directory of a finished run")
    add("out", type=Path, metavar="OUT", help="directory to write to")
    add("--checkpoint", default="last", metavar="WHICH", help="last (default) or best")


def add_theory_command(commands: Any) -> None:
    text = "the SAM/AT paper's binary model: what of its theory is exact, and what is not"
    add = commands.add_parser("theory", help=text, description=text).add_argument
    add("--p", type=float, help="how often the robust feature is right; without any option but "
        "--out, six models, else p 0.95, eta 0.2, n 100 unless given")  # fmt: skip
    add("--eta", type=float, help="the weak features' mean")
    add("--n", type=int, help="the number of weak features")
    add("--eps", type=float, nargs="+", help="radii of AT, in units of inputs")
    add("--rho", type=float, nargs="+", help="radii of SAM, in units of weights")
    add("--out", type=Path, default=Path("runs/theory"), help="default runs/theory")


def add_throughput_command(commands: Any) -> None:
    """Options of Config and of training_loops.Options; absent ones stay out of the namespace."""
    text = "images/s of training and where the time goes, beside the plain recipe, on random images"
    add = commands.add_parser(
        "throughput", help=text, description=text, argument_default=argparse.SUPPRESS
    ).add_argument
    add("--methods", nargs="+", default=["sgd", "sam", "asam", "fsam", "at-linf"],
        help="of sgd, sam, asam, fsam, fasam, at-linf, at-l2 "
        "(default sgd sam asam fsam at-linf)")  # fmt: skip
    add("--beside", nargs="*", help="of eager, fp32, fp32-nchw, uncompiled, graph, plain "
        "(default eager plain)")  # fmt: skip
    add("--model", help="as in train (default preactresnet18)")
    add("--width", type=int, help="channels of the first layer (default 64)")
    add("--batch-size", type=int, help="default 128")
    add("--attack-steps", type=int, help="default 10")
    add("--amp", help="bf16 (default) or off")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="default: yes")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--tf32", action=argparse.BooleanOptionalAction, help="default: as torch has it")
    add("--augment", help="none, crop, or crop-flip (default)")
    add("--padding", help="reflect (default) or zero")
    add("--cutout", type=int, help="side of a square that half of the images lose (default 0)")
    add("--backend", help="fastsam's (default: fastsam chooses)")
    add("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
    add("--threads", type=int, help="CPU threads")
    add("--images", type=int, help="random images in the training set (default 50000)")
    add("--image-size", type=int, help="their pixels (default 32)")
    add("--workers", type=int, help="the plain recipe's loader processes (default 2)")
    add("--steps", type=int, help="in a turn (default 1, on a GPU 30)")
    add("--turns", type=int, help="of each loop (default 5)")
    add("--rows", type=Path, help="append a row per loop to this JSONL file")


def add_gpu_command(commands: Any) -> None:
    text = "on a CUDA device: parity, then every measurement; repeat the command to go on with it"
    add = commands.add_parser("gpu", help=text, description=text).add_argument
    add("--minutes", type=float, help="start nothing that would not end within so many minutes")
    add("--list", action="store_true", help="show the pieces and how they ended; run none")
    add("--only", nargs="+", metavar="NAME", help="these pieces, done or not")
    add("--out", type=Path, default=Path("runs/gpu"),
        help="for state.json, log.txt and the rows (default runs/gpu)")  # fmt: skip
    add("--predict", action="store_true",
        help="print what a model of the compiled kernels says of GPUs that are not here")
    add("--gpu", nargs="+", metavar="GPU", default=["H200"],
        help="for --predict: A100, H100, H200, B200 or RTX4090 (default H200)")
    add("--rows", type=Path, help="for --predict: append a row per step to this JSONL file")


def add_sweep_command(sweep: argparse.ArgumentParser) -> None:
    add = sweep.add_argument
    add("--methods", nargs="+", required=True, help=f"of {METHODS}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--grid", nargs="+", default=[], metavar="OPTION=VALUE,...",
        help="such as rho=0.05,0.1 label-noise=0,0.4; any option of a run that has a "
        "value")  # fmt: skip
    add("--jobs", type=int, default=1, help="runs at a time (default 1)")
    add("--rows", type=Path, default=None, help="append a row a run to this JSONL")
    add("--out", type=Path, default=None, help="default runs/sweep-PRESET")
    add_run_options(sweep)
    add_evaluation_options(sweep)


def add_study_command(commands: Any) -> None:
    text = "make a study of docs/studies.md again; repeat the command to go on with it"
    add = commands.add_parser("study", help=text, description=text).add_argument
    add("name", metavar="NAME", help="trade-off, rho, parts, noise, batch or cifar")
    add("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    add("--rows", type=Path, help="append a row a run and evaluation to this JSONL")
    add("--out", type=Path, help="default runs/study-NAME")
    add("--train-only", action="store_true", help="train all runs; a later call evaluates them")
    add("--show", type=Path, metavar="ROWS", help="train nothing; print the table of these rows")
    add("--figure", type=Path, help="with --show: draw the figure there")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Train image classifiers with SGD, SAM, ASAM, F-SAM or adversarial training, "
        "and measure their natural and robust accuracy.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_data_options(sub)
        return sub

    train = command("train", "train one model and evaluate it; repeat the command to resume it")
    train.add_argument("--method", default=None, help=f"one of {METHODS}, or standard "
                       "(default: the recipe's, or sgd)")  # fmt: skip
    train.add_argument("--seed", type=int)
    train.add_argument("--out", type=Path, default=None, help="default runs/PRESET/METHOD-seedN")
    add_sitting_options(train)
    compare = command("compare", "train several methods and seeds; repeat the command to resume it")
    compare.add_argument(
        "--methods", nargs="+", default=["sgd", "sam", "fsam", "at-linf"],
        help=f"of {METHODS} (default sgd sam fsam at-linf)",
    )  # fmt: skip
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    compare.add_argument("--rows", type=Path, default=None, help="append a row a run to this JSONL")
    compare.add_argument(
        "--demo", action="store_true", default=False,
        help="a few minutes on two CPU cores: --preset digits --seeds 0 1 --jobs 2 --threads 1",
    )  # fmt: skip
    compare.add_argument("--out", type=Path, default=None, help="default runs/PRESET")
    for sub in (train, compare):
        add_run_options(sub)
        add_evaluation_options(sub)
    add_sweep_command(command("sweep", "train every method with every value of a grid; repeat the "
                              "command to go on with it"))  # fmt: skip
    add_study_command(commands)
    text = "the published settings: names, sources, published numbers"
    recipes = commands.add_parser("recipes", help=text, description=text)
    recipes.add_argument("part", nargs="?", default="", help="only names with this in them")
    text = "unpack a tar file of train/<class>/ and test/<class>/ into a directory for --data"
    archive = commands.add_parser("unpack", help=text, description=text)
    archive.add_argument("archive", type=Path, help="such as cifar10-60k-jpeg.tar.xz")
    archive.add_argument("out", type=Path, metavar="DIR", help="such as .data/cifar10-jpeg")
    evaluate = command("evaluate", "attack a trained model")
    add_evaluate_command(evaluate)
    add_step_command(commands)
    add_report_command(commands)
    add_export_command(commands)
    add_theory_command(commands)
    add_throughput_command(commands)
    add_gpu_command(commands)
    return parser


def evaluation_of(data: str, options: dict[str, Any]):
    from bench.attacks.notation import parse_radii
    from bench.settings.config import resolve_evaluation

    given: dict[str, Any] = {
        norm: parse_radii(options[f"eval_{norm}"], norm, options["force"])
        for norm in ("linf", "l2")
        if f"eval_{norm}" in options
    }
    for norm in {"linf", "l2"} - set(options.get("norms", ("linf", "l2"))):
        if norm in given:
            raise ValueError(f"--eval-{norm} has no effect: --norms leaves {norm} out")
        given[norm] = ()
    for k in ("steps", "samples", "batch_size", "on", "data", "precision"):
        if f"eval_{k}" in options:
            given[k] = options[f"eval_{k}"]
    if "eval_attacks" in options:
        given["attacks"] = tuple(dict.fromkeys(options["eval_attacks"]))
        if "steps" in given and "pgd" not in given["attacks"]:
            raise ValueError(
                f"--eval-steps {given['steps']} is of the attack pgd; add it to --attacks, or "
                f"write pgd-{given['steps']}"
            )
    return resolve_evaluation(data, given)


def run_train(options: dict[str, Any]) -> int:
    from bench.training import processes
    from bench.training.session import TERMINATED, Sitting, Stopped

    given = ("save_every", "time_budget", "track")
    sitting = Sitting(heeds_sigterm=True, **{k: options[k] for k in given if k in options})
    with processes.joined(options.get("device", "cpu")):
        try:
            train_in(sitting, options)
        except Stopped as where:
            if processes.rank() == 0:
                print(f"stopped {where}: {sitting.why()}; repeat the command to go on")
            return TERMINATED if sitting.terminated else 0
    return 0


def train_in(sitting: Any, options: dict[str, Any]) -> None:
    from tqdm import tqdm

    from bench.evaluation.evaluate import report
    from bench.experiments.train_and_evaluate import finished, train_and_evaluate
    from bench.settings.config import check_used, preset_of, resolve
    from bench.settings.recipes import load_recipe
    from bench.training import processes
    from bench.training.train import refuse_early

    options = options | {"processes": processes.processes()}
    config = resolve(options["method"], preset_of(options), options)
    check_used([config.method], options)
    evaluation = evaluation_of(config.data, options)
    out = options["out"] or Path("runs", preset_of(options), config.name)
    finished(config, evaluation, out)  # what these two refuse comes before the bar is drawn
    refuse_early(config, out, options["download"])
    quiet = processes.rank() > 0
    sitting.bar = not quiet
    say_alpha([] if quiet else [config], options)
    with tqdm(total=config.epochs, unit="epoch", desc=config.name, disable=quiet or None) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update()
            if row:
                bar.set_postfix({k: f"{row[k]:.3f}" for k in SHOWN if k in row})

        summary = train_and_evaluate(
            config, evaluation, out, options["download"], show, sitting, bar=True
        )
    if quiet:
        return
    print(report(summary | {"images": summary["test_images"]}))
    print(f"{summary['images_per_second']:.0f} images/s in training; wrote {out}")
    if published := load_recipe(preset_of(options)).published:
        numbers = ", ".join(f"{name} {value:g}" for name, value in published.items())
        print(f"the recipe's published numbers, in %: {numbers}")


def say_alpha(configs: list[Any], options: dict[str, Any]) -> None:
    """Say on stderr which alpha an --eps without --alpha takes."""
    from bench.attacks.notation import both_forms
    from bench.settings.config import takes_alpha

    found = {(c.method, c.attack) for c in configs if c.attack and takes_alpha(options)}
    for method, attack in sorted(found, key=lambda pair: (pair[0], pair[1].eps)):
        print(f"{method}: eps {both_forms(attack.eps)} takes alpha {both_forms(attack.alpha)}, the "
              "preset's share of it; --alpha sets another", file=sys.stderr)  # fmt: skip


def combined(methods: list[str], optimizer: str | None) -> list[str]:
    """Return a comparison's methods with its --optimizer in those that name none."""
    from bench.settings.methods import ADVERSARIES, method_of

    open_ones = {*ADVERSARIES, "standard"} & set(methods)
    if optimizer is not None and not open_ones:
        raise ValueError(
            f"optimizer {optimizer!r} has no effect on {', '.join(methods)}, which name theirs"
        )
    return [method_of(m, optimizer if m in open_ones else None) for m in methods]


def run_compare(options: dict[str, Any]) -> None:
    from bench.experiments.compare import compare
    from bench.settings.config import check_used, preset_of, resolve

    if options["demo"]:
        options |= {"preset": "digits", "seeds": [0, 1], "jobs": 2, "threads": 1}
    methods = combined(options["methods"], options.pop("optimizer", None))
    check_used(methods, options)
    by_seed = [
        [resolve(m, preset_of(options), options | {"seed": seed}) for m in methods]
        for seed in options["seeds"]
    ]
    evaluation = evaluation_of(by_seed[0][0].data, options)
    out = options["out"] or Path("runs", preset_of(options))
    say_alpha(by_seed[0], options)
    compare(by_seed, evaluation, out, options["jobs"], options["rows"], options["download"])


def run_sweep(options: dict[str, Any]) -> None:
    from bench.experiments.sweep import parse_grid, runs_of, sweep
    from bench.settings.config import preset_of

    methods = combined(options["methods"], options.pop("optimizer", None))
    grid = parse_grid(options["grid"], options)
    preset = preset_of(options)
    runs = runs_of(methods, options["seeds"], grid, preset, options)
    evaluation = evaluation_of(next(iter(runs.values())).data, options)
    say_alpha(list(runs.values()), options | grid)
    out = options["out"] or Path("runs", f"sweep-{Path(preset).stem}")
    sweep(runs, list(grid), evaluation, out, options["jobs"], options["rows"], options["download"])


def run_study_command(options: dict[str, Any]) -> None:
    from bench.experiments.study import run_study, show

    name = options["name"]
    if options["show"]:
        show(name, options["show"], options["figure"])
    elif options["figure"]:
        raise ValueError("--figure is drawn from rows; add --show ROWS")
    else:
        out = options["out"] or Path("runs", f"study-{name}")
        run_study(name, out, options["jobs"], options["rows"], options["train_only"])


def data_of(checkpoint: dict[str, Any], config: dict[str, Any], options: dict[str, Any]):
    """Return the data to evaluate a checkpoint on: what it was trained on, or, with --other-data,
    what its user says it was not. Raises ValueError for any other."""
    from bench.data.datasets import load_data
    from bench.training.checkpoint import changed_data

    path, name = str(options["checkpoint"]), config["data"]
    data = load_data(
        name, config["val"], config["seed"], config["data_dir"], options["download"],
        config["image_size"], config.get("label_noise", 0.0),
        config.get("noise_kind", "published"), lazily=config.get("augment") == "resized-crop",
    )  # fmt: skip
    if (data.channels, data.classes) != (checkpoint["channels"], checkpoint["classes"]):
        raise ValueError(
            f"{path!r} classifies {checkpoint['channels']}-channel images into "
            f"{checkpoint['classes']}, but data {name!r} has {data.channels} channels and "
            f"{data.classes}; pass the --data that it was trained on"
        )
    if options["other_data"] and options.get("robustbench"):
        raise ValueError("--robustbench is for the data that a network was trained on; leave out "
                         "--other-data")  # fmt: skip
    if not options["other_data"] and (parts := changed_data(checkpoint, data)):
        raise ValueError(
            f"the {parts} images of {name!r} are not those that {path!r} was trained with, and "
            "some that it was trained on may be test images now; restore them, or pass "
            "--other-data if you know that none is"
        )
    return data


def run_evaluate(options: dict[str, Any]) -> None:
    from dataclasses import asdict

    import torch

    from bench.data.datasets import test_images_of
    from bench.evaluation.evaluate import evaluate, report
    from bench.evaluation.robustbench import leaderboard, model_info
    from bench.files import append_jsonl, refuse_unwritable, write_json
    from bench.provenance import git_hash, stamp
    from bench.settings.config import check_judges, usable_device
    from bench.training.checkpoint import load_checkpoint, rebuild

    for written in (options.get("rows"), options.get("robustbench")):
        refuse_unwritable(written)
    if unknown := set(options.get("norms", ())) - {"linf", "l2"}:
        raise ValueError(f"unknown norm {sorted(unknown)[0]!r}; choose from linf, l2")
    device = usable_device(options.get("device", "cpu"))
    path, file = options["checkpoint"], options.get("robustbench")
    checkpoint = load_checkpoint(path, str(device))
    model = rebuild(checkpoint, path, str(device))
    if checkpoint["config"].get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    config = checkpoint["config"] | {k: v for k, v in options.items() if k in checkpoint["config"]}
    evaluation = evaluation_of(config["data"], options)
    check_judges(evaluation, config["val"])
    data = data_of(checkpoint, config, options)
    board = leaderboard(config["data"], evaluation, len(data.test)) if file else ()
    git = git_hash()
    images = data.val if evaluation.on == "held-out" else data.test
    if evaluation.data is not None:
        images = test_images_of(evaluation.data, data, config["image_size"])
    result = evaluate(model, images.to(device), evaluation,
                      say=lambda text: print(text, file=sys.stderr), bar=True)  # fmt: skip
    print(report(result | {"evaluation": asdict(evaluation)}))
    if "rows" in options:
        row = {"checkpoint": "/".join(path.parts[-2:]), **result, "config": checkpoint["config"],
               "evaluation": asdict(evaluation), **stamp(str(device), git)}  # fmt: skip
        options["rows"].parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(options["rows"], [row])
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, model_info(config, result, *board))
        print(f"wrote {file}; what is null in it is the authors' to fill")


def run_recipes(options: dict[str, Any]) -> None:
    from bench.settings.recipes import listing, recipe_names

    names = [name for name in recipe_names() if options["part"] in name]
    if not names:
        raise ValueError(f"no recipe has {options['part']!r} in its name")
    print(listing(names))


def run_unpack(options: dict[str, Any]) -> None:
    from bench.data.archive import unpack

    images = unpack(options["archive"], options["out"])
    counts = ", ".join(f"{n} images in {part}/" for part, n in images.items())
    print(f"{options['out']}: {counts}; use it with --data {options['out']}")


def run_step(options: dict[str, Any]) -> int:
    from bench.speed.step import StepConfig, step

    given = {k: x for k, x in options.items() if k not in ("command", "rows", "host")}
    if options.get("host"):
        return run_host(given, options.get("rows"))
    if "methods" in given:
        given["methods"] = tuple(dict.fromkeys(given["methods"]))
    return step(StepConfig(**given), options.get("rows"))


def run_host(given: dict[str, Any], rows: Path | None) -> int:
    from bench.speed.host import HostConfig, host

    other = given.keys() - {"tensors", "reps"}
    if other:
        raise ValueError(f"--host takes --tensors, --reps and --rows, not --{sorted(other)[0]}")
    if "tensors" in given:
        given["tensors"] = (given["tensors"],)
    return host(HostConfig(**given), rows)


def run_report(options: dict[str, Any]) -> None:
    from bench.reports.runs import report_runs
    from bench.speed.step_report import report_steps

    if bool(options["runs"]) == bool(options["step"]):
        raise ValueError("pass directories of runs (report DIR...), or --step FILE..., one of them")
    if options["step"]:
        report_steps(options["step"], options["out"])
    else:
        report_runs(options["runs"], options["out"])


def run_export(options: dict[str, Any]) -> None:
    from bench.reports.export import export

    for path in export(options["run"], options["out"], options["checkpoint"]):
        print(f"wrote {path}")


def run_theory(options: dict[str, Any]) -> None:
    from bench.theory.report import SETTINGS, Model, theory

    given = {k: options[k] for k in ("p", "eta", "n") if options[k] is not None}
    own = given or options["eps"] or options["rho"]
    models = [Model(**({"p": 0.95, "eta": 0.2, "n": 100} | given))] if own else SETTINGS
    theory(models, options["eps"], options["rho"], options["out"])


def run_throughput(options: dict[str, Any]) -> int:
    from dataclasses import fields, replace

    from bench.settings.config import resolve
    from bench.speed.throughput import throughput
    from bench.speed.training_loops import Options

    given = {f.name: options[f.name] for f in fields(Options) if f.name in options}
    if "beside" in given:
        given["beside"] = tuple(given["beside"])
    fast = {"amp": "bf16", "channels_last": True} | options
    configs = [resolve(m, "sam-at-cifar10", fast) for m in options["methods"]]
    configs = [replace(c, data="random") for c in configs]
    return throughput(configs, Options(**given), options.get("rows"))


def run_gpu(options: dict[str, Any]) -> int:
    if options["predict"]:
        from bench.speed.predict import predict

        return predict(options["gpu"], options["rows"])
    if options["rows"]:
        raise ValueError("--rows belongs to --predict; what is measured goes to --out")
    from bench.speed.gpu_session import gpu

    return gpu(options["out"], options["minutes"], options["only"], options["list"])


def parsed(argv: list[str] | None) -> dict[str, Any]:
    try:
        return vars(build_parser().parse_args(argv))
    finally:
        sys.stdout.flush()  # --help, which ends the program, is output too


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a benchmark's parity check is red, 2 after one sentence about
    the input that cannot be used, DIVERGED (3) after one about the training that did, or 141 where
    nobody reads the output."""
    command = {"train": run_train, "compare": run_compare, "evaluate": run_evaluate,
               "recipes": run_recipes, "unpack": run_unpack, "sweep": run_sweep,
               "study": run_study_command, "step": run_step, "report": run_report,
               "export": run_export,
               "theory": run_theory, "throughput": run_throughput, "gpu": run_gpu}  # fmt: skip
    from bench.training.diverged import DIVERGED, Diverged

    try:
        options = parsed(argv)
        if "TORCHELASTIC_RUN_ID" in os.environ and options["command"] != "train":
            raise ValueError(f"torchrun is for train alone; start {options['command']} without it")
        code = command[options["command"]](options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `| head` leaves it: nobody reads on
        with suppress(OSError):  # what Python would flush at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Diverged as e:
        print(f"error: {e}", file=sys.stderr)
        return DIVERGED


if __name__ == "__main__":
    sys.exit(main())

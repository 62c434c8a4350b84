"""python -m bench train | compare | evaluate | step | throughput | gpu | report: the command line,
in a checkout."""

import argparse
import sys
from pathlib import Path
from typing import Any

METHODS = (
    "sgd, sam, asam, fishersam, fsam, fasam, sam-interval, sam-late, sam-part, sam-micro, at-linf, "
    "at-l2"
)
SHOWN = ("train_loss", "train_acc", "val_acc")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of Config. Absent ones stay out of the namespace, so that presets fill them."""
    add = parser.add_argument
    add(
        "--preset",
        default=None,
        help="the papers' values: sam-at-cifar10, sam-at-cifar100, "
        "fsam-cifar10, fsam-cifar100; ours: digits, cifar6k (default: by data)",
    )
    add("--augment", help="none, crop, or crop-flip, from a reflection-padded image")
    add("--pad", type=int, help="pixels that a crop can move")
    add("--val", type=float, help="fraction of the training images that chooses best.pt")
    add("--model", help="preactresnet18 or smallconv")
    add("--width", type=int, help="channels of the first layer; 64 is the full PreActResNet-18")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="learning rate")
    add("--schedule", help="piecewise (x0.1 at 75%% and 90%% of the epochs) or cosine")
    add("--momentum", type=float)
    add("--weight-decay", type=float)
    add("--rho", type=float, help="SAM's radius")
    add("--sigma", type=float, help="F-SAM: how much of the gradient's average is removed")
    add("--lmbda", type=float, help="F-SAM: the average's decay, in (0, 1)")
    add("--eta", type=float, help="ASAM: added to |w|; FisherSAM: weight of the Fisher diagonal")
    add("--interval", type=int, help="sam-interval: climb at every so-many-th step")
    add("--late", type=float, help="sam-late: share of the epochs before the first climb")
    add("--ascent-part", type=float, help="sam-part: share of the batch to climb from")
    add("--micro", type=int, help="sam-micro: parts of the batch, each with a climb of its own")
    add("--scale", help="ASAM: all, or weights (the authors' form)")
    add("--eps", help="training attack's radius: 8/255, 8 (the same), or 0.031")
    add("--alpha", help="training attack's step, written like eps")
    add("--attack-steps", type=int)
    add(
        "--attack-bn",
        help="BatchNorm in the training attack: eval (default) or train (batch "
        "statistics); running statistics never move in it",
    )
    add("--amp", help="off or bf16, for training; evaluation is always float32")
    add("--channels-last", action=argparse.BooleanOptionalAction)
    add("--backend", help="fastsam's: reference or triton (default: fastsam chooses)")
    add("--threads", type=int, help="CPU threads of one run")


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
    add("--eval-linf", nargs="+", metavar="EPS", help="radii, like --eps (default 1 2 8)")
    add("--eval-l2", nargs="+", metavar="EPS", help="radii, like --eps (default 16 32 128)")
    add("--eval-steps", type=int, help="PGD steps of the evaluation (default 10)")
    add("--eval-samples", type=int, help="attack this many test images (default all)")


def add_step_command(commands: Any) -> None:
    """The options of bench.step.StepConfig; absent ones stay out of the namespace."""
    text = "time the optimizer's step alone beside its peers, after checking that they agree"
    add = commands.add_parser(
        "step", help=text, description=text, argument_default=argparse.SUPPRESS
    ).add_argument
    add("--model", help="preactresnet18 (default), or torchvision's resnet18, vit_b_16, ...")
    add("--width", type=int, help="channels of the first layer; 64 is the full PreActResNet-18")
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
    add("--reps", type=int, help="timed steps (default 20, on a GPU 100, for about a minute)")
    add("--threads", type=int, help="CPU threads")
    add("--rows", type=Path, help="append a row per optimizer to this JSONL file")


def add_report_command(commands: Any) -> None:
    text = "tables and figures from rows that a benchmark wrote"
    sub = commands.add_parser("report", help=text, description=text)
    sub.add_argument("--step", type=Path, nargs="+", required=True, metavar="FILE",
                     help="JSONL files of `bench step --rows`")  # fmt: skip
    sub.add_argument("--out", type=Path, default=Path("runs/report"), help="default runs/report")


def add_throughput_command(commands: Any) -> None:
    """Options of Config and of bench.loops.Options; absent ones stay out of the namespace."""
    text = "images/s of training and where the time goes, beside the plain recipe, on random images"
    add = commands.add_parser(
        "throughput", help=text, description=text, argument_default=argparse.SUPPRESS
    ).add_argument
    add("--methods", nargs="+", default=["sgd", "sam", "asam", "fsam", "at-linf"],
        help="of sgd, sam, asam, fsam, fasam, at-linf, at-l2 "
        "(default sgd sam asam fsam at-linf)")  # fmt: skip
    add("--beside", nargs="*", help="of eager, fp32, fp32-nchw, uncompiled, graph, plain "
        "(default eager plain)")  # fmt: skip
    add("--model", help="preactresnet18 (default) or smallconv")
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
    train.add_argument("--method", default="sgd", help=f"one of {METHODS} (default sgd)")
    train.add_argument("--seed", type=int)
    train.add_argument("--out", type=Path, default=None, help="default runs/PRESET/METHOD-seedN")
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
    evaluate = command("evaluate", "attack a trained model")
    evaluate.add_argument("checkpoint", type=Path, help="last.pt or best.pt of a run")
    add_evaluation_options(evaluate)
    add_step_command(commands)
    add_report_command(commands)
    add_throughput_command(commands)
    add_gpu_command(commands)
    return parser


def evaluation_of(data: str, options: dict[str, Any]):
    from bench.attacks import parse_eps
    from bench.config import resolve_evaluation

    given: dict[str, Any] = {
        norm: tuple(parse_eps(text, norm, options["force"]) for text in options[f"eval_{norm}"])
        for norm in ("linf", "l2")
        if f"eval_{norm}" in options
    }
    given |= {k: options[f"eval_{k}"] for k in ("steps", "samples") if f"eval_{k}" in options}
    return resolve_evaluation(data, given)


def run_train(options: dict[str, Any]) -> None:
    from tqdm import tqdm

    from bench.config import check_used, preset_of, resolve
    from bench.evaluate import report
    from bench.summary import train_and_evaluate
    from bench.train import refuse_early

    check_used([options["method"]], options)
    config = resolve(options["method"], options["preset"], options)
    evaluation = evaluation_of(config.data, options)
    out = options["out"] or Path("runs", preset_of(options), config.name)
    refuse_early(config, out, options["download"])  # before the bar is drawn
    with tqdm(total=config.epochs, unit="epoch", desc=config.name) as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update()
            if row:
                bar.set_postfix({k: f"{row[k]:.3f}" for k in SHOWN})

        summary = train_and_evaluate(config, evaluation, out, options["download"], show)
    print(report(summary | {"images": summary["test_images"]}))
    print(f"{summary['images_per_second']:.0f} images/s in training; wrote {out}")


def run_compare(options: dict[str, Any]) -> None:
    from bench.compare import compare
    from bench.config import check_used, preset_of, resolve

    if options["demo"]:
        options |= {"preset": "digits", "seeds": [0, 1], "jobs": 2, "threads": 1}
    if options["jobs"] < 1:
        raise ValueError(f"jobs must be at least 1, got {options['jobs']}")
    check_used(options["methods"], options)
    by_seed = [
        [resolve(m, options["preset"], options | {"seed": seed}) for m in options["methods"]]
        for seed in options["seeds"]
    ]
    evaluation = evaluation_of(by_seed[0][0].data, options)
    out = options["out"] or Path("runs", preset_of(options))
    compare(by_seed, evaluation, out, options["jobs"], options["rows"], options["download"])


def run_evaluate(options: dict[str, Any]) -> None:
    from bench.checkpoint import load_checkpoint, rebuild
    from bench.config import usable_device
    from bench.data import load_data
    from bench.evaluate import evaluate, report

    device = usable_device(options.get("device", "cpu"))
    path = options["checkpoint"]
    checkpoint = load_checkpoint(path, str(device))
    model = rebuild(checkpoint, path, str(device))
    config = checkpoint["config"] | {k: v for k, v in options.items() if k in checkpoint["config"]}
    evaluation = evaluation_of(config["data"], options)
    data = load_data(
        config["data"], config["val"], config["seed"], config["data_dir"], options["download"],
        config["image_size"],
    )  # fmt: skip
    if (data.channels, data.classes) != (checkpoint["channels"], checkpoint["classes"]):
        raise ValueError(
            f"{str(path)!r} classifies {checkpoint['channels']}-channel images into "
            f"{checkpoint['classes']}, but data {config['data']!r} has {data.channels} channels "
            f"and {data.classes}; pass the --data that it was trained on"
        )
    print(report(evaluate(model, data.test.to(device), evaluation)))


def run_step(options: dict[str, Any]) -> int:
    from bench.step import StepConfig, step

    given = {k: x for k, x in options.items() if k not in ("command", "rows")}
    if "methods" in given:
        given["methods"] = tuple(dict.fromkeys(given["methods"]))
    return step(StepConfig(**given), options.get("rows"))


def run_report(options: dict[str, Any]) -> None:
    from bench.report import report_steps

    report_steps(options["step"], options["out"])


def run_throughput(options: dict[str, Any]) -> int:
    from dataclasses import fields, replace

    from bench.config import resolve
    from bench.loops import Options
    from bench.throughput import throughput

    given = {f.name: options[f.name] for f in fields(Options) if f.name in options}
    if "beside" in given:
        given["beside"] = tuple(given["beside"])
    fast = {"amp": "bf16", "channels_last": True} | options
    configs = [resolve(m, "sam-at-cifar10", fast) for m in options["methods"]]
    configs = [replace(c, data="random") for c in configs]
    return throughput(configs, Options(**given), options.get("rows"))


def run_gpu(options: dict[str, Any]) -> int:
    from bench.gpu import gpu

    return gpu(options["out"], options["minutes"], options["only"], options["list"])


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a benchmark's parity check is red, or 2 after one sentence
    about the input that cannot be used."""
    options = vars(build_parser().parse_args(argv))
    command = {"train": run_train, "compare": run_compare, "evaluate": run_evaluate,
               "step": run_step, "report": run_report, "throughput": run_throughput,
               "gpu": run_gpu}  # fmt: skip
    try:
        return command[options["command"]](options) or 0
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

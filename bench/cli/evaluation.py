"""`bench evaluate`: attacks on a trained network."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cli.parse import Command, options_of
from bench.cli.shared import NORMS, OfData, evaluation_of
from bench.settings.config import Config
from bench.settings.evaluation import Evaluation
from bench.settings.setting import MISSING, Described, setting


@dataclass(kw_only=True)
class OfEvaluate(OfData):
    checkpoint: Path = setting(MISSING, "last.pt or best.pt of a run", positional=True)
    norms: tuple[str, ...] = setting(NORMS, "of linf, l2", choices=NORMS, metavar="NORM...")
    other_data: bool = setting(
        False, "--data are other images than the checkpoint was trained with, and none of the "
        "training images is among the test images",
    )
    rows: Path | None = setting(
        None, "append the result as a row to this JSONL file", metavar="FILE"
    )
    robustbench: Path | None = setting(
        None, "write RobustBench's model_info there: needs autoattack on all test images of CIFAR "
        "at a leaderboard's radius", metavar="FILE",
    )


def as_trained(of: Described) -> Described:
    return replace(of, setting=replace(of.setting, default="the checkpoint's"))


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

    from bench.data.datasets import judges_of
    from bench.devices import usable_device
    from bench.evaluation.evaluate import evaluate, report
    from bench.evaluation.robustbench import leaderboard, model_info
    from bench.files import append_jsonl, write_json
    from bench.provenance import git_hash, stamp
    from bench.settings.evaluation import check_judges
    from bench.training.checkpoint import load_checkpoint, rebuild

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
    images, judged = judges_of(data, evaluation.data, evaluation.on, config["image_size"])
    result = evaluate(model, images.to(device), evaluation,
                      say=lambda text: print(text, file=sys.stderr), bar=True)  # fmt: skip
    said = asdict(evaluation)
    known = [checkpoint.get(key) for key in ("fingerprint", "test_fingerprint")]
    others = known != [data.fingerprint, data.test_fingerprint]
    if options["other_data"] and others and evaluation.data is None:
        said["data"] = config["data"]
    print(report(result | {"evaluation": said}))
    if options["rows"]:
        row = {"checkpoint": "/".join(path.parts[-2:]), **result, "judged_fingerprint": judged,
               "config": checkpoint["config"], "trained": checkpoint.get("trained", []),
               "evaluation": said, **stamp(str(device), git)}  # fmt: skip
        append_jsonl(options["rows"], [row])
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, model_info(config, result, *board))
        print(f"wrote {file}; what is null in it is the authors' to fill")


COMMANDS = (
    Command(
        "evaluate", "attack a trained model", run_evaluate, OfEvaluate,
        (*(as_trained(of) for of in options_of(Config, "data", "data_dir", "image_size")),
         *options_of(Config, "device"), *options_of(Evaluation)),
    ),
)

"""`bench train`: one run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cli.parse import Command, options_of
from bench.cli.shared import (
    CONFIG,
    EVALUATION,
    FILLED,
    METHODS,
    PER_PROCESS,
    OfRuns,
    evaluation_of,
    say_alpha,
)
from bench.settings.config import Config
from bench.settings.setting import setting, settings_of
from bench.settings.sitting import SittingSettings

SHOWN = ("train_loss", "train_acc", "val_acc")


@dataclass(kw_only=True)
class OfTrain(OfRuns):
    method: str | None = setting(
        None, f"one of {METHODS}, or standard", default="the recipe's, or sgd"
    )
    out: Path | None = setting(None, "the run's directory", metavar="DIR",
                               default="runs/PRESET/METHOD-seedN")


def run_train(options: dict[str, Any]) -> int:
    from bench.training import processes
    from bench.training.session import Sitting
    from bench.training.stopped import TERMINATED, Stopped

    given = {k: options[k] for k in settings_of(SittingSettings) if k in options}
    sitting = Sitting(heeds_sigterm=True, **given)
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
    from bench.settings.config import check_used, folder_of, preset_of, resolve
    from bench.settings.effects import check_effects
    from bench.settings.recipes import load_recipe
    from bench.training import processes
    from bench.training.train import refuse_early

    options = options | {"processes": processes.processes()}
    config = resolve(options["method"], preset_of(options), options)
    check_used([config.method], options)
    check_effects([config], options)
    evaluation = evaluation_of(config.data, options)
    out = options["out"] or folder_of(preset_of(options)) / config.name
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


COMMANDS = (
    Command(
        "train", "train one model and evaluate it; repeat the command to resume it", run_train,
        OfTrain, (*CONFIG, *options_of(Config, "seed", *PER_PROCESS),
                  *options_of(SittingSettings), *EVALUATION), FILLED,
    ),
)

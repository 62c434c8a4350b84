"""A trained network for others: `python -m bench export RUN OUT`.

OUT gets model.safetensors, model.py, which is the network's source and needs torch alone (or the
library that a network is of), and README.md, a model card with the lines that load the two.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.data.known import KNOWN
from bench.evaluation.evaluate import NORM_NAMES, interval
from bench.files import alone_in, replacing, write_text
from bench.models.standalone import standalone
from bench.reports.rows import read_summary
from bench.settings.config import Config, differences
from bench.settings.names import method_name
from bench.training.checkpoint import load_checkpoint

FILES = ("model.safetensors", "model.py", "README.md")
LOADING = """\
import torch
from safetensors.torch import load_file

from model import CLASSES, build

model = build()
model.load_state_dict(load_file("model.safetensors"))
model.eval()
with torch.no_grad():
    logits = model(torch.rand(1, {channels}, {side}, {side}))  # images in [0, 1]
print(CLASSES[logits.argmax()])
"""
LICENCE = """\
This program does not know the licence of the training images, nor that of the weights: whoever
shares them has to find out the one and choose the other. The code in `model.py` is Apache-2.0.\
"""


def export(run: Path, out: Path, which: str = "last") -> list[Path]:
    """Write a finished run's network to `out`; return the files. which: the checkpoint, "last" or
    "best". Raises ValueError for a run that is not finished, and where `out` has such files."""
    save_file = safetensors_writer()
    if which not in ("last", "best"):
        raise ValueError(f"unknown checkpoint {which!r}; choose from last, best")
    checkpoint, summary = finished_run(run, which)
    if there := [name for name in FILES if (out / name).exists()]:
        raise ValueError(f"{str(out)!r} already has {', '.join(there)}; choose another directory")
    weights = {k: own_copy(v) for k, v in checkpoint["model"].items()}
    config, classes = checkpoint["config"], checkpoint["classes"]
    source = standalone(config["model"], config["width"], checkpoint["channels"], classes)
    written = [out / name for name in FILES]
    with alone_in(out):
        with replacing(written[0]) as tmp:
            save_file(weights, tmp, {"format": "pt"})
        write_text(written[1], source)
        write_text(written[2], card(checkpoint, summary, which))
    return written


def safetensors_writer() -> Any:
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise ValueError(f"export needs safetensors ({e}); pip install safetensors") from e
    return save_file


def own_copy(tensor: Tensor) -> Tensor:
    """Return a tensor of its own, contiguous memory, which safetensors asks for."""
    return tensor.detach().cpu().contiguous().clone()


def finished_run(run: Path, which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's checkpoint and the summary that measured it."""
    path = run / "summary.json"
    if not path.exists():
        raise ValueError(
            f"{str(run)!r} has no summary.json, so no accuracy to put on the card; give the "
            "directory of a finished run, or repeat its command to finish it"
        )
    summary, checkpoint = read_summary(path), load_checkpoint(run / f"{which}.pt")
    if changed := differences(summary["config"], Config(**checkpoint["config"])):
        raise ValueError(
            f"{str(path)!r} is of another config than {which}.pt ({changed}); repeat the run's "
            "command, which evaluates it again"
        )
    return checkpoint, summary


# ---- the card


def card(checkpoint: dict[str, Any], summary: dict[str, Any], which: str) -> str:
    """Return the model card: YAML, then Markdown."""
    config, accuracies = checkpoint["config"], accuracies_of(summary, which)
    title = f"{config['model']} trained with {method_name(config['method'])} on {config['data']}"
    sections = [
        front_matter(checkpoint, summary, accuracies, title),
        f"# {title}", about(checkpoint, which),
        "## Loading", f"```python\n{loading(checkpoint)}```", requirements(config["model"]),
        "## Accuracy", accuracy_text(summary, accuracies, which),
        "## Training", settings_text(checkpoint, summary), "## Licence", LICENCE,
    ]  # fmt: skip
    return "\n\n".join(filter(None, sections)) + "\n"


def accuracies_of(summary: dict[str, Any], which: str) -> dict[str, float]:
    """Return accuracies (fractions) by attack: "natural", "l_inf 8/255", ..."""
    row = summary if which == "last" else summary["best"]
    return {"natural": row["natural"]} | {
        f"{NORM_NAMES[norm]} {eps}": accuracy
        for norm, by_eps in row["robust"].items() for eps, accuracy in by_eps.items()
    }  # fmt: skip


def judges_of(summary: dict[str, Any]) -> tuple[str, str]:
    """Return the data and the part of it that the accuracies are on."""
    evaluation = summary["evaluation"]
    return evaluation.get("data") or summary["config"]["data"], evaluation.get("on", "test")


def front_matter(
    checkpoint: dict[str, Any], summary: dict[str, Any], accuracies: dict[str, float], title: str
) -> str:
    """Return the Hub's metadata. Its values are JSON, which is YAML too."""
    config, (data, on) = checkpoint["config"], judges_of(summary)
    metrics = [{"type": "accuracy", "name": f"accuracy, {name}", "value": value}
               for name, value in accuracies.items()]  # fmt: skip
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": data, "type": data,
                    "split": on},
        "metrics": metrics,
    }  # fmt: skip
    entries = {
        "license": "unknown", "library_name": "pytorch", "pipeline_tag": "image-classification",
        "tags": ["image-classification", config["method"], config["model"]],
        "model-index": [{"name": title, "results": [result]}],
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def about(checkpoint: dict[str, Any], which: str) -> str:
    config, classes = checkpoint["config"], checkpoint["classes"]
    epoch = f", after epoch {checkpoint['epoch'] + 1} of {config['epochs']}"
    return (
        f"`{config['model']}` of width {config['width']} for {len(classes)} classes, from the "
        f"{which} checkpoint{epoch}. It takes (B, {checkpoint['channels']}, H, W) images in [0, 1] "
        "and normalises them itself.\n\n"
        f"Training images: `{config['data']}`, fingerprint "
        f"`{checkpoint.get('fingerprint') or 'unknown'}`; test images: "
        f"`{checkpoint.get('test_fingerprint') or 'unknown'}`."
    )


def loading(checkpoint: dict[str, Any]) -> str:
    config = checkpoint["config"]
    side = config["image_size"] or KNOWN.get(config["data"], 32)
    return LOADING.format(channels=checkpoint["channels"], side=side)


def requirements(model: str) -> str:
    library = "torchvision" if model.startswith("torchvision:") or model == "resnet50" else "timm"
    more = f", {library}" if ":" in model or model in ("resnet50", "deit-small") else ""
    return f"It needs `torch`, `safetensors`{more}, and `model.py` from here."


def accuracy_text(summary: dict[str, Any], accuracies: dict[str, float], which: str) -> str:
    n, (data, on) = summary["test_images"], judges_of(summary)
    lines = ["| attack | accuracy, % | 95 % interval |", "|---|---:|---:|"]
    for name, accuracy in accuracies.items():
        low, high = interval(accuracy, n)
        lines.append(f"| {name} | {100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} |")
    attacks = [f"- {text}" for by in summary["attacks"].values() for text in by.values()]
    said = summary.get("warnings", [])
    said = said if which == "last" else summary["best"].get("warnings", said)
    warnings = [f"- Warning: {text}" for text in said]
    seed = summary["config"]["seed"]
    return "\n".join([
        *lines, "", f"On {n} {on} images of `{data}` (fingerprint of the whole set "
        f"`{summary.get('judged_fingerprint') or 'unknown'}`), of one training (seed {seed}); the "
        "intervals (Clopper-Pearson) are about other images, not other trainings. Attacks:",
        "", *(attacks or ["- none"]), *warnings,
    ])  # fmt: skip


def settings_text(checkpoint: dict[str, Any], summary: dict[str, Any]) -> str:
    values = {k: v for k, v in checkpoint["config"].items() if v is not None and k != "data_dir"}
    rows = [f"| {k} | {v} |".replace("_", r"\_") for k, v in values.items()]
    return "\n".join([
        "| setting | value |", "|---|---|", *rows, "",
        f"{summary['train_seconds']:.0f} s on " + ", then on ".join(
            place_text(place) for place in summary.get("trained") or [summary]) + ".",
    ])  # fmt: skip


def place_text(place: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in place["versions"].items() if v)
    return f"{place['device']}; {versions}; commit {place['git'] or 'unknown'}"

"""Checkpoints: plain tensors and numbers, written atomically, loaded without running code."""

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.data.datasets import Data
from bench.files import replacing
from bench.models import build_model
from bench.settings.config import Config

FORMAT = "fastsam-bench-1"
ENTRIES = ("config", "classes", "channels", "model")


def save_checkpoint(path: Path, config: Config, data: Data, model: nn.Module, **more: Any) -> None:
    """Write the model with all that rebuilds it: config, classes, channels, data fingerprint.

    more: entries to keep beside it, such as the optimizer's state_dict.
    """
    checkpoint = {
        "format": FORMAT,
        "config": asdict(config),
        "classes": data.classes,
        "channels": data.channels,
        "fingerprint": data.fingerprint,
        "test_fingerprint": data.test_fingerprint,
        "model": model.state_dict(),
        **more,
    }
    with replacing(path) as tmp:
        try:
            torch.save(checkpoint, tmp)
        except RuntimeError as e:  # what torch says of a full disk
            raise OSError(f"the disk may be full; torch: {str(e).splitlines()[0]}") from e


def refuse_wrong_sums(path: Path) -> None:
    """Raise ValueError where a zip file's contents are not those of its checksums, at which
    torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        if (entry := archive.testzip()) is not None:
            raise ValueError(f"{entry} is damaged")


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Return what save_checkpoint wrote. Raises ValueError when the file is something else or
    damaged."""
    wanted = "give a last.pt or best.pt that `python -m bench train` wrote"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}; {wanted}")
    damaged = (
        f"{str(path)!r} is not a readable checkpoint; {wanted}, or remove its run's last.pt and "
        "best.pt and train again"
    )
    if not zipfile.is_zipfile(path):  # the container of torch.save
        raise ValueError(damaged)
    try:
        refuse_wrong_sums(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # of damaged bytes anything can come
        raise ValueError(damaged) from e
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is a checkpoint of another program; {wanted}, "
                         "or see docs/evaluation.md for a network of your own")
    if missing := [key for key in ENTRIES if key not in checkpoint]:
        raise ValueError(f"{str(path)!r} has no {missing[0]}; {wanted}, or remove it and train "
                         "again")  # fmt: skip
    return checkpoint


def changed_data(known: dict[str, Any], data: Data) -> str:
    """Return in words which images are others than when a checkpoint or summary was made, or "".

    A missing fingerprint was made before there was one, and is not compared.
    """
    parts = {"training": ("fingerprint", data.fingerprint),
             "test": ("test_fingerprint", data.test_fingerprint)}  # fmt: skip
    changed = [part for part, (key, now) in parts.items() if (known.get(key) or now) != now]
    return " and ".join(changed)


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Copy the checkpoint's weights into the model, or raise ValueError if they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as e:
        config = checkpoint["config"]
        raise ValueError(
            f"{str(path)!r} holds the weights of another model than its config's "
            f"{config['model']} of width {config['width']}; use the checkpoint of that run"
        ) from e


def rebuild(checkpoint: dict[str, Any], path: Path, device: str = "cpu") -> nn.Module:
    """Return the checkpoint's model in eval mode."""
    config, channels = checkpoint["config"], checkpoint["channels"]
    placeholder = [1.0] * channels  # mean and std are among the weights
    model = build_model(
        config["model"], config["width"], channels, len(checkpoint["classes"]),
        placeholder, placeholder,
    )  # fmt: skip
    load_weights(model, checkpoint, path)
    return model.to(device).eval()


def load_model(path: str | Path, device: str = "cpu") -> nn.Module:
    """Return the trained model of a checkpoint: (B, C, H, W) in [0, 1] -> (B, classes) logits.

    Architecture, classes and normalisation come from the file; nothing else is needed. Raises
    ValueError when the file is missing or is no checkpoint of `python -m bench train`.
    """
    return rebuild(load_checkpoint(Path(path), device), Path(path), device)

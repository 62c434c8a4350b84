"""Start a network from the weights of another training, for transfer."""

import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from bench.training.checkpoint import FORMAT, refuse_wrong_sums

HOLDERS = ("model", "state_dict", "model_state_dict", "module")  # under which others save them
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, wrappers
SHOWN = 4  # names in a message


def start_from(model: nn.Sequential, path: Path) -> None:
    """Copy the weights in a file into the model, normalisation excepted.

    path: a checkpoint of `bench train`, or a state_dict that torch.save wrote, by itself or under
    one of HOLDERS, its names with PREFIXES or without. Its last layer may be for another number of
    classes and is then left as it is initialised, with a warning. Raises ValueError for a missing
    or unreadable file and for weights of another network, with what does not fit.
    """
    network = model[1]
    network = getattr(network, "net", network)  # a library's, behind its resizing
    own = network.state_dict()
    found = without_prefixes(read_weights(path), own)
    fits = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
    head = set(list(own)[-2:]) & found.keys() - fits.keys()
    counters = {k for k in own if k.endswith("num_batches_tracked")} - found.keys()
    wrong = (found.keys() | own.keys()) - fits.keys() - head - counters
    if wrong:
        raise ValueError(
            f"{str(path)!r} holds the weights of another network: {len(wrong)} tensors do not fit, "
            f"{listed(wrong, found, own)}"
        )
    if head:
        warnings.warn(
            f"{str(path)!r} is for other classes, so these start anew: {listed(head, found, own)}",
            stacklevel=2,
        )
    network.load_state_dict(own | fits)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return names and tensors of a file; of a checkpoint of this bench, without normalisation."""
    if not path.is_file():
        raise ValueError(f"no weights at {str(path)!r}; pass --weights FILE, a saved state_dict")
    try:
        if is_zipfile(path):
            refuse_wrong_sums(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of other people's bytes anything can come
        first_line = str(e).strip().splitlines()[:1]
        raise ValueError(f"{str(path)!r} holds no weights that can be read {first_line}") from e
    if isinstance(found, dict) and found.get("format") == FORMAT:
        weights = found["model"]  # "0.": normalisation, "1.": the network
        return {k.removeprefix("1."): v for k, v in weights.items() if not k.startswith("0.")}
    for key in HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    found = found if isinstance(found, dict) else {}
    return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}


def without_prefixes(found: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the network's names, as far as every name has the same prefix."""
    while found and not found.keys() & own.keys():
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in found)), None)
        if prefix is None:
            break
        found = {k.removeprefix(prefix): v for k, v in found.items()}
    return found


def listed(names: set[str], found: dict[str, Any], own: dict[str, Tensor]) -> str:
    """Return the first few names, each with why it does not fit."""

    def why(name: str) -> str:
        if name not in found:
            return "is missing"
        if name not in own:
            return "is not the network's"
        return f"is {tuple(found[name].shape)} and not {tuple(own[name].shape)}"

    texts = [f"{name!r} {why(name)}" for name in sorted(names)[:SHOWN]]
    return "; ".join(texts + ["..."] * (len(names) > SHOWN))

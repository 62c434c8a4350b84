"""Start a network from the weights of another training, for transfer."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from bench.training.checkpoint import FORMAT, refuse_wrong_sums

HOLDERS = (  # under which others save them; where there are several, the first is meant
    "model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict",
)  # fmt: skip
# of DataParallel, torch.compile, wrappers, and a network behind its normalisation
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "1.")
SHOWN = 4  # names in a message


def start_from(model: nn.Sequential, path: Path) -> None:
    """Copy the weights in a file into the model, normalisation excepted.

    path: a checkpoint of `bench train`, or a state_dict that torch.save wrote, by itself or under
    one of HOLDERS, its names with PREFIXES or without. Its last layer may be for another number of
    classes and is then left as it is initialised, with a warning; so are tensors that lie beside
    the network's. Raises ValueError for a missing or unreadable file and for weights of another
    network, with what does not fit, or that are not finite.
    """
    network = model[1]
    network = getattr(network, "net", network)  # a library's, behind its resizing
    own = network.state_dict()
    found, beside = without_prefixes(read_weights(path), own)
    fits = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
    head = set(list(own)[-2:]) & found.keys() - fits.keys()
    counters = {k for k in own if k.endswith("num_batches_tracked")} - found.keys()
    wrong = (found.keys() | own.keys()) - fits.keys() - head - counters
    if wrong:
        raise ValueError(
            f"{str(path)!r} holds the weights of another network: {len(wrong)} tensors do not fit, "
            f"{listed(wrong, found, own)}"
        )
    if lost := [k for k, v in fits.items() if not v.isfinite().all()]:
        raise ValueError(f"{str(path)!r} holds NaN or inf, in {lost[0]!r}; give other weights")
    if beside:
        warnings.warn(f"{str(path)!r} holds more than the network, which is left out: "
                      f"{shortened(map(repr, beside))}", stacklevel=2)  # fmt: skip
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
        code = "weights_only" in str(e)
        why = ("it is a pickled object, whose code is not run; save its state_dict()" if code else
               "it is damaged, or torch.save did not write it")  # fmt: skip
        raise ValueError(f"{str(path)!r} holds no weights that can be read: {why}") from e
    if isinstance(found, dict) and found.get("format") == FORMAT:
        weights = found["model"]  # "0.": normalisation, "1.": the network
        return {k.removeprefix("1."): v for k, v in weights.items() if not k.startswith("0.")}
    weights = tensors_in(found, path)
    if not weights:
        what = f", but {shortened(map(repr, found))}" if isinstance(found, dict) and found else ""
        raise ValueError(f"{str(path)!r} holds no names and tensors{what}; save a state_dict(), by "
                         "itself or under 'state_dict'")  # fmt: skip
    return weights


def tensors_in(found: Any, path: Path) -> dict[str, Tensor]:
    """Return names and tensors of what torch.load gave, from below its HOLDERS."""
    while isinstance(found, dict) and (
        holders := [key for key in HOLDERS if isinstance(found.get(key), dict)]
    ):
        if len(holders) > 1:
            warnings.warn(
                f"{str(path)!r} holds weights under {', '.join(map(repr, holders))}; those of "
                f"{holders[0]!r} are taken", stacklevel=4,
            )  # fmt: skip
        found = found[holders[0]]
    found = found if isinstance(found, dict) else {}
    return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}


def without_prefixes(
    found: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under the network's names, and the names without the prefix that most
    have."""
    beside: list[str] = []
    while found and not found.keys() & own.keys():
        prefix = max(PREFIXES, key=lambda p: sum(k.startswith(p) for k in found))
        with_it = {k: v for k, v in found.items() if k.startswith(prefix)}
        if not with_it:
            break
        beside += found.keys() - with_it.keys()
        found = {k.removeprefix(prefix): v for k, v in with_it.items()}
    return found, sorted(beside)


def shortened(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts[:SHOWN] + ["..."] * (len(texts) > SHOWN))


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

"""Start a network from the weights of another training, for transfer."""

import pickle
from pathlib import Path

import torch
from torch import nn


def start_from(model: nn.Module, path: Path) -> None:
    """Copy the weights in a file into the model, normalisation excepted.

    path: a state_dict that torch.save wrote, by itself or under "model" or "state_dict". Its last
    layer may be for another number of classes and is then left as it is initialised. Raises
    ValueError for a missing or unreadable file and for weights of another network.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {str(path)!r}; pass --weights FILE, a saved state_dict")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as e:
        first_line = str(e).strip().splitlines()[:1]
        raise ValueError(f"{str(path)!r} holds no weights that can be read {first_line}") from e
    for key in ("model", "state_dict"):
        found = found.get(key, found) if isinstance(found, dict) else {}
    network = model[1]
    network = getattr(network, "net", network)  # a library's, behind its resizing
    own = network.state_dict()
    head = set(list(own)[-2:]) & found.keys()
    fits = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
    wrong = (found.keys() | own.keys()) - fits.keys() - head
    if wrong:
        raise ValueError(
            f"{str(path)!r} holds the weights of another network: {len(wrong)} tensors do not fit, "
            f"such as {sorted(wrong)[0]!r}"
        )
    network.load_state_dict(own | fits)

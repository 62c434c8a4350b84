"""Who is timed: every optimizer that can do a method here, and the bytes that a step must move."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.speed.baselines import (
    PerParameterFriendlySAM,
    PerParameterSAM,
    pytorch_optimizer_classes,
    why_not_compile,
)
from fastsam import GSAM, SAM, FriendlySAM, LookSAM, MomentumSAM
from fastsam.choose import BACKENDS

FRIENDLY, ADAPTIVE = ("fsam", "fasam"), ("asam", "fasam")
KEEPING = ("gsam", "looksam")  # the first pass's gradient, for the second
RELATIVES = {"msam": MomentumSAM, "gsam": GSAM, "looksam": partial(LookSAM, k=1)}
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
BASE_STATES = {"sgd": 1, "adamw": 2}  # v, or m1 and v2


@dataclass(frozen=True)
class Contender:
    """One implementation of a method.

    build: makes the optimizer of parameters, from the arguments by name that it takes.
    state: bytes of an element of its states. convention: Friendly-SAM's, as FriendlySAM's.
    exact: it claims the method's mathematics, so failing parity is an error; without the claim
    failing parity marks its rows "speed only".
    """

    method: str
    name: str
    build: Callable[..., Any]
    state: int
    convention: str = "algorithm1"
    exact: bool = True

    def optimizer(self, params: list[nn.Parameter], hyper: dict[str, Any]) -> Any:
        """hyper: rho, sigma, lmbda and the base optimizer's arguments; what does not belong to
        the method is left out."""
        friendly = ("sigma", "lmbda") if self.method in FRIENDLY else ()
        own = ("rho", *friendly) if self.method != "sgd" else ()
        own += ("alpha",) if self.method in KEEPING else ()
        perturbation = ("rho", "sigma", "lmbda", "alpha")
        arguments = {k: x for k, x in hyper.items() if k in own or k not in perturbation}
        return self.build(params, **arguments)


def kernel_bytes(method: str, base: str, weight: int, state: int = 4) -> dict[str, int]:
    """Return the bytes that each kernel of a step must move per parameter, in the order of their
    launches, each stream once a kernel.

    weight, state: bytes of an element of the weights and gradients, and of the states.
    K1 (norm) reads g, and m or w where the direction needs them. K2 (climb) reads g, w, m and
    writes the saved w, w, m. K3 (step) reads the saved w, g', v and writes w, v.
    """
    step = 3 * weight + 2 * state * BASE_STATES[base]
    if method == "sgd":
        return {"step": step}
    if method == "msam":  # K2 reads v for g, whose norm the step before left
        return {"climb": state + 3 * weight, "step": step}
    if method in KEEPING:  # K2 keeps g, which K0, beside g', and K3 read; LookSAM's K3 writes g_v
        return {"norm": weight, "climb": 4 * weight + state, "dots": weight + state,
                "step": step + state + state * (method == "looksam")}  # fmt: skip
    m, w = state * (method in FRIENDLY), weight * (method in ADAPTIVE)
    return {"norm": weight + w + m, "climb": 4 * weight + 2 * m, "step": step}


def bytes_per_parameter(method: str, base: str, weight: int, state: int) -> int:
    """Return the bytes that a step must move per parameter."""
    return sum(kernel_bytes(method, base, weight, state).values())


def adaptive(method: str) -> dict[str, bool]:
    return {} if method == "sgd" else {"adaptive": method in ADAPTIVE}


def of_fastsam(methods: tuple[str, ...], base: str, dtype: torch.dtype, device: torch.device,
               graph: bool) -> tuple[list[Contender], list[str]]:  # fmt: skip
    """Return a contender per method and usable backend, and why the other backends are not."""
    found, left_out = [], []
    for backend in BACKENDS:
        p = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        try:
            fused = SAM([p], BASES[base], backend=backend, lr=0.1).backend_report()["fused_base"]
        except ValueError as e:
            left_out.append(f"fastsam {backend}: {e}")
            continue
        if backend == "triton" and device.type == "cpu":
            left_out.append("fastsam triton: on a CPU it is Triton's interpreter, no speed")
            continue
        if graph and not fused:
            left_out.append(f"fastsam {backend}: over {base} its step waits for the device")
            continue
        for method in methods:
            cls = RELATIVES.get(method, FriendlySAM if method in FRIENDLY else SAM)
            own = {} if method in RELATIVES else adaptive(method)
            build = partial(cls, base_optimizer=BASES[base], backend=backend, **own)
            found.append(Contender(method, f"fastsam {backend}", build, state=4))
    return found, left_out


def of_torch(base: str, state: int, graph: bool) -> list[Contender]:
    """Return torch's own forms of the base optimizer."""
    extra = {"capturable": True} if graph and base == "adamw" else {}
    return [
        Contender("sgd", " ".join(["torch", *form]), partial(BASES[base], **form, **extra), state)
        for form in ({}, {"foreach": True}, {"fused": True})
    ]


def of_peers(methods: tuple[str, ...], base: str, state: int, graph: bool,
             compiled: bool) -> tuple[list[Contender], list[str]]:  # fmt: skip
    """Return the SAM and Friendly-SAM classes of others' making, and who is not installed."""
    own, package = (PerParameterSAM, PerParameterFriendlySAM), pytorch_optimizer_classes()
    extra = {"capturable": True} if graph and base == "adamw" else {}
    kinds = [("per-parameter", own, extra)]
    kinds += [("per-parameter compiled", own, extra | {"compiled": True})] if compiled else []
    kinds += [("pytorch_optimizer", package, extra)] if package else []
    found = []
    for method in methods:
        for name, classes, arguments in kinds if method not in ("sgd", *RELATIVES) else ():
            cls = classes[method in FRIENDLY]
            build = partial(cls, base_optimizer=BASES[base], **adaptive(method), **arguments)
            # some versions of pytorch_optimizer average the corrected gradient in F-SAM
            exact = classes is own or method not in FRIENDLY
            found.append(Contender(method, name, build, state, "official", exact))
    return found, [] if package else ["pytorch_optimizer: not installed"]


def contenders(
    methods: tuple[str, ...],
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    graph: bool = False,
    compiled: bool | None = False,
) -> tuple[list[Contender], list[str]]:
    """Return whom to time, ordered by method, and a line for everyone who is left out.

    compiled: also time the per-parameter peers through torch.compile; None: on a GPU, if it works.
    Raises ValueError when `compiled` is asked for and torch.compile does not work here.
    """
    obstacle = None
    if compiled or (compiled is None and device.type == "cuda"):
        obstacle = why_not_compile(device)
        if obstacle and compiled:
            raise ValueError(f"torch.compile does not work here ({obstacle}); leave --compile out")
        compiled = obstacle is None
    state = dtype.itemsize  # others' states have the parameters' dtype
    found, left_out = of_fastsam(methods, base, dtype, device, graph)
    peers, missing = of_peers(methods, base, state, graph, bool(compiled))
    found += peers + (of_torch(base, state, graph) if "sgd" in methods else [])
    left_out += missing + ([f"per-parameter compiled: {obstacle}"] if obstacle else [])
    return sorted(found, key=lambda c: methods.index(c.method)), left_out

"""A backend's four functions over hand-made spaces, without the optimizer, beside an oracle."""

import math
from types import ModuleType

import torch

from fastsam.hyper import hyper_row, scaling_of
from fastsam.passes import Climb, Pass
from fastsam.reference import projection
from fastsam.space import NOWHERE, Kind, Space, Tables, same_layout

from .lockstep import Lockstep
from .oracle import Oracle, exact
from .variants import VARIANTS, Variant, full_gradient

GAP = math.nan  # stands where nobody may read or write


def climb_of(variant: Variant) -> tuple[str | None, str | None, str | None]:
    """What the variant's own class says of its climb: `Kind.mode`, the projection, and
    `Pass.scaling`."""
    opt = variant.cls([torch.nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1,
                      backend="reference", **variant.own)
    traits, (group,) = opt._traits, opt.param_groups
    return traits.mode, traits.projection, traits.scales_with if group["adaptive"] else None


def base_of(base: str, groups: list[dict]) -> str:
    """`Kind.base` of "sgd", "adam" or "adamw" over these groups."""
    if base != "sgd":
        return "adam"
    return "sgd-momentum" if any(g.get("momentum") for g in groups) else "sgd"


def spaces_of(params, groups: list[dict], mode: str | None, base: str, masters: bool,
              ) -> list[Space]:
    """One space per dtype, with NaN in the gaps and in what a climb must write first."""
    kinds: dict[torch.dtype, list] = {}
    for i, group in enumerate(groups):
        for j in group["params"]:
            kinds.setdefault(params[j].dtype, []).append((params[j], None, i))
    spaces = [Space.of(Kind(members[0][0].device, dtype, (), mode, base_of(base, groups),
                            masters), members, len(groups))
              for dtype, members in kinds.items()]
    for space in spaces:
        for buffer in buffers(space):
            buffer[gaps(space)] = GAP
        if not masters:
            space.saved.fill_(GAP)
    return spaces


def buffers(space: Space) -> list[torch.Tensor]:
    return [t for t in (space.saved, space.m, space.v, space.u) if t is not None]


def gaps(space: Space) -> torch.Tensor:
    """Where the flat buffers belong to no slot."""
    free = torch.ones(space.size, dtype=torch.bool, device=space.kind.device)
    for slot in space.slots:
        free[slot.offset:slot.offset + slot.numel] = False
    return free


def laid_out(g: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor | None:
    """g in w's layout, in place where it has it."""
    if g is None or same_layout(g, w):
        return g
    return torch.empty_strided(w.shape, w.stride(), dtype=g.dtype, device=g.device).copy_(g)


class Passes(Lockstep):
    """One backend, of a variant.

    Args:
        params: the parameters.
        groups: dicts with "params", indices into `params`, and what the oracle takes.
        name: of VARIANTS.
        backend: the module.
        base: "sgd", "adam" or "adamw".
        masters: float32 weights are kept for 16-bit parameters.
    """

    def __init__(self, params, groups: list[dict], name: str, backend: ModuleType,
                 base: str = "sgd", masters: bool = False):
        variant = VARIANTS[name]
        self.params, self.groups, self.backend, self.base = params, groups, backend, base
        self.oracle = Oracle(params, groups, base=base, **variant.oracle)
        mode, self.projection, self.scales_with = climb_of(variant)
        self.spaces = spaces_of(params, groups, mode, base, masters)
        self.tables = [Tables(space) for space in self.spaces]
        self.slots = {slot.param: slot for space in self.spaces for slot in space.slots}
        self.climbs: list[Climb] | None = None
        if mode in ("full", "noise"):
            for i, G in enumerate(full_gradient(params)):
                self.slots[params[i]].m.copy_(G)
                self.oracle.m[i] = exact(G)

    # ---- passes

    def passes(self, grads, column: str, scale: float = 1.0) -> list[Pass]:
        """Each space's pass with these gradients, which are multiplied by `scale`."""
        given = {p: laid_out(g, p) for p, g in zip(self.params, grads, strict=True)}
        return [self._pass(space, tables, given, column, scale)
                for space, tables in zip(self.spaces, self.tables, strict=True)]

    def _pass(self, space: Space, tables: Tables, given: dict, column: str, scale: float) -> Pass:
        kind, w = space.kind, [slot.param.detach() for slot in space.slots]
        g = [given[slot.param] for slot in space.slots]
        if column == "g1":
            g = [x if self.groups[slot.group].get("perturb", True) else None
                 for x, slot in zip(g, space.slots, strict=True)]
        g_dtype = next((x.dtype for x in g if x is not None), kind.dtype)
        rows = [hyper_row(self._hyper(group), kind.mode, kind.base) for group in self.groups]
        space.bring_hyper(rows, None)
        ab = [scaling_of(self._hyper(self.groups[slot.group]), self.scales_with, None,
                         slot.param.ndim) for slot in space.slots]
        space.scalings.copy_(torch.tensor(ab))
        inv_scale = space.cells.inv_scale1 if column == "g1" else space.cells.inv_scale2
        inv_scale.fill_(1 / scale)
        return Pass(space, w, g, g_dtype, rows, self.scales_with, ab,
                    inv_scale if scale != 1 else None,
                    tables.bring("w", [x.data_ptr() or NOWHERE for x in w]),
                    tables.bring(column, [0 if x is None else x.data_ptr() or NOWHERE
                                          for x in g]))

    def _hyper(self, group: dict) -> dict:
        merged = {**self.oracle.neutral, **group}
        return {**merged, "decoupled_weight_decay": self.base == "adamw"}

    def _projected(self, passes: list[Pass]) -> list[Pass]:
        if self.projection is None:
            return passes
        for p in passes:
            self.backend.dots(p)
        share = projection(sum(p.space.dots.sum(1) for p in passes), self.projection)
        for p in passes:
            p.space.multiply_sigma(share)
        return [p._replace(rows=[row._replace(sigma=row.sigma * share) for row in p.rows])
                for p in passes]

    # ---- steps

    def first_step(self, grads, scale: float = 1.0) -> None:
        """Climb, as the oracle does with grads / scale."""
        self.follow()
        passes = self._projected(self.passes(grads, "g1", scale))
        for p in passes:
            self.backend.norm(p)
        sums = torch.cat([p.space.partials for p in passes], 1)
        self.climbs = [self.backend.climb(p, sums) for p in passes]
        self.oracle.first_step(unscaled(grads, scale))

    def second_step(self, grads, scale: float = 1.0, found_inf: bool = False) -> None:
        """Return and step; a plain step where nothing climbed."""
        if self.climbs is None:
            self.follow()
        climbs, self.climbs = self.climbs or [None] * len(self.spaces), None
        for p, climb in zip(self.passes(grads, "g2", scale), climbs, strict=True):
            p.space.cells.found_inf.fill_(found_inf)
            self.backend.step(p, climb)
        self.oracle.second_step(unscaled(grads, scale), found_inf)

    def restore(self) -> None:
        for climb in self.climbs:
            for slot, moved in zip(climb.space.slots, climb.moved, strict=True):
                if moved:
                    slot.param.detach().copy_(slot.saved)
        self.climbs = None
        self.oracle.restore()

    # ---- what came of it

    @property
    def is_perturbed(self) -> bool:
        return self.climbs is not None

    @property
    def norm(self) -> float:
        return float(self.spaces[0].cells.norm)

    @property
    def skipped(self) -> int:
        return int(self.spaces[0].cells.skipped)

    def state(self, i: int, letter: str) -> torch.Tensor | None:
        return getattr(self.slots[self.params[i]], letter)

    def weight(self, i: int) -> torch.Tensor:
        slot = self.slots[self.params[i]]
        masters = next(s for s in self.spaces if slot in s.slots).kind.masters
        return slot.saved if masters else slot.param.detach()

    def check_gaps(self) -> None:
        """What lies between the slots is as it was."""
        for space in self.spaces:
            for buffer in buffers(space):
                assert buffer[gaps(space)].isnan().all()


def unscaled(grads, scale: float) -> list:
    return [None if g is None else exact(g) / scale for g in grads]

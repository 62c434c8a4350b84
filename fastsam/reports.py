"""What an optimizer tells of itself."""

from typing import Any

from torch.optim import Optimizer

from .layout import Layout, Traits


def backend(layout: Layout, traits: Traits) -> dict[str, Any]:
    """See `SAM.backend_report`."""
    spaces = [f"{len(s.slots)} tensors, {s.numel} parameters, {s.kind.dtype} on {s.kind.device}"
              + (", float32 masters" if s.kind.masters else "")
              + (", sharded" if s.kind.shards else "") for s in layout.spaces]
    return {**layout.report, "fused_base": traits.base is not None, "spaces": spaces}


def memory(layout: Layout) -> dict[str, int]:
    """See `SAM.memory_report`."""
    report = dict.fromkeys(("backup", "ema", "base", "other"), 0)
    for s, tables in zip(layout.spaces, layout.tables, strict=True):
        for name, t in (("backup", s.saved), ("ema", s.m), ("ema", s.kept), ("base", s.v),
                        ("base", s.u)):
            report[name] += 0 if t is None else t.nbytes
        report["other"] += sum(t.nbytes for t in (
            s.steps, s.partials, s.radii, s.dots, s.control, s.counters, s.hyper, s.scalings,
            s.layout, *s.tables_of_blocks, *tables.columns))
    return report


def line(torchs: str, base: Optimizer, layout: Layout | None, interval: int, start: int,
         masters: bool) -> str:
    """The optimizer in words: torch's own, and before the groups what was chosen."""
    head, _, groups = torchs.partition("(")
    report = layout.report if layout else {}
    options = "".join(f", {name}={value}" for name, value, usual in (
        ("interval", interval, 1), ("start", start, 0), ("master_weights", masters, False),
    ) if value != usual)
    return (f"{head}(base={type(base).__name__}, backend={report.get('backend')!r}{options}"
            f"{groups}")

"""Tables and figures of the optimizer step, from rows alone: `python -m bench report --step`."""

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.files import row_of, write_text
from bench.reports.tables import markdown
from bench.settings.names import method_name
from bench.settings.speed import STEPPED

SETTING = ("device", "threads", "base", "dtype", "graph", "keep_memory")
NEEDED = (
    *SETTING, "method", "implementation", "speed_only", "workload", "parameters", "tensors", "ms",
    "bytes_per_parameter", "gb_per_s", "of_copy", "of_triad", "launches", "state_bytes",
    "bandwidth", "versions", "git", "reps",
)  # fmt: skip


def read_rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the step rows of JSONL files; of equal measurements the last one.

    Raises ValueError naming the file, and the line, that is missing, empty or no row of a step.
    """
    latest: dict[tuple, dict[str, Any]] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not there; `bench step --rows {path}` writes it")
        lines = path.read_text().splitlines()
        if not lines:
            raise ValueError(f"{str(path)!r} is empty; `bench step --rows {path}` appends to it")
        for i, line in enumerate(lines, 1):
            row = row_of(line, f"{str(path)!r}, line {i},", NEEDED, "step")
            what = ("workload", "parameters", "tensors", "method", "implementation")
            latest[tuple(row[k] for k in SETTING + what)] = row
    return list(latest.values())


def setting(row: dict[str, Any]) -> str:
    """Return what rows must share to be compared, in words."""
    graph = ", in CUDA graphs" if row["graph"] else ""
    kept = ", freed memory kept" if row["keep_memory"] else ""
    plural = "s" * (row["threads"] != 1)
    threads = f", {row['threads']} thread{plural}" if row["device"].startswith("cpu") else ""
    return f"{row['device']}{threads}, over {row['base']}, {row['dtype']}{graph}{kept}"


def by_setting(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    ordered = sorted(rows, key=setting)  # stable: the rows' own order within a setting
    return [(name, list(group)) for name, group in groupby(ordered, setting)]


def name_of(row: dict[str, Any]) -> str:
    """The method's name; "sgd" is the base optimizer's plain step, whichever the base is."""
    return method_name(row["base"] if row["method"] == "sgd" else row["method"])


def short(x: float) -> str:
    """Three digits: 0.0123, 1.23, 123, 1234."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def step_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, in their order."""
    head = ["method", "implementation", "parameters", "tensors", "ms (p20-p80)", "B/param", "GB/s",
            "of copy", "of triad", "launches", "kept B/param"]  # fmt: skip
    lines = []
    for row in rows:
        ms, note = row["ms"], " (speed only)" if row["speed_only"] else ""
        lines.append([
            name_of(row), row["implementation"] + note, f"{row['parameters']:,}",
            str(row["tensors"]), f"{short(ms['p50'])} ({short(ms['p20'])}-{short(ms['p80'])})",
            str(row["bytes_per_parameter"]), short(row["gb_per_s"]), f"{row['of_copy']:.0%}",
            f"{row['of_triad']:.0%}", "-" if row["launches"] is None else str(row["launches"]),
            f"{row['state_bytes'] / row['parameters']:.1f}",
        ])  # fmt: skip
    return markdown(head, lines)


def commit(git: str | None) -> str:
    """ "0f1e2d3c4b...-dirty" -> "0f1e2d3-dirty" """
    return "none" if git is None else git[:7] + "-dirty" * git.endswith("-dirty")


def step_caption(rows: list[dict[str, Any]]) -> str:
    """Return what the numbers of one setting's table are and where they come from."""
    speeds = [median(row["bandwidth"][kind] for row in rows) for kind in ("copy", "triad")]
    packages = ("torch", "triton", "numpy", "pytorch_optimizer", "cuda", "driver")
    used = [f"{k} {rows[-1]['versions'][k]}" for k in packages if rows[-1]["versions"].get(k)]
    gits = sorted({commit(row["git"]) for row in rows})
    on_cpu = (
        "\nA CPU's copy also reads where it writes, which is not counted; an update in place need "
        "not, and can be above 100%."
    ) * rows[0]["device"].startswith("cpu")
    only = "\nSpeed only: does not compute the method." * any(row["speed_only"] for row in rows)
    return (
        f"Optimizer step alone, both passes' gradients given; cold caches; median (20th-80th "
        f"percentile) of {' or '.join(map(str, sorted({row['reps'] for row in rows})))} steps.\n"
        f"B/param: what the method must move by the budget; GB/s: that over the median time; of a "
        f"copy at {speeds[0]:.3g} and a triad at {speeds[1]:.3g} GB/s.\nKept: the most that the "
        f"optimizer holds beside weights and gradients.{on_cpu}{only}\n"
        f"{', '.join(used)}; commit {', '.join(gits)}."
    )


def step_report(rows: list[dict[str, Any]]) -> str:
    """Return title, table and caption of every setting in the rows, as Markdown."""
    parts = []
    for name, group in by_setting(rows):
        group = sorted(
            group, key=lambda r: (r["parameters"], r["tensors"], STEPPED.index(r["method"]))
        )
        parts.append(f"### {name}\n\n{step_table(group)}\n\n{step_caption(group)}")
    return "\n\n".join(parts)


def same_tensors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows to draw against parameters: each number of them in its fewest tensors."""
    fewest: dict[int, int] = {}
    for row in rows:
        n = row["parameters"]
        fewest[n] = min(row["tensors"], fewest.get(n, row["tensors"]))
    return [row for row in rows if row["tensors"] == fewest[row["parameters"]]]


def same_parameters(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows to draw against tensors: those of the parameter count that has most of
    them, the largest such count."""
    tensors: dict[int, set[int]] = {}
    for row in rows:
        tensors.setdefault(row["parameters"], set()).add(row["tensors"])
    most = max(tensors, key=lambda n: (len(tensors[n]), n))
    return [row for row in rows if row["parameters"] == most]


def plot_steps(rows: list[dict[str, Any]], against: str, path: Path) -> None:
    """Draw time per step against "parameters" or "tensors": a row of panels per setting, a panel
    per method, a line per implementation, bars from the 20th to the 80th percentile."""
    from bench.reports.figures import plt, save, style

    select = {"parameters": same_tensors, "tensors": same_parameters}[against]
    settings = [(name, select(group)) for name, group in by_setting(rows)]
    methods = {name: sorted({row["method"] for row in group}, key=STEPPED.index)
               for name, group in settings}  # fmt: skip
    most = max(map(len, methods.values()))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, grid = plt.subplots(
        len(settings), most, squeeze=False, sharey="row", layout="constrained",
        figsize=(1.5 + 2.6 * most, 0.8 + 2.8 * len(settings)),
    )  # fmt: skip
    for panels, (title, group) in zip(grid, settings, strict=True):
        fixed = f", {group[0]['parameters']:,} parameters" if against == "tensors" else ""
        panels[0].annotate(title + fixed, (0, 1), (0, 19), "axes fraction", "offset points",
                           fontsize=9, in_layout=False)  # fmt: skip
        panels[0].set_ylabel("ms per step")
        for panel in panels[len(methods[title]) :]:
            panel.remove()
        for panel, method in zip(panels, methods[title], strict=False):
            draw_panel(panel, [row for row in group if row["method"] == method], against, names)
            name_ticks(panel, {row[against] for row in group})
    handles = [plt.Line2D([], [], markersize=4, label=name, **style(i))
               for i, name in enumerate(names)]  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    save(figure, path)


def draw_panel(panel: Any, rows: list[dict[str, Any]], against: str, names: list[str]) -> None:
    from bench.reports.figures import style

    for i, name in enumerate(names):
        line = sorted((r for r in rows if r["implementation"] == name), key=lambda r: r[against])
        if not line:
            continue
        p20, p50, p80 = ([row["ms"][p] for row in line] for p in ("p20", "p50", "p80"))
        below = [m - low for m, low in zip(p50, p20, strict=True)]
        above = [high - m for m, high in zip(p50, p80, strict=True)]
        panel.errorbar([row[against] for row in line], p50, [below, above], markersize=4,
                       capsize=2, **style(i))  # fmt: skip
    panel.set_title("\n" + name_of(rows[0]), fontsize=9, weight="bold")  # below the row's own
    panel.set(xscale="log", yscale="log", xlabel=against)
    panel.grid(alpha=0.3)


def counted(n: int) -> str:
    """56 -> "56", 65536 -> "66k", 4194304 -> "4.2M" """
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.0f}{unit}" if n >= 10 * size else f"{n / size:.2g}{unit}"
    return str(n)


def name_ticks(panel: Any, values: set[int]) -> None:
    """Name the values on the panel's logarithmic axis, but of two closer than an eighth of it the
    smaller alone."""
    least, most = min(values), max(values)
    ticks = [least]
    for value in sorted(values)[1:]:
        if value / ticks[-1] > (most / least) ** (1 / 8):
            ticks.append(value)
    panel.set_xticks(ticks, list(map(counted, ticks)), fontsize=8)
    panel.set_xticks([], minor=True)
    beside = 1.1 * (most / least) ** 0.06
    panel.set_xlim(least / beside, most * beside)


def report_steps(paths: list[Path], out: Path) -> list[Path]:
    """Write step.md, step-parameters.png and step-tensors.png from the rows in `paths` to `out`,
    print the table, and return the files' paths. Raises ValueError as `read_rows`."""
    rows = read_rows(paths)
    out.mkdir(parents=True, exist_ok=True)
    text = step_report(rows)
    written = [out / "step.md", out / "step-parameters.png", out / "step-tensors.png"]
    write_text(written[0], text + "\n")
    for against, path in zip(("parameters", "tensors"), written[1:], strict=True):
        plot_steps(rows, against, path)
    print(text + "\n")
    print("\n".join(f"wrote {path}" for path in written))
    return written

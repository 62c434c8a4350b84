"""One name for a method: in tables, in legends, in the documents."""

import json
import re
from itertools import combinations

import numpy as np
import pytest

from bench.experiments.compare import table as compare_table
from bench.experiments.sweep import by_setting
from bench.experiments.sweep import table as sweep_table
from bench.provenance import ROOT
from bench.reports import figures as drawing
from bench.reports.statistics import aggregate
from bench.settings.methods import ADVERSARIES, OPTIMIZERS
from bench.settings.names import ADVERSARY_NAMES, OPTIMIZER_NAMES, in_figures, method_name

RESULTS = ROOT / "bench" / "results" / "cifar6k.jsonl"
ROWS = [json.loads(line) for line in RESULTS.read_text().splitlines()]
METHODS = list(dict.fromkeys(row["method"] for row in ROWS))
NAMES = [*OPTIMIZER_NAMES.values(), *ADVERSARY_NAMES.values()]
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def test_every_method_has_one_name_of_its_own():
    assert set(OPTIMIZER_NAMES) == set(OPTIMIZERS)
    assert set(ADVERSARY_NAMES) == set(ADVERSARIES)
    assert len(set(NAMES)) == len(NAMES)
    assert method_name("sgd") == "SGD" and method_name("at-linf") == "AT (PGD, l_inf)"
    assert method_name("at-l2+fsam") == "AT (PGD, l2) + Friendly-SAM"
    assert in_figures(method_name("at-linf")) == r"AT (PGD, $\ell_\infty$)"
    with pytest.raises(ValueError, match="unknown method"):
        method_name("SGD")


def first_cells(text):
    """The first cells of Markdown tables whose first column is of methods."""
    found, of_methods = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("|"):
            of_methods = False
        elif cells[0] == "method":
            of_methods = True
        elif of_methods and not set(cells[0]) <= set("-: "):
            found.append(cells[0])
    return found


def test_tables_and_legends_agree(tmp_path, monkeypatch):
    rows = [aggregate(m, [row for row in ROWS if row["method"] == m]) for m in METHODS]
    for i, row in enumerate(rows):
        row["relative_cost"] = 1.0 + i
    names = list(map(method_name, METHODS))
    assert first_cells(compare_table(rows)) == names
    assert first_cells(sweep_table(by_setting(ROWS, []))) == names
    legends = []

    def keep(figure, path):
        (legend,) = [panel.get_legend() for panel in figure.axes if panel.get_legend()]
        legends.append([text.get_text() for text in legend.get_texts()])
        drawing.plt.close(figure)

    monkeypatch.setattr(drawing, "save", keep)
    drawing.plot_eps(rows, tmp_path / "x.png")
    drawing.plot_cost(rows, tmp_path / "x.png")
    shown = list(map(in_figures, names))
    assert legends[0] == shown and legends[1][: len(shown)] == shown


def test_documents_call_methods_by_their_names():
    known = re.compile("|".join(map(re.escape, sorted(NAMES, key=len, reverse=True))))
    seen = set()
    for path in DOCUMENTS:
        for cell in first_cells(path.read_text()):
            match = known.match(cell)
            assert match and cell[match.end() :][:1] in ("", ",", " "), f"{path.name}: {cell!r}"
            seen.add(match[0])
    assert seen >= {"SGD", "SAM", "Friendly-SAM", "AT (PGD, l_inf)", "SAM-full"}


def test_no_document_has_another_name_for_adversarial_training_or_a_method():
    others = re.compile(r"PGD-\d+ AT\b|\bPGD AT\b|\bF-SAM\b|\bFisher SAM\b")
    for path in (p for p in DOCUMENTS if p.name != "packages.md"):  # whose F-SAM is a package
        prose = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.S)
        assert not (found := others.findall(prose)), f"{path.name}: {found}"


def test_the_benchmarks_page_says_how_each_is_called_on_the_command_line():
    page = (ROOT / "docs" / "benchmark.md").read_text()
    for key, name in (OPTIMIZER_NAMES | ADVERSARY_NAMES).items():
        assert re.search(rf"{re.escape(name)}(, | \()`{key}`", page), key


def test_looks_differ_by_more_than_colour():
    """All methods in one picture: each with its own colour and line, line and marker, marker and
    colour; in those beside each other all three differ, and in as many as there are lines, these
    alone."""
    looks = [drawing.style(i) for i in range(len(NAMES))]
    for a, b in combinations(("color", "linestyle", "marker"), 2):
        assert len({(look[a], look[b]) for look in looks}) == len(NAMES), (a, b)
    for a, b in zip(looks, looks[1:], strict=False):
        assert all(a[k] != b[k] for k in ("color", "linestyle", "marker"))
    for i in range(len(looks) - len(drawing.LINES) + 1):
        lines = {look["linestyle"] for look in looks[i : i + len(drawing.LINES)]}
        assert len(lines) == len(drawing.LINES) >= 8


def ink(dashes, places=1000, length=45.0):
    """Where a line of dashes is drawn, at so many places of a legend's length."""
    x = np.arange(places) / places * length % sum(dashes)
    ends = np.cumsum(dashes)
    return np.searchsorted(ends, x, side="right") % 2 == 0


def test_patterns_of_dashes_are_seen_to_differ():
    """In a tenth of the line at least, wherever one begins."""
    patterns = [ink((1, 0)), *map(ink, drawing.DASHES)]
    for a, b in combinations(patterns, 2):
        assert min((a != np.roll(b, shift)).mean() for shift in range(0, 1000, 5)) > 0.1


def test_methods_without_rho_have_lines_of_their_own_too(tmp_path, monkeypatch):
    rows = {m: aggregate(m, [row for row in ROWS if row["method"] == m]) for m in METHODS}
    first, second, *flat = rows.values()
    series = {"one": [(0.1, first), (0.2, second)], "two": [(0.1, second), (0.2, first)]}
    kept = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure))
    drawing.plot_rho(series, flat[:2], tmp_path / "x.png")
    labels = ["one", "two", *(method_name(row["method"]) for row in flat[:2])]
    handles, names = kept[0].axes[0].get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    assert sorted(names) == sorted(map(in_figures, labels))
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 4
    drawing.plt.close("all")


@pytest.mark.parametrize("seeds, wanted", [((0, 1, 2), True), ((0,), False)])
def test_bars_of_the_cost_plot(seeds, wanted, tmp_path, monkeypatch):
    chosen = [row for row in ROWS if row["config"]["seed"] in seeds]
    rows = [aggregate(m, [row for row in chosen if row["method"] == m]) for m in METHODS]
    for row in rows:
        row |= {"relative_cost": 2.0, "relative_cost_std": 0.1 * (len(seeds) > 1)}
    kept = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure))
    drawing.plot_cost(rows, tmp_path / "x.png")
    drawn = kept[0].axes[0].containers
    drawing.plt.close("all")
    assert len(drawn) == 3 * len(METHODS)  # natural, and at two radii
    for bar, (row, name) in zip(drawn, [(r, n) for r in rows for n in (
        "natural", "linf 1/255", "linf 8/255"
    )], strict=True):  # fmt: skip
        std = drawing.accuracies(row)[name][1]
        assert bar.has_yerr == (wanted and std > 0) and bar.has_xerr == wanted

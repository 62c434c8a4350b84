"""The report on training runs: its groups, its tables beside numpy, its page, its commands."""

import base64
import csv
import json
import re
import shlex
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import COMMANDS, main
from bench.attacks.notation import parse_eps
from bench.cli.parse import parse
from bench.cli.shared import evaluation_of
from bench.reports import figures as drawing
from bench.reports import runs
from bench.reports.groups import (
    command,
    deviations,
    published,
    read_runs,
    recipe_of,
    sections_of,
    text_of,
)
from bench.reports.runs import by_rho, csv_of, draw, latex_of, lines_of, notes, titles
from bench.reports.tables import latex, markdown, tex
from bench.settings.config import resolve
from bench.settings.effects import check_effects
from bench.settings.evaluation import resolve_evaluation
from bench.settings.names import method_name
from bench.settings.recipes import load_recipe
from bench.speed.step_report import plot_steps, read_rows

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CIFAR6K = RESULTS / "cifar6k.jsonl"


def made(method="sam", seed=0, natural=0.8, recipe=None, test_images=100, epochs=3, evaluated=None,
         **options):  # fmt: skip
    """Return a run's summary; its robust accuracies follow from the natural one."""
    config = asdict(resolve(method, recipe, {"seed": seed, "epochs": epochs, **options}))
    evaluation = asdict(resolve_evaluation(config["data"], evaluated or {}))
    radii = {"linf": ("1/255", "8/255"), "l2": ("16/255",)}
    attacks = {norm: {eps: f"PGD-{evaluation['steps']}, {norm}, eps {eps}" for eps in of_norm}
               for norm, of_norm in radii.items()}  # fmt: skip

    def at(natural):
        robust = {norm: {eps: natural / (2 + i) for i, eps in enumerate(of_norm)}
                  for norm, of_norm in radii.items()}  # fmt: skip
        return {"natural": natural, "robust": robust}

    row = {
        "method": method, **at(natural), "best": {**at(natural + 0.01), "epoch": 1},
        "images_per_second": 100.0, "train_seconds": 30.0 + seed, "train_images": 500,
        "test_images": test_images, "attacks": attacks, "config": config, "evaluation": evaluation,
        "versions": {"torch": "2.15.0", "triton": None}, "git": "0123abc", "device": "an abacus",
        "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return row | ({"recipe": recipe} if recipe else {})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder, row):
    folder.mkdir(parents=True)
    history = [
        {"epoch": e, "lr": 0.1 / (e + 1), "train_loss": 2 / (e + 1), "train_acc": 0.3 + 0.1 * e,
         "val_acc": 0.2 + 0.1 * e, "seconds": 2.0, "best": True} for e in range(3)
    ]  # fmt: skip
    (folder / "config.json").write_text(json.dumps(row["config"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    (folder / "summary.json").write_text(json.dumps(row))


def sections(tmp_path, rows):
    return sections_of(read_runs([write_rows(tmp_path / "rows.jsonl", rows)])[0])


def cells(text):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]  # fmt: skip


def test_tables_hold_the_means_and_deviations_of_the_committed_rows(tmp_path, capsys):
    assert main(["report", str(CIFAR6K), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    rows = [json.loads(line) for line in CIFAR6K.read_text().splitlines()]
    lines = cells((tmp_path / "table.md").read_text())
    objects = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(objects) == 8 and len(lines) == 2 + 8
    for method in ("sgd", "sam", "fsam", "at-linf"):
        runs = [row for row in rows if row["method"] == method]
        for checkpoint, results in (("last", runs), ("best", [run["best"] for run in runs])):
            (line,) = [cell for cell in lines if cell[:2] == [method_name(method), checkpoint]]
            (row,) = [o for o in objects if (o["method"], o["checkpoint"]) == (method, checkpoint)]
            columns = {"natural": [r["natural"] for r in results]} | {
                f"{norm} {eps}": [r["robust"][norm][eps] for r in results]
                for norm in ("linf", "l2") for eps in results[0]["robust"][norm]
            }  # fmt: skip
            for i, (name, values) in enumerate(columns.items(), 2):
                mean, std = 100 * np.mean(values), 100 * np.std(values, ddof=1)
                assert line[i] == f"{mean:.1f} ± {std:.1f}"
                assert float(row[name]) == pytest.approx(mean)
                assert float(row[f"{name} std"]) == pytest.approx(std)
            assert row["seeds"] == "0 1 2" and line[-3] == "3"
    for text in rows[0]["attacks"]["linf"].values():
        assert f"- {text}" in (tmp_path / "table.md").read_text()


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    rows = [
        made(natural=0.80), made(seed=1, natural=0.90),
        made(rho=0.2), made(epochs=5), made("sgd"),  # in groups of their own
        made(evaluated={"steps": 20}), made(test_images=50), made(data="cifar10"),  # in tables
    ]  # fmt: skip
    first, *others = sections(tmp_path, rows)
    assert [len(section.groups) for section in (first, *others)] == [4, 1, 1, 1]
    labels = ["SGD epochs 3", "SAM epochs 3, rho 0.1", "SAM epochs 3, rho 0.2",
              "SAM epochs 5, rho 0.1"]  # fmt: skip
    assert [g.label for g in first.groups] == labels
    pair = first.groups[1]
    assert pair.seeds == [0, 1] and pair.last["natural"] == pytest.approx(0.85)
    assert pair.best["natural"] == pytest.approx(0.86)
    assert pair.last["natural_std"] == pytest.approx(0.1 / 2**0.5)
    assert "±" in lines_of(pair)[0][2] and "±" not in lines_of(first.groups[0])[0][2]
    assert [others[0].attacks["l2"]["16/255"], others[1].title, others[2].title] == [
        "PGD-20, l2, eps 16/255", "digits, 50 test images", "cifar10, 100 test images"
    ]  # fmt: skip


def test_a_config_without_a_later_field_has_its_default(tmp_path):
    old, new = made(seed=0), made(seed=1)
    del old["config"]["interval"], old["config"]["late"]
    assert [len(g.runs) for g in sections(tmp_path, [old, new])[0].groups] == [2]


def test_of_equal_runs_the_last_counts_and_metrics_stay(tmp_path):
    write_run(tmp_path / "runs" / "sam-seed0", made(natural=0.5))
    (tmp_path / "runs" / "summary.json").write_text("[]")  # a comparison's own
    (tmp_path / "runs" / "sam-seed1").mkdir()
    (tmp_path / "runs" / "sam-seed1" / "config.json").write_text("{}")
    again = write_rows(tmp_path / "rows.jsonl", [
        made(natural=0.6), made(natural=0.7, evaluated={"batch_size": 50}),  # fewer at a time
    ])  # fmt: skip
    rows, unfinished = read_runs([tmp_path / "runs", again])
    assert [row["natural"] for row in rows] == [0.7] and len(rows[0]["history"]) == 3
    assert unfinished == [tmp_path / "runs" / "sam-seed1"]


def test_every_evaluation_of_a_studys_run_is_read(tmp_path):
    folder = tmp_path / "sam-seed0"
    write_run(folder, made())
    for i in (1, 2, 10):
        (folder / f"summary-{i}.json").write_text(json.dumps(made(test_images=i)))
    rows, unfinished = read_runs([tmp_path])
    assert [row["test_images"] for row in rows] == [100, 1, 2, 10] and not unfinished
    assert all(row["history"] for row in rows)
    (folder / "summary.json").unlink()  # a study's rows may hold it
    assert len(read_runs([tmp_path])[0]) == 3


def test_what_evaluations_warned_of_is_beside_the_numbers(tmp_path):
    flat, faint = "the gradient is exactly 0 for 9 of 10 images", "two <passes> differ"
    rows = [made(seed=seed) | {"warnings": [flat]} for seed in (0, 1)]
    rows[1]["best"]["warnings"] = [flat, faint]
    rows += [made("sgd") | {"warnings": []}]
    (section,) = sections(tmp_path, rows)
    said = [line for line in notes(section) if line.startswith("Warning")]
    assert said == [f"Warning: SAM, seeds 0, 1: {flat}.",
                    f"Warning: SAM, best checkpoint, seed 1: {faint}."]  # fmt: skip
    assert main(["report", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    for name in ("table.md", "table.tex", "report.html"):
        assert said[0] in (tmp_path / "out" / name).read_text()
    assert "two &lt;passes&gt; differ" in (tmp_path / "out/report.html").read_text()


def test_images_that_changed_under_one_name_are_told(tmp_path):
    def prints(row, training, test):
        return row | {"fingerprint": training, "test_fingerprint": test, "judged_fingerprint": test}

    def told(*rows):
        (section,) = sections(tmp_path, rows)
        return [line for line in notes(section) if "fingerprints" in line]

    alike = [prints(made(seed=0), "a", "b"), prints(made("sgd"), "a", "b"), made(seed=1)]
    assert told(*alike) == []
    (said,) = told(*alike, prints(made(seed=2), "a", "c"))
    assert "the same test images" in said
    (said,) = told(*alike, prints(made("fsam"), "c", "b"))
    assert "the same training images" in said
    # a label's noise is the seed's own, and other sizes are other pixels
    assert told(*(prints(made(seed=s, label_noise=0.4), f"{s}", "b") for s in range(2))) == []
    assert told(*(prints(made(image_size=s), f"{s}", f"{s}") for s in (8, 16))) == []


@pytest.mark.parametrize("vals, said", [
    ((0.1, 0.2), "after the epoch of the highest validation accuracy."),
    ((0.0, 0.0), "the same, for no image was held out to choose by."),
    ((0.0, 0.1), "after the epoch of the highest validation accuracy, or the last where no image "
     "was held out."),
])  # fmt: skip
def test_what_the_best_checkpoint_is(vals, said, tmp_path):
    rows = [made(method, val=val) for method, val in zip(("sam", "sgd"), vals, strict=True)]
    (section,) = sections(tmp_path, rows)
    assert notes(section)[1] == f"Last: after the last epoch; best: {said}"


def test_held_out_images_are_no_test_images(tmp_path):
    (section,) = sections(tmp_path, [made(evaluated={"on": "held-out"})])
    assert notes(section)[0] == "Accuracy in % on digits, 100 held-out images."


def test_sections_of_one_data_set_are_numbered(tmp_path, monkeypatch):
    rows = [made(data="cifar10"), made(), made(evaluated={"steps": 20}), made(test_images=50)]
    assert titles(sections(tmp_path, rows)) == [
        "cifar10, 100 test images", "digits, 100 test images (digits-1)",
        "digits, 100 test images (digits-2)", "digits, 50 test images",
    ]  # fmt: skip
    out, prefixes = tmp_path / "out", []
    monkeypatch.setattr(runs, "draw", lambda *given: prefixes.append(given[-1]) or {})
    assert main(["report", str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 0
    assert prefixes == ["cifar10", "digits-1", "digits-2", "digits-3"]
    text, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    assert text.count("### digits, 100 test images (digits-2)\n") == 1
    assert page.count("digits, 100 test images (digits-2)</h2>") == 1
    attacks = [row["attacks"] for row in csv.DictReader((out / "table.csv").open())]
    assert attacks[2:] == ["PGD-10"] * 2 + ["PGD-20"] * 2 + ["PGD-10"] * 2


def test_times_of_several_devices_are_named(tmp_path):
    one, two = made(), made(seed=1) | {"device": "a GPU"}
    assert "Times come from several devices: an abacus; a GPU." in notes(
        sections(tmp_path, [one, two])[0]
    )
    assert not any("devices" in note for note in notes(sections(tmp_path, [one])[0]))


def test_rho_is_drawn_beside_the_sgd_of_the_same_setting(tmp_path):
    rows = [made(rho=rho, seed=seed) for rho in (0.4, 0.1) for seed in (0, 1)]
    rows += [made("fsam"), made("sgd"), made("sgd", epochs=9), made(epochs=9)]
    series, plain = by_rho(sections(tmp_path, rows)[0])
    assert {label: [rho for rho, _ in points] for label, points in series.items()} == {
        "SAM epochs 3": [0.1, 0.4]
    }
    assert [group.label for group in plain] == ["SGD epochs 3"]
    rows = [made("fsam", rho=rho, sigma=sigma) for rho in (0.1, 0.4) for sigma in (0.5, 0.9)]
    labels = ["Friendly-SAM sigma 0.5", "Friendly-SAM sigma 0.9"]
    assert list(by_rho(sections(tmp_path, rows)[0])[0]) == labels


# ---- figures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by their file's name, laid out and not written."""
    drawn = {}

    def lay_out(figure, path):
        figure.draw_without_rendering()
        drawn[path.name] = figure

    monkeypatch.setattr(drawing, "save", lay_out)
    yield drawn
    drawing.plt.close("all")


def test_a_legend_of_many_lines_is_inside_its_figure_and_their_looks_differ(tmp_path, figures):
    rows = [made(val=k / 100) for k in range(10, 36)] + [made("sgd", batch_size=128)]
    (section,) = sections(tmp_path, rows)
    draw(section, tmp_path, "x")
    assert len(figures) == 3
    for name, figure in figures.items():
        (legend,) = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1, name
        assert all(panel.bbox.width > 150 and panel.bbox.x1 < box.x0 for panel in figure.axes), name
    looks = [[(line.get_color(), str(line._unscaled_dash_pattern)) for line, *_ in panel.containers]
             for panel in figures["x-accuracy-eps.png"].axes]  # fmt: skip
    looks += [[(line.get_color(), line.get_marker()) for line, *_ in panel.containers]
              for panel in figures["x-trade-off.png"].axes]  # fmt: skip
    (panel,) = figures["x-wall-clock.png"].axes
    labels = [group.label for group in section.groups]
    lines = [line for line in panel.lines if line.get_label() in labels]
    looks.append([(line.get_color(), line.get_marker()) for line in lines])
    assert all(len(of_panel) == len(set(of_panel)) == 27 for of_panel in looks)


def test_radii_fill_the_axis(tmp_path, figures):
    draw(sections(tmp_path, [made()])[0], tmp_path, "x")
    _, panel = figures["x-accuracy-eps.png"].axes  # l2, whose radii are 0 and 16
    assert panel.get_xaxis().get_transform().linthresh == 16


def overlap(panel):
    figure = panel.figure
    boxes = [label.get_window_extent() for label in panel.get_xticklabels() if label.get_text()]
    boxes.sort(key=lambda box: box.x0)
    assert boxes and all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    return any(a.x1 >= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("against", ["parameters", "tensors"])
def test_step_figures_name_what_was_measured_and_have_no_empty_panel(against, tmp_path, figures):
    plot_steps(read_rows([RESULTS / "step.jsonl"]), against, tmp_path / "x.png")
    panels = figures["x.png"].axes
    assert all(panel.lines for panel in panels) and not any(map(overlap, panels))
    methods = ["sgd", "sam", "asam", "fsam", "fasam"]
    names = {"parameters": ["66k", "1M", "4.2M", "11M", "36M"], "tensors": ["14", "56", "224"]}
    last = {"parameters": ["sam", "fsam"], "tensors": methods}[against] + 2 * ["sam", "fsam"]
    assert [panel.get_title().strip() for panel in panels] == [
        method_name(method) for method in methods + last
    ]
    assert [label.get_text() for label in panels[-5].get_xticklabels()] == names[against]
    firsts = panels[0], panels[5], panels[-4], panels[-2]
    for row, cpu in zip(firsts, 2 * ["AMD EPYC"] + 2 * ["@ 2.80GHz"], strict=True):
        (title,) = row.texts
        assert f"{cpu}, 2 threads" in title.get_text()
        box = title.get_window_extent()
        assert 0 <= box.x0 and box.y1 <= figures["x.png"].bbox.y1
        assert box.y0 >= row.title.get_window_extent().y0 + 10  # above the method's name


# ---- the papers


def test_a_recipe_brings_the_papers_numbers(tmp_path):
    name = "sam-at/cifar10/sam-rho0.2"
    paper = load_recipe(name).published
    row = made("sam", recipe=name, epochs=100)
    (group,) = sections(tmp_path, [row, made("sam", seed=1, recipe=name, epochs=100)])[0].groups
    assert deviations(group) == "" and published(group) == paper
    line = lines_of(group)[-1]
    assert line[1] == "paper" and line[2:6] == [
        f"{paper['natural']:g}", f"{paper['linf 1/255']:g}", "", f"{paper['l2 16/255']:g}"
    ]  # fmt: skip
    (section,) = sections(tmp_path, [made("sam", recipe=name, epochs=2, width=8, device="cpu")])
    assert deviations(section.groups[0]) == "width 64 -> 8, epochs 100 -> 2"
    assert lines_of(section.groups[0])[-1][1] == "paper*"
    of_paper = list(csv.DictReader(csv_of([section]).splitlines()))[-1]
    assert of_paper["checkpoint"] == "paper" and float(of_paper["natural"]) == paper["natural"]
    (fsam,) = sections(tmp_path, [made("fsam", recipe="fsam/cifar10/resnet18-fsam")])[0].groups
    assert lines_of(fsam)[-1][2] == "96.75 ± 0.09"  # table 1
    (plain,) = sections(tmp_path, [made("sam")])[0].groups
    assert [line[1] for line in lines_of(plain)] == ["last", "best"]


def test_a_run_with_all_of_a_recipes_values_is_that_recipes(tmp_path):
    row = made("sam", recipe="sam-at/cifar100/sam-rho0.4", epochs=100, threads=3, seed=5)
    del row["recipe"]
    row["config"]["recipe"] = None
    (group,) = sections(tmp_path, [row])[0].groups
    assert recipe_of(group) == "sam-at/cifar100/sam-rho0.4"
    row["config"]["rho"] = 0.3
    (group,) = sections(tmp_path, [row])[0].groups
    assert recipe_of(group) is None and published(group) == {}


def test_a_recipe_that_is_gone_is_named(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [made() | {"recipe": "of/old"}])
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "the recipe 'of/old' is not known here" in capsys.readouterr().out


# ---- commands


def repeated(text):
    """Return the configs and the evaluation that a command line means."""
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "bench"]
    _, options = parse(COMMANDS, words[3:])
    own = {k: v for k, v in options.items() if k not in ("preset", "recipe")}
    (method,) = options["methods"]
    configs = [resolve(method, options.get("recipe"), own | {"seed": seed})
               for seed in options["seeds"]]  # fmt: skip
    check_effects(configs, options)
    return configs, evaluation_of(configs[0].data, options)


@pytest.mark.parametrize(
    "row",
    [
        made("sgd"),
        made("fsam", rho=0.3, sigma=0.5, lmbda=0.9, threads=2, channels_last=True, amp="bf16"),
        made("asam", scale="weights", lr=0.1, schedule="piecewise"),
        made("at-linf", eps="0.0301", alpha="1.5/255", attack_steps=3, attack_bn="train"),
        made("at-l2", eps="256/255", data="cifar100"),
        made("sam-late", late=0.5, data=".data/some images", evaluated={"steps": 20, "samples": 9}),
        made("sam", recipe="sam-at/cifar10/sam-rho0.2", epochs=7, seed=4),
        made("sgd", evaluated={"linf": (8 / 255, 0.0301), "l2": (1.7,)}),
        made("at-linf", eps="0.3", force=True),
        made("trades", eps="8/255", alpha="0.3", force=True),
        made("sam", evaluated={"linf": (8 / 255, 0.3), "l2": (1.7,)}),
        made("at-linf", eps="0.3", force=True, evaluated={"linf": (0.3,), "l2": (1.7,)}),
    ],
    ids=lambda row: row["method"],
)
def test_the_command_repeats_the_runs(row, tmp_path):
    (group,) = sections(tmp_path, [row])[0].groups
    (config,), evaluation = repeated(command(group))
    assert json.loads(json.dumps(asdict(config))) == row["config"]
    assert json.dumps(asdict(evaluation)) == json.dumps(row["evaluation"])


def test_the_command_has_no_option_that_would_be_refused(tmp_path):
    """A preset's padding and cutout stay in the config of a run that does not crop."""
    row = made("adamw", augment="none", padding="zero", cutout=8, pad=0, workers=2, momentum=0.5,
               second_bn="moving", attack_bn="train")  # fmt: skip
    (group,) = sections(tmp_path, [row])[0].groups
    (config,), _ = repeated(command(group))
    left_out = ("padding", "cutout", "workers", "momentum", "second_bn", "attack_bn")
    again = json.loads(json.dumps(asdict(config)))
    assert again | {k: row["config"][k] for k in left_out} == row["config"] != again


def test_runs_of_several_processes_are_torchruns(tmp_path):
    rows = [made(seed=seed, local_ascent=True, processes=2) for seed in (0, 3)]
    (group,) = sections(tmp_path, rows)[0].groups
    for row, text in zip(rows, command(group).split(" && "), strict=True):
        assert json.loads(json.dumps(asdict(torchrun(text)[0]))) == row["config"]


def torchrun(text):
    """Return the config that a command line of several processes means, and its options."""
    words = shlex.split(text)
    assert words[:6] == ["torchrun", "--nproc-per-node", "2", "-m", "bench", "train"]
    _, options = parse(COMMANDS, words[5:])
    return resolve(options["method"], None, options | {"processes": 2}), options


def judged(text):
    """Return the evaluation that the second command of a line means."""
    words = shlex.split(text.removesuffix("; done"))
    assert words[:5] == ["python", "-m", "bench", "evaluate", "$run/last.pt"]
    _, options = parse(COMMANDS, words[3:])
    return evaluation_of("digits", options)


@pytest.mark.parametrize("evaluated", [
    {"attacks": ("apgd-t-20",), "samples": 9}, {"l2": ()}, {"linf": ()}, {"linf": (), "l2": (1.7,)},
    {"linf": (0.0301,), "l2": (), "attacks": ("fgsm", "pgd"), "steps": 20},
])  # fmt: skip
def test_an_evaluation_that_a_comparison_does_not_have_is_a_command_of_its_own(
    tmp_path, evaluated
):
    row = made(evaluated=evaluated)
    (group,) = sections(tmp_path, [row])[0].groups
    training, loop, judging = re.split(" && | do ", command(group))
    (config,), evaluation = repeated(training)
    assert json.loads(json.dumps(asdict(config))) == row["config"]
    assert evaluation == resolve_evaluation("digits", {})
    assert loop == "for run in runs/again/sam-seed*;", "not sam-late's"
    assert json.dumps(asdict(judged(judging))) == json.dumps(row["evaluation"])
    assert "--force" not in training + judging


@pytest.mark.parametrize("evaluated, attacks", [
    ({"linf": (), "l2": ()}, ("clean",)), ({"attacks": ("fgsm",)}, ("fgsm",)),
])  # fmt: skip
def test_pgds_steps_are_not_asked_for_without_pgd(tmp_path, evaluated, attacks):
    """As of a study's rows; an evaluation without a radius is of clean images."""
    (group,) = sections(tmp_path, [made(evaluated={"steps": 7, **evaluated})])[0].groups
    assert judged(command(group).split(" do ")[1]).attacks == attacks


def test_so_it_is_of_several_processes(tmp_path):
    """The attacks were among the words of `train`, which refuses them."""
    rows = [made(seed=seed, processes=2, evaluated={"attacks": ("fgsm",)}) for seed in (0, 3)]
    (group,) = sections(tmp_path, rows)[0].groups
    *trainings, loop, judging = re.split(" && | do ", command(group))
    for row, text in zip(rows, trainings, strict=True):
        config, options = torchrun(text)
        assert json.loads(json.dumps(asdict(config))) == row["config"]
        assert options["out"] == Path(f"runs/again/sam-seed{config.seed}")
    assert loop == "for run in runs/again/sam-seed*;"
    assert json.dumps(asdict(judged(judging))) == json.dumps(row["evaluation"])


def test_a_radius_that_has_to_be_forced_is_so_where_it_is_given(tmp_path):
    rows = [made("at-linf", eps="0.3", force=True, evaluated={"attacks": ("fgsm",)}),
            made("at-l2", eps="0.3", evaluated={"attacks": ("fgsm",), "linf": (0.3,)})]  # fmt: skip
    for row, forced in zip(rows, ([True, False], [False, True]), strict=True):
        (group,) = sections(tmp_path, [row])[0].groups
        training, _, judging = re.split(" && | do ", command(group))
        assert ["--force" in text for text in (training, judging)] == forced
        (config,), _ = repeated(training)
        assert json.loads(json.dumps(asdict(config))) == row["config"]


@given(st.floats(1e-12, 4) | st.integers(1, 1000).map(lambda k: k / 255))
def test_eps_is_read_back_to_the_bit(eps):
    assert parse_eps(text_of(eps), "l2") == eps


# ---- LaTeX, HTML


def check_latex(text):
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows}
    (spec,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns == {len(spec)}
    for rule in ("toprule", "midrule", "bottomrule", "end{tabular}}", "end{table*}"):
        assert text.count("\\" + rule) == 1
    body = "".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[\\&%$#_{}]|\$(\\pm|\\ell_\\infty|\\ell_2|_\{\\pm [\d.]+\})\$", "", body)
    assert not re.search(r"[%$#_^~]", plain) and plain.count("{") == plain.count("}")


def test_latex_is_escaped_and_balanced(tmp_path):
    rows = [made(data="a_b & 50%/{c}#$~^\\", seed=s) for s in (0, 1)] + [made("sgd", data="x_y")]
    for section in sections(tmp_path, rows):
        check_latex(latex_of(section))
    text = latex_of(sections(tmp_path, rows)[0])
    assert r"$\ell_\infty$ 8 & $\ell_2$ 16 &" in text and "80.0$_{\\pm 0.0}$ & 40.0" in text
    check_latex(latex(["a", "b_c"], [["1 ± 2", "100%"]], "x & y", left=1))
    assert tex("a_b ± 5%") == r"a\_b $\pm$ 5\%"
    assert markdown(["a", "b"], [["x|y", "1"]], left=1).splitlines()[2] == "| x\\|y | 1    |"


def test_latex_stays_on_the_page(tmp_path):
    rows = [made(rho=k / 100, seed=s) for k in range(1, 21) for s in (0, 1)]
    first, second = latex_of(sections(tmp_path, rows)[0]).split("\n\n")
    for text, lines in ((first, 30), (second, 10)):
        check_latex(text)
        assert r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{" in text
        assert text.count("& last &") + text.count("& best &") == lines
        (caption,) = re.findall(r"\\caption\{(.*)\}", text)
        assert len(caption) < 120 and caption.endswith("continued.") == (text is second)
        (below,) = re.findall(r"\\parbox\{.linewidth\}\{.scriptsize (.*)\}", text)
        assert below.startswith("Last: ") and below.endswith("radii in 255ths: PGD-10.")


class Page(HTMLParser):
    """The tags that are open, and everything that a page could load."""

    void = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.text, self.inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside.append((tag, dict(attributes), self.open[-1:]))
        self.loads += [value for k, value in attributes if k in ("src", "href", "srcset", "data")]
        if tag not in self.void:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_loads_nothing(tmp_path, capsys):
    for seed in (0, 1):
        for rho in (0.1, 0.2):
            row = made(rho=rho, seed=seed, data="<script>alert(1)</script>")
            write_run(tmp_path / "runs" / f"rho{rho}" / f"sam-seed{seed}", row)
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "table.tex").read_text().startswith("% \\usepackage{booktabs,graphicx}\n")
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "url(" not in text
    figures = [base64.b64decode(load.removeprefix("data:image/png;base64,"))
               for load in page.loads if not load.startswith("#")]  # fmt: skip
    written = sorted(out.glob("*.png"))
    names = ("accuracy-eps", "curves", "rho", "trade-off", "wall-clock")
    assert [path.name for path in written] == [f"script-{name}.png" for name in names]
    assert sorted(figures) == sorted(path.read_bytes() for path in written)
    assert all(f"wrote {path}" in printed for path in written)
    around = [outer for tag, of_tag, outer in page.inside
              if tag == "img" or tag == "table" and of_tag.get("class") != "facts"]  # fmt: skip
    assert around == [[("div", "wide")]] * 6  # what scrolls on a narrow screen
    alts = [of_tag["alt"] for tag, of_tag, _ in page.inside if tag == "img"]
    assert len(set(alts)) == 5 and all("<script>alert(1)</script>" in alt for alt in alts)
    styled = text[: text.index("</style>")]
    variables = set(re.findall(r"var\((--\w+)\)", styled))
    light, dark = re.findall(r":root \{([^}]*)\}", styled)
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark)) == variables
    shown = " ".join(page.text)
    for fact in ("SAM rho 0.1", "80.0 ± 0.0", "PGD-10, l2, eps 16/255", "an abacus", "torch 2.15.0",
                 "0123abc", "python -m bench compare", "preactresnet18", "best"):  # fmt: skip
        assert fact in shown


# ---- what cannot be used


@pytest.mark.parametrize(
    "text, said",
    [("", "no finished run"), ("{}\n", "line 1"), ("[1]\n", "line 1"), ("7\n", "line 1"),
     (json.dumps(made()) + "\nnot JSON\n", "line 2"),
     (json.dumps(made()) + "\n" + json.dumps(made(seed=1))[:300], "remove the line"),
     ('{"kind": "step"}\n', "line 1")],
)  # fmt: skip
def test_refuses_what_is_no_row(text, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, said", [
    (lambda row: row["robust"]["linf"].update({"1/255": None}), "linf 1/255 is None"),
    (lambda row: row["robust"]["linf"].update({"1/255": "0.3"}), "linf 1/255 is '0.3'"),
    (lambda row: row["robust"]["l2"].update({"16/255": 30.5}), "l2 16/255 is 30.5"),
    (lambda row: row["best"]["robust"]["l2"].update({"16/255": float("nan")}), "best: l2 16/255"),
    (lambda row: row.update(natural=80.1), "natural is 80.1"),
    (lambda row: row.update(natural=True), "natural is True"),
    (lambda row: row["best"].pop("natural"), "best: natural is None"),
    (lambda row: row["best"].pop("robust"), "best: its accuracies are not at its attacks' radii"),
    (lambda row: row["robust"]["linf"].pop("8/255"), "not at its attacks' radii"),
    (lambda row: row["robust"].update(l1={"1/255": 0.5}), "not at its attacks' radii"),
    (lambda row: row.update(versions="torch 2.15"), "versions is 'torch 2.15'"),
])  # fmt: skip
def test_refuses_rows_whose_accuracies_are_none(change, said, tmp_path, capsys):
    row = made()
    change(row)
    path = write_rows(tmp_path / "rows.jsonl", [made(seed=1), row])
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{str(path)!r}, line 2, is no row" in error and said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part, change, said", [
    ("config", {"seed": None}, "seed must be a whole number"), ("config", {"eps": "8/255"}, "eps"),
    ("config", {"method": "nosuch"}, "'nosuch'"), ("config", {"method": None}, "None"),
    ("config", {"rho": float("nan")}, "rho"), ("config", {"method": "sgd"}, "'sgd'"),
    ("evaluation", {"linf": None}, "linf"), ("evaluation", {"steps": 0}, "steps"),
    (None, {"evaluation": {}}, "linf"), (None, {"warnings": None}, "warnings is None"),
    (None, {"device": None}, "device is None"), (None, {"train_seconds": float("nan")}, "nan"),
    (None, {"images_per_second": float("inf")}, "inf"), (None, {"git": 3}, "git is 3"),
])  # fmt: skip
def test_refuses_rows_of_damaged_settings(part, change, said, tmp_path, capsys):
    """They ended in tracebacks, or in a table under another method's name."""
    row = made()
    row |= {part: row[part] | change} if part else change
    (path := tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (made(seed=1), row))
    )
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{str(path)!r}, line 2, is no row" in error and said in error


@pytest.mark.parametrize(
    "arguments, said",
    [(["nowhere"], "nowhere"), (["."], "no finished run"), ([], "--step"),
     (["a", "--step", "b"], "--step")],
)  # fmt: skip
def test_refuses_paths(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and list(tmp_path.iterdir()) == []


def test_a_run_with_a_recipes_values_joins_the_runs_of_that_recipe():
    recipe = "fsam/cifar10/resnet18-sam"
    named = made("sam", recipe=recipe, epochs=200)
    by_hand = made("sam", seed=1, recipe=recipe, epochs=200)
    del by_hand["recipe"]
    by_hand["config"]["recipe"] = None
    for rows in ([named, by_hand], [by_hand, named]):
        (group,) = sections_of(rows)[0].groups
        assert group.seeds == [0, 1] and recipe_of(group) == recipe
    other = made("sam", recipe=recipe, epochs=200) | {"recipe": "other"}
    other["config"]["recipe"] = "of/another/table"
    assert len(sections_of([named, by_hand, other])[0].groups) == 2

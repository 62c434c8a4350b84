"""Recipes: each is the published row it names, complete, and says where it comes from."""

import csv
import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.models import build_model
from bench.settings.config import differences, resolve
from bench.settings.methods import ADVERSARIES, SAMS
from bench.settings.recipes import RECIPES, load_recipe, recipe_names

TABLES = Path(__file__).resolve().parents[3] / "shared/paper-tables"
needs_tables = pytest.mark.skipif(not TABLES.exists(), reason=f"no ../shared/{TABLES.name}")
METHODS = {"SGD": "sgd", "AdamW": "adamw", "SAM": "sam", "ASAM": "asam", "FisherSAM": "fishersam",
           "F-SAM": "fsam", "F-ASAM": "fasam"}  # fmt: skip
NETWORKS = {"VGG16-BN": "vgg16bn", "ResNet-18": "resnet18", "WRN-28-10": "wrn28-10",
            "PyramidNet-110": "pyramidnet110", "ResNet-50": "resnet50"}  # fmt: skip
DATA = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet",
        "Stanford Cars": "stanford-cars", "OxfordIIITPet": "oxford-pets",
        "Flowers102": "flowers102"}  # fmt: skip


def rows(name):
    with open(TABLES / f"table_{name}.csv") as f:
        return list(csv.DictReader(f))


def test_rows_as_printed():
    """Read off the papers by hand: one row of each table."""
    for name, natural in {
        "sam-at/cifar100/sam-rho0.4": 78.7,
        "sam-at/cifar10/at-linf-eps8": 84.2,
        "fsam/cifar10/vgg16bn-asam": 95.57,
        "fsam/cifar100/pyramidnet110-fsam": 86.70,
        "fsam/cifar100/wrn28-10-fasam": 85.24,
        "fsam/imagenet/resnet50-fsam": 77.35,
        "fsam/transfer/flowers102/sam": 74.38,
        "fsam/cifar10/resnet18-fsam-noise0.8": 59.39,
        "fsam/cifar100/resnet18-sam-rho0.4": 78.83,
        "fsam/cifar100/resnet18-fsam-rho0.4": 80.30,
    }.items():
        assert load_recipe(name).published["natural"] == natural, name
    config = resolve(None, "sam-at/cifar10/sam-rho0.2", {})
    assert (config.method, config.rho, config.lr, config.epochs) == ("sam", 0.2, 0.1, 100)
    assert (config.padding, config.cutout, config.val) == ("reflect", 0, 0)
    config = resolve(None, "fsam/cifar100/resnet18-fsam", {})
    assert (config.method, config.rho, config.sigma, config.lmbda) == ("fsam", 0.2, 1, 0.6)
    assert (config.padding, config.cutout, config.normalisation) == ("zero", 16, "f-sam")
    assert (config.weight_decay, config.schedule, config.model) == (1e-3, "cosine", "resnet18")


@needs_tables
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_sam_at_tables(data):
    listed = rows(f"sam_at_{data}")
    assert len(listed) == 12
    for row in listed:
        norm, eps, rho = row["at_norm"], row["at_eps_over_255"], row["rho"]
        own = {"ST": "st", "SAM": f"sam-rho{rho}", "AT": f"at-{norm}-eps{eps}"}[row["method"]]
        name = f"sam-at/{data}/{own}"
        recipe, config = load_recipe(name), resolve(None, name, {})
        columns = {"natural": "natural", "linf_1_255": "linf 1/255", "linf_2_255": "linf 2/255",
                   "l2_16_255": "l2 16/255", "l2_32_255": "l2 32/255"}  # fmt: skip
        assert recipe.published == {v: float(row[k]) for k, v in columns.items()}
        assert recipe.source["table"] == f"table {row['paper_table']}"
        assert config.data == data and config.rho == (float(rho) if rho else None)
        assert config.eps == (pytest.approx(int(eps) / 255) if eps else None)
        assert config.method == {"ST": "sgd", "SAM": "sam", "AT": f"at-{norm}"}[row["method"]]


def is_published(row, name):
    """Check a recipe against every cell of F-SAM's row that it has."""
    recipe, config = load_recipe(name), resolve(None, name, {})
    assert recipe.published == {"natural": float(row["acc_mean"]), "std": float(row["acc_std"])}
    assert row["paper_table"] in recipe.source["table"]
    assert config.method == METHODS[row["method"]]
    columns = {"rho": "rho", "sigma": "sigma", "lambda": "lmbda", "epochs": "epochs", "lr": "lr",
               "batch_size": "batch_size", "momentum": "momentum", "weight_decay": "weight_decay",
               "noise_rate": "label_noise"}  # fmt: skip
    for column, key in columns.items():
        if row.get(column):
            assert getattr(config, key) == float(row[column]), (name, key)
        elif column == "rho" and config.method not in ("sgd", "adamw"):
            raise AssertionError(f"{name} has a rho of its own")
    assert row.get("schedule", "cosine") == config.schedule
    return config


@needs_tables
@pytest.mark.parametrize("table, number", [("cifar10", 20), ("cifar100", 20), ("fasam", 8),
                                           ("imagenet", 4), ("labelnoise", 12)])  # fmt: skip
def test_fsam_tables(table, number):
    listed = rows(f"fsam_{table}")
    assert len(listed) == number
    for row in listed:
        data, network = DATA[row["dataset"]], NETWORKS[row["model"]]
        noise = f"-noise{row['noise_rate']}" if row.get("noise_rate") else ""
        config = is_published(row, f"fsam/{data}/{network}-{METHODS[row['method']]}{noise}")
        assert config.data.removeprefix(".data/") == data
        assert config.model == {"wrn28-10": "wrn28-10-fsam"}.get(network, network)
        assert not noise or config.noise_kind == "published"


@needs_tables
def test_fsam_transfer_table():
    for row in rows("fsam_transfer"):
        data = DATA[row["dataset"]]
        config = is_published(row, f"fsam/transfer/{data}/{METHODS[row['method']]}")
        assert config.data.removeprefix(".data/") == data and config.model == "deit-small"
        assert "adamw" in (config.optimizer, config.base)


def test_figure_2_has_a_recipe_for_every_variant_and_batch():
    for k in range(2, 11):
        one, base = (vars(resolve(None, f"fsam/cifar100/resnet18-sam{n}", {}))
                     for n in (f"-ascent{k}", ""))  # fmt: skip
        changed = {k for k in one if one[k] != base[k]} - {"recipe", "method"}
        assert changed == {"ascent_batches"} and one["ascent_batches"] == k
    for start in ("fsam/cifar10/resnet18-", "fsam/cifar100/resnet18-",
                  "fsam/transfer/oxford-pets/", "fsam/transfer/flowers102/"):  # fmt: skip
        base = vars(resolve(None, f"{start}sam", {}))
        for variant in ("sam-full", "sam-noise", "sam-db"):
            one = vars(resolve(None, start + variant, {}))
            changed = {k for k in one if one[k] != base[k]} - {"recipe", "method"}
            assert one["method"] == variant and one["full_every"] in (1, None)
            assert changed == ({"full_every", "projection"} if variant != "sam-db" else set())


def test_sweeps_change_one_value():
    for name in recipe_names():
        stem, _, last = name.rpartition("-")
        key = "rho" if last.startswith("rho") else "batch_size" if last.startswith("batch") else ""
        if not key or name.startswith("sam-at"):
            continue
        one, base = (vars(resolve(None, n, {})) for n in (name, stem))
        assert {k for k in one if one[k] != base[k]} - {"recipe"} == {key}
        assert one["recipe"] in (name, None) and base["recipe"] in (stem, None)
        assert f"{one[key]:g}" == last.removeprefix("rho").removeprefix("batch")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_names_its_source(name):
    recipe, text = load_recipe(name), json.loads((RECIPES / f"{name}.json").read_text())
    assert {"paper", "code", "table", "row"} <= recipe.source.keys()
    assert recipe.published or recipe.source["table"].startswith("figure")
    assert text["source"].keys() == {"table", "row"} and "method" in recipe.config
    config = resolve(None, name, {})
    ignored = {k for k, v in recipe.config.items() if getattr(config, k) != v} - {"eps", "alpha"}
    assert not ignored - {"base"}, "values that the method has no use for"
    assert config.val == 0 and config.seed == 0


def test_every_network_of_a_recipe_exists():
    classes = {"cifar10": 10, "cifar100": 100, ".data/imagenet": 1000}
    configs = [resolve(None, name, {}) for name in recipe_names()]
    for model, width, data in {(c.model, c.width, c.data) for c in configs}:
        if data in classes:
            with torch.device("meta"):
                build_model(model, width, 3, classes[data], [0.5] * 3, [0.5] * 3)


def test_options_and_methods_override_a_recipe():
    name = "sam-at/cifar10/sam-rho0.2"
    assert resolve(None, name, {"rho": 0.3, "epochs": 2}).rho == 0.3
    assert resolve("fsam", name, {}).rho == 0.2, "the recipe's radius is F-SAM's too"
    at = resolve("at-linf", name, {})
    assert (at.method, at.rho, at.attack_bn) == ("at-linf", None, "moving")
    at = resolve(None, "sam-at/cifar10/at-linf-eps2", {"optimizer": "sam"})
    assert (at.method, at.eps, at.rho) == ("at-linf+sam", 2 / 255, 0.1)
    assert resolve(None, name, {"optimizer": "fsam"}).method == "fsam"


def test_a_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('{"extends": "presets/cifar6k", "config": {"rho": 0.7, "method": "sam"}}')
    config = resolve(None, str(path), {})
    assert (config.rho, config.epochs, config.data) == (0.7, 45, ".data/cifar10")
    for text, said in (
        ('{"config": {"rhoo": 1}}', "rhoo"),
        ('{"settings": {}}', "settings"),
        ("[1]", "not a recipe"),
        ("{", "not a recipe"),
        ('{"extends": "nothing"}', "nothing"),
        (json.dumps({"extends": str(path)}), "extends itself"),
        ('{"extends": ["presets/digits"]}', "extends must be text, got ['presets/digits']"),
        ('{"config": ["lr"]}', "config must be an object, got ['lr']"),
        ('{"methods": ["sgd"]}', "methods must be an object, got ['sgd']"),
        ('{"methods": {"sgd": 3}}', "methods: sgd must be an object, got 3"),
        ('{"methods": {"at_linf": {"eps": "2/255"}}}', "at_linf' (did you mean 'at-linf'?)"),
        ('{"methods": {"at-linf+sam": {"rho": 0.2}}}', "'at-linf+sam'"),
        ('{"published": {"natural": "95"}}', "published: natural must be a number, got '95'"),
        ('{"source": "a paper"}', "source must be an object, got 'a paper'"),
        ('{"note": ["one"]}', "note must be text, got ['one']"),
        ('{"methods": {"sgd": {}}, "config": {"method": "at-linf", "eps": 80}}', "above 0.25"),
    ):
        path.write_text(text)
        assert main(["train", "--recipe", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("command", ["train --method sgd", "compare --methods sgd --seeds 0"])
def test_runs_of_a_file_of_ones_own_go_to_runs_by_its_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(
        {"extends": "presets/digits", "config": {"width": 2, "epochs": 1}}
    ))  # fmt: skip
    few = ["--n-examples", "9", "--eval-linf", "8", "--eval-l2", "32", "--eval-steps", "1"]
    words = [*command.split(), *few, "--recipe", str(tmp_path / "mine.json")]
    assert main(words) == 0
    assert (tmp_path / "runs/mine/sgd-seed0/summary.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "runs"]


@pytest.mark.parametrize("eps, meant", [(8, 8 / 255), (8.0, None), (0.03, 0.03), (1e-5, 1e-5)])
def test_a_number_as_eps_is_what_it_is_on_the_command_line(eps, meant, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"methods": {m: {"eps": eps, "alpha": eps}
                                            for m in ("at-linf", "at-l2")}}))  # fmt: skip
    for method in ("at-linf", "at-l2"):
        if meant is None and method == "at-l2":
            with pytest.raises(ValueError, match="can mean"):
                resolve(method, str(path), {})
            continue
        config = resolve(method, str(path), {})
        assert config.eps == config.alpha == (8 / 255 if meant is None else meant)
    assert resolve("at-linf", str(path), {"eps": "4/255"}).eps == 4 / 255


def test_presets_are_what_they_were():
    """The settings behind the committed rows and the README's commands."""
    digits = resolve("at-l2", "digits", {})
    assert (digits.model, digits.width, digits.epochs, digits.batch_size) == ("smallconv", 16, 30,
                                                                             64)
    assert (digits.augment, digits.pad, digits.padding) == ("crop", 1, "reflect")
    assert (digits.eps, digits.alpha) == (256 / 255, 32 / 255)
    assert resolve("asam", "digits", {}).rho == 0.5
    rows = (Path(__file__).parents[2] / "bench/results/cifar6k.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        config = resolve(row["method"], "cifar6k", {"seed": row["config"]["seed"]})
        assert differences(row["config"], config) == "", "an old run cannot be resumed"
        assert {k: vars(config)[k] for k in row["config"]} == row["config"]


@pytest.mark.parametrize("preset", sorted(p.stem for p in RECIPES.glob("presets/*.json")))
@pytest.mark.parametrize("method, relatives", [
    ("sam", [*(m for m in SAMS if m.startswith("sam-")), "looksam", "gsam", "msam"]),
    ("at-linf", [m for m in ADVERSARIES if m not in ("at-linf", "at-l2")]),
])  # fmt: skip
def test_relatives_of_a_method_differ_from_it_in_nothing_but_themselves(preset, method, relatives):
    its, own = vars(resolve(method, preset, {})), load_recipe(preset).methods
    for relative in relatives:
        config = resolve(relative, preset, {})
        single_step = relative in ("fgsm-rs", "n-fgsm")
        theirs = {"alpha", "attack_steps"} if single_step else set()
        theirs |= {"rho"} if relative == "msam" else set()  # of another kind of climb
        values = {k: v for k, v in vars(config).items() if k != "method" and k not in theirs
                  and k not in own.get(relative, {})}  # fmt: skip
        changed = {k for k, v in values.items() if v != its[k]}
        assert changed <= {"look_alpha", "gsam_alpha", "interval", "late", "ascent_part", "micro",
                           "full_every", "projection", "beta", "ascent_batches"}, relative
        assert not single_step or config.alpha is None
        assert not single_step or config.attack.alpha >= config.eps  # one step, of the whole ball
        assert config.eps == its["eps"] and (config.rho == its["rho"] or "rho" in theirs)
        assert relative != "msam" or config.rho == own.get("msam", {}).get("rho", 3.0)


def test_a_relative_keeps_what_a_preset_or_an_option_says_of_it(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"methods": {
        "sam": {"rho": 0.3, "weight_decay": 0.01, "epochs": 7}, "sam-late": {"rho": 0.4},
        "at-linf": {"eps": "2/255", "alpha": "1/255", "attack_steps": 3},
        "trades": {"eps": "6/255"},
    }}))  # fmt: skip
    late = resolve("sam-late", str(own), {})
    assert (late.rho, late.weight_decay, late.epochs, late.late) == (0.4, 0.01, 7, 0.75)
    assert resolve("sam-late", str(own), {"rho": 0.5}).rho == 0.5
    trades = resolve("trades", str(own), {})
    assert (trades.eps, trades.alpha, trades.attack_steps) == (6 / 255, 1 / 255, 3)
    both = resolve("fgsm-rs+sam-micro", str(own), {})
    assert (both.eps, both.rho, both.weight_decay, both.alpha) == (2 / 255, 0.3, 0.01, None)
    assert resolve("asam", str(own), {}).rho == 2.0 and resolve("sgd", str(own), {}).epochs == 100
    assert resolve("at-l2", str(own), {}).eps == 128 / 255


def test_the_listing(capsys):
    assert main(["recipes", "sam-at/cifar10/sam"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sam-at: Wei, Zhu, Zhang") and len(lines) == 5
    assert "table 2: SAM, rho 0.2" in lines[3] and "linf 1/255 48.9" in lines[3]
    assert main(["recipes", "fsam/cifar10/wrn28-10-fsam"]) == 0
    assert "46 million" in capsys.readouterr().out
    assert main(["recipes", "nothing"]) == 2


def test_recipe_and_preset_exclude_each_other(tmp_path, capsys):
    command = ["train", "--recipe", "sam-at/cifar10/st", "--preset", "digits"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "not both" in capsys.readouterr().err

"""A setting stands once: the command line, its help, checks, captions, recipes and docs follow."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS, main
from bench.cli.options import document
from bench.cli.parse import parse
from bench.models import MODELS
from bench.settings.config import SETTINGS, USED_BY, Config, resolve, values_of
from bench.settings.effects import check_effects
from bench.settings.methods import ADVERSARIES, OPTIMIZERS
from bench.settings.setting import check_settings, inside, setting, settings_of
from bench.speed.contenders import BASES
from bench.speed.step import DTYPES
from fastsam.choose import BACKENDS

ROOT = Path(__file__).parents[2]
LINE = '''    temperature: float = setting(
        1.0, "what the logits are divided by", bounds="(0, inf)", used_by={"trades": 2.5}
    )
    epochs: int ='''
USES = '''
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from bench.__main__ import main
from bench.experiments.compare import settings
from bench.experiments.sweep import parse_grid
from bench.settings.config import check_used, resolve

def said(*words):
    text = StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            code = main(list(words))
        except SystemExit as e:
            code = e.code
    return code, text.getvalue()

config = resolve("trades", "digits", {"temperature": 0.5})
try:
    check_used(["sgd"], {"temperature": 0.5})
except ValueError as e:
    used = str(e)
print(json.dumps({
    "help": said("train", "--help"), "table": said("options"),
    "spelling": said("train", "--temprature", "2"),
    "low": said("train", "--method", "trades", "--temperature", "-2", "--out", sys.argv[1]),
    "recipe": said("train", "--recipe", sys.argv[2], "--out", sys.argv[1]),
    "default": resolve("trades", "digits", {}).temperature, "given": config.temperature,
    "other": resolve("sgd", "digits", {"temperature": 0.5}).temperature, "used": used,
    "trackers": "accelerate" in sys.modules,
    "grid": parse_grid(["temperature=1,2"], {}), "caption": settings(vars(config)),
}))
'''


def test_a_setting_is_added_in_one_place(tmp_path):
    """One line in a copy of the code; everything below follows from it."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench",
                    ignore=shutil.ignore_patterns("results", "__pycache__"))  # fmt: skip
    path, recipe = tmp_path / "bench/settings/config.py", tmp_path / "recipe.json"
    text = path.read_text()
    assert text.count("    epochs: int =") == 1
    path.write_text(text.replace("    epochs: int =", LINE))
    recipe.write_text('{"extends": "presets/digits", "methods": {"trades": {"temperature": -3}}}')
    command = [sys.executable, "-c", USES, tmp_path / "out", recipe]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for where in ("help", "table"):
        code, text = found[where]
        assert code == 0 and "--temperature" in text and "2.5" in text
        assert "what the logits are divided by" in text and "trades" in text
    code, text = found["spelling"]
    assert code == 2 and "--temperature" in text
    assert found["low"] == [2, "error: temperature must be positive and finite, got -2.0\n"]
    code, text = found["recipe"]
    assert code == 2 and "temperature must be positive and finite, got -3" in text
    assert (found["default"], found["given"], found["other"]) == (2.5, 0.5, 1.0)
    assert "temperature 0.5 has no effect on sgd; it belongs to trades" in found["used"]
    assert not found["trackers"], "imported by who does not track"
    assert found["grid"] == {"temperature": [1.0, 2.0]} and "temperature 0.5" in found["caption"]


def test_the_docs_table_is_what_the_settings_say():
    page = (ROOT / "docs/options.md").read_text()
    assert page == document() + "\n", "python -m bench options > docs/options.md"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help_answers_in_under_a_second(words):
    """Of this process's own time, as a machine with other work takes longer."""
    code = ("import os, sys\nfrom bench.__main__ import main\ntry:\n    main(sys.argv[1:])\n"
            "finally:\n    used = sum(os.times()[:2])\n"
            "    print(used, 'torch' in sys.modules, file=sys.stderr)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    seconds, torch_is_there = done.stderr.split()
    assert "usage: python -m bench" in done.stdout and done.returncode == 0
    assert float(seconds) < 1 and torch_is_there == "False"


@pytest.mark.parametrize("words, wanted", [
    (["train", "--wieght-decay", "0.1"], "--weight-decay"),
    (["train", "--epoch", "3"], "--epochs"),
    (["train", "--eval_sample", "3"], "--eval-samples"),
    (["evaluate", "x.pt", "--atacks", "pgd"], "--attacks"),
    (["step", "--dtpye", "bf16"], "--dtype"),
])  # fmt: skip
def test_a_misspelt_option_is_told_the_right_one(words, wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words[-2] in said and f" {wanted}" in said


@pytest.mark.parametrize("words, said", [
    (["compare", "--method", "sgd"], "compare has no option --method; train has it"),
    (["train", "--attacks", "apgd-t"], "train has no option --attacks; evaluate has it"),
    (["train", "--time-budget", "1", "--jobs=2"], "--jobs; compare, sweep, study have it"),
    (["evaluate", "x.pt", "--eval_sample", "3", "--seeds", "1"], "--seeds; compare, sweep have it"),
])  # fmt: skip
def test_an_option_of_another_command_is_told_its_commands(words, said, capsys):
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith(f"{said}\n") and text.count("\n") == 1


@pytest.mark.parametrize("words, wanted", [
    (["trian"], "train"),
    (["train", "--method", "fishersm"], "fishersam"),
    (["train", "--method", "at-lnf"], "at-linf"),
    (["train", "--method", "trades", "--optimizer", "asm"], "asam"),
    (["train", "--schedule", "cosin"], "cosine"),
    (["train", "--amp", "bf61"], "bf16"),
    (["train", "--preset", "digit"], "digits"),
    (["train", "--recipe", "sam-at/cifar10/sam-rho.2"], "sam-at/cifar10/sam-rho0.2"),
    (["train", "--model", "preactresnet81"], "preactresnet18"),
    (["train", "--eval-on", "held-ot"], "held-out"),
    (["sweep", "--methods", "sam", "--grid", "roh=0.1,0.2"], "rho"),
    (["study", "trade-of"], "trade-off"),
    (["step", "--methods", "asma"], "asam"),
    (["step", "--dtype", "bf61"], "bf16"),
    (["throughput", "--beside", "eger"], "eager"),
    (["evaluate", "x.pt", "--norms", "lnf"], "linf"),
])  # fmt: skip
def test_a_misspelt_value_is_told_the_right_one(words, wanted, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")] if words[0] in ("train", "sweep") else []
    assert main([*words, *out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert f"(did you mean {wanted!r}?)" in said and words[-1].partition("=")[0] in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, said", [
    (["train", "--lr", "fast"], "--lr"),
    (["train", "--epochs", "2.5"], "--epochs"),
    (["train", "--epochs"], "--epochs"),
    (["evaluate"], "last.pt or best.pt of a run"),
    (["unpack", "a.tar"], "DIR"),
    (["recipes", "sam", "fsam"], "fsam"),
    (["compare", "--seeds", "0", "one"], "one"),
    ([], "train"),
])  # fmt: skip
def test_what_cannot_be_read_names_itself(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare", "--methods"], ["train", "--eval-linf", "--lr", "1"],
                                   ["compare", "--seeds"]])  # fmt: skip
def test_an_option_of_several_values_needs_one(words, capsys):
    assert main(words) == 2
    assert f"error: {words[1]} needs a value" in capsys.readouterr().err


def test_what_is_not_given_is_left_to_recipes_and_methods():
    command, options = parse(COMMANDS, ["train", "--eta", "-0.5", "--no-nesterov"])
    own = {"download", "force", "recipe", "preset", "optimizer", "method", "out"}
    assert command.name == "train" and options.keys() == own | {"eta", "nesterov"}
    assert options["eta"] == -0.5 and options["nesterov"] is False
    options = COMMANDS["evaluate"].parse(["x.pt", "--n-examples", "9", "--eval-l2", "1", "8/255"])
    assert options["n_examples"] == 9 and options["eval_l2"] == ["1", "8/255"]
    assert COMMANDS["throughput"].parse(["--beside"])["beside"] == []


@pytest.mark.parametrize("config, said", [
    ({"epochs": "ten"}, "epochs must be a whole number, got 'ten'"),
    ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
    ({"epochs": True}, "epochs must be a whole number, got True"),
    ({"lr": None}, "lr must be a number, got None"),
    ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
    ({"lr": [0.1]}, "lr must be a number, got [0.1]"),
    ({"nesterov": "no"}, "nesterov must be true or false, got 'no'"),
    ({"nesterov": 1}, "nesterov must be true or false, got 1"),
    ({"schedule": "cosin"}, "unknown schedule 'cosin' (did you mean 'cosine'?)"),
    ({"schedule": "COSINE"}, "unknown schedule 'COSINE' (did you mean 'cosine'?)"),
    ({"schedule": ["cosine"]}, "unknown schedule ['cosine']"),
    ({"warmup": 1}, "warmup must be in [0, 1), got 1"),
    ({"wieght_decay": 0}, "['wieght_decay'] (did you mean 'weight_decay'?)"),
    ({"eps": [8]}, "eps must be a number, got [8]"),
])  # fmt: skip
@pytest.mark.parametrize("of", ["config", "methods"])
def test_a_recipe_is_held_to_the_settings(config, said, of, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({of: {"fsam": config} if of == "methods" else config}))
    with pytest.raises(ValueError) as error:
        resolve("sgd", str(path), {})
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("words, said", [
    ("--image-size 16", "image_size 16 has no effect here: it needs a directory of images"),
    ("--cutout 4 --augment none", "cutout 4 has no effect here: it needs augment crop or crop"),
    ("--padding zero --augment none", "padding 'zero' has no effect here"),
    ("--noise-kind true", "noise_kind 'true' has no effect here: it needs a label_noise"),
    ("--workers 2", "workers 2 has no effect here: it needs augment resized-crop"),
    ("--method adamw --momentum 0.5", "momentum 0.5 has no effect here: it needs SGD"),
    ("--method sam --base adamw --momentum 0.5", "momentum 0.5 has no effect here"),
    ("--second-bn moving", "second_bn 'moving' has no effect here: it needs a second pass"),
    ("--method msam --second-bn moving", "second_bn 'moving' has no effect here"),
    ("--attack-bn train", "attack_bn 'train' has no effect here: it needs an adversary"),
    ("--awp-warmup 5", "awp_warmup 5 has no effect here: it needs an awp_gamma"),
    ("--method sam-late --epochs 1", "late 0.75 of 1 epochs leaves none that climbs"),
    ("--method sam-late --epochs 2", "late 0.75 of 2 epochs leaves none that climbs"),
    ("--awp-gamma 0.1 --awp-warmup 3 --epochs 3", "awp_warmup 3 of 3 epochs leaves none"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_an_option_that_would_change_nothing_is_refused(command, words, said, tmp_path, capsys):
    if command != "train":
        words = words if "--method" in words else f"--method sgd {words}"
        words = words.replace("--method", "--methods")
    assert main([command, *words.split(), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_option_is_taken_that_changes_one_of_the_runs_or_nothing_at_all():
    runs = [resolve(method, "digits", {}) for method in ("sgd", "adamw", "sam", "at-linf")]
    given = {"momentum": 0.5, "second_bn": "moving", "attack_bn": "train", "pad": 2}
    check_effects(runs, given)
    check_effects(runs[:1], {"cutout": 0, "workers": 0, "awp_warmup": 0, "momentum": 0.1})
    check_effects(runs[1:2], {"momentum": 0.9})
    uncropped = resolve("sgd", "digits", {"augment": "none"})
    check_effects([uncropped, runs[0]], {"augment": ["none", "crop"], "cutout": [0, 3]})
    with pytest.raises(ValueError, match=r"cutout \[0, 3\] has no effect here"):
        check_effects([uncropped], {"cutout": [0, 3]})
    directory = resolve("sgd", "digits", {"data": "photographs", "image_size": 16})
    check_effects([directory], {"image_size": 16})


def test_bounds():
    assert inside(0, "[0, 1)") and not inside(1, "[0, 1)")
    assert inside(1, "(0, 1]") and not inside(0, "(0, 1]")
    for value in (float("inf"), float("nan"), -1):
        assert not inside(value, "[0, inf)")

    @dataclass
    class Two:
        several: tuple[int, ...] = setting((1,), "numbers", bounds="[1, 3]")
        maybe: float | None = setting(None, "a number or none")

    check_settings(Two((1, 3), 0.5))
    check_settings(Two(()))
    for wrong in (Two((1, 4)), Two((1.5,)), Two(maybe="1")):
        with pytest.raises(ValueError, match="must be"):
            check_settings(wrong)
    assert [of.default for of in settings_of(Two).values()] == ["1", ""]


def test_settings_name_what_there_is():
    assert SETTINGS["backend"].setting.choices == BACKENDS
    step = {of.name: of.setting.choices for of in COMMANDS["step"].options}
    assert step["base"] == tuple(BASES) and step["dtype"] == tuple(DTYPES)
    for model in MODELS:
        assert model in SETTINGS["model"].setting.help
    known = {*OPTIMIZERS, *ADVERSARIES}
    assert all(set(methods) <= known for methods in USED_BY.values())
    assert values_of("at-linf+asam") == {
        "eps": 8 / 255, "alpha": 2 / 255, "attack_steps": 10, "rho": 2.0, "scale": "all",
        "eta": 0.01, "backend": None, "base": "sgd",
    }  # fmt: skip
    not_options = {"method", "processes", "recipe"}
    assert set(Config.__dataclass_fields__) - SETTINGS.keys() == not_options


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_a_command_has_each_option_once(command):
    names = [name for of in command.options for name in (of.option, of.setting.alias) if name]
    assert len(set(names)) == len(names)

"""A radius means one thing: how it is written, and what is refused as ambiguous."""

import pytest

from bench.__main__ import COMMANDS, main
from bench.attacks.notation import eps_key, labelled, parse_eps, parse_radii
from bench.cli.shared import evaluation_of
from bench.experiments.sweep import parse_grid
from bench.settings.config import resolve


def evaluated(*arguments: str):
    return evaluation_of("cifar10", COMMANDS["train"].parse(list(arguments)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("texts", [
    ["0.25", "0.5", "0.75", "1.0", "1.5"],  # 1.0 and 1.5 of what?
    ["0.25", "1"], ["1", "0.25"], ["1/255", "2"], ["8/255", "0.031"], ["8/255", "8", "0.031"],
    ["1", "2", "0.5/255"], ["1", "4e-1"],
])  # fmt: skip
def test_radii_of_several_forms_are_refused(texts, norm):
    with pytest.raises(ValueError) as error:
        parse_radii(texts, norm, force=True)
    assert "255" in str(error.value) and any(repr(t) in str(error.value) for t in texts)


@pytest.mark.parametrize("text", ["1.0", "1.5", "1.", "2e0", "1e1", "128.0"])
def test_a_decimal_from_1_on_is_ambiguous_in_l2(text):
    with pytest.raises(ValueError, match="/1") as error:
        parse_eps(text, "l2")
    assert repr(text) in str(error.value) and "/255" in str(error.value)
    with pytest.raises(ValueError, match="can mean"):
        parse_eps(text, "linf", force=True)


@pytest.mark.parametrize("text", [
    "-8/-255", "8_0", "８", "+8", "1e400", "1e400/1e400", "nan/1", "8//255", "8/255/", "0/255",
    "0.0", "8/0", "0x8", "1/3 / 255", "eight",
])  # fmt: skip
def test_what_is_no_radius_is_named(text):
    for norm in ("linf", "l2"):
        with pytest.raises(ValueError) as error:
            parse_eps(text, norm)
        assert repr(text) in str(error.value) and "8/255" in str(error.value)


def test_one_form_is_read():
    assert parse_radii(["0.25", ".5", "75e-2"], "l2") == (0.25, 0.5, 0.75)
    assert parse_radii(["16", "128", "255"], "l2") == (16 / 255, 128 / 255, 1.0)
    assert parse_radii(["1/1", "3/2"], "l2") == (1.0, 1.5)
    assert parse_radii(["8.0", "2.5"], "linf") == (8 / 255, 2.5 / 255)


def test_every_radius_has_a_key_of_its_own_however_small():
    for eps in (1e-9, 2e-9, 1e-12 / 255, 3.00001e-8, 1 / 255):
        assert parse_eps(eps_key(eps), "l2") == pytest.approx(eps, rel=1e-5)
    assert evaluated("--eval-l2", "1e-9", "2e-9").l2 == (1e-9, 2e-9)


def test_radii_that_results_could_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"8\.000001 8\.000002: both are 8/255"):
        parse_radii(["8.000001", "8.000002"], "linf")
    assert parse_radii(["8", "16", "8"], "linf") == (8 / 255, 16 / 255)


def test_the_command_line_refuses_mixed_radii(tmp_path, capsys):
    assert evaluated("--eval-l2", "64", "128").l2 == (64 / 255, 128 / 255)
    arguments = ["--eval-l2", "0.25", "0.5", "0.75", "1.0", "1.5"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert "'1.0'" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_eps_and_alpha_come_in_one_form():
    for eps, alpha in (("8", "0.5"), ("0.03", "2"), ("1", "0.25")):
        with pytest.raises(ValueError, match=f"--eps {eps} --alpha {alpha}"):
            resolve("at-linf", "digits", {"eps": eps, "alpha": alpha})
    assert resolve("at-linf", "digits", {"eps": "8", "alpha": "2"}).alpha == 2 / 255
    assert resolve("at-linf", "digits", {"eps": "0.03", "alpha": "2/255"}).eps == 0.03
    assert resolve("sgd", "digits", {"eps": "8", "alpha": "0.5"}).eps is None
    with pytest.raises(ValueError, match="--grid eps=0.5,1"):
        parse_grid(["eps=0.5,1"], {})


def test_labels_carry_both_forms():
    assert labelled("8/255") == "8/255 (0.0314)" and labelled("128/255") == "128/255 (0.502)"
    assert labelled(eps_key(1.0)) == "255/255 (1)" and labelled(eps_key(0.5)) == "127.5/255 (0.5)"

"""Radii and names of attacks, for images in [0, 1]: how they are written and read.

"8/255" is a fraction, "8" counts 255ths, "0.0314" (below 1) is the value itself.
"""

import re
from collections.abc import Sequence

from bench.spelling import meant

LARGEST_LINF = 0.25
HINT = "write it as 8/255, as 8 (the same) or as 0.0314"
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# of an evaluation, and whether steps and restarts may follow (pgd-50-10); by_name has what they are
ATTACKS = {"clean": False, "fgsm": False, "pgd": True, "apgd-ce": True, "apgd-t": True,
           "autoattack": False}  # fmt: skip
NAMES = ", ".join(f"{name}{'[-STEPS[-RESTARTS]]' * steps}" for name, steps in ATTACKS.items())
FRACTION = re.compile(rf"({NUMBER})\s*/\s*({NUMBER})")


def eps_key(eps: float) -> str:
    """Return eps in 255ths: 0.0313725... -> "8/255"."""
    return f"{eps * 255:.6g}/255"


def both_forms(eps: float) -> str:
    """Return eps in 255ths and as a number: "8/255 = 0.03137"."""
    return f"{eps_key(eps)} = {eps:.4g}"


def labelled(key: str) -> str:
    """Return a key with its value behind it: "8/255" -> "8/255 (0.0314)"."""
    return f"{key} ({float(key.removesuffix('/255')) / 255:.3g})"


def in_both_forms(text: str) -> str:
    """Return a text with its value behind every "8/255"."""
    return re.sub(rf"{NUMBER}/255", lambda key: labelled(key[0]), text)


def form_of(text: str) -> str:
    """Return "fraction", "count" or "value": how a radius is written. Raises ValueError for what is
    none of them."""
    text = text.strip()
    if FRACTION.fullmatch(text):
        return "fraction"
    if not re.fullmatch(NUMBER, text):
        raise ValueError(f"eps {text!r} is not a positive finite number; {HINT}")
    return "count" if float(text) >= 1 else "value"


def parse_eps(text: str, norm: str, force: bool = False) -> float:
    """Return the radius or step size that `text` means, for images in [0, 1].

    Raises ValueError for what is written in none of the three ways or is not positive; for an l_inf
    value above 0.25 unless `force`: that much hides the image and usually is a mistake of units;
    and, where values from 1 on can be meant (l2, `force`), for a decimal such as "1.5", which is as
    good a value as a count.
    """
    try:
        form, fraction = form_of(text), FRACTION.fullmatch(text.strip())
        top, bottom = fraction.groups() if form == "fraction" and fraction else (text, 1)
        value = float(top) / float(bottom)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps {text!r} is not a positive finite number; {HINT}") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"eps {text!r} is not a positive finite number; {HINT}")
    if form == "count":
        if (norm == "l2" or force) and not text.strip().isdigit():
            raise ValueError(
                f"{norm} eps {text!r} can mean {value / 255:.4g} (255ths are counted from 1 on) or "
                f"{value:g}; write {value:g}/255 or {value:g}/1"
            )
        value /= 255
    if norm == "linf" and value > LARGEST_LINF and not force:
        raise ValueError(
            f"l_inf eps {text!r} means {both_forms(value)}, above {LARGEST_LINF}: images are in "
            f"[0, 1], so {HINT}, or pass --force"
        )
    return value


def refuse_mixed(texts: Sequence[str], where: str) -> None:
    """Raise ValueError for radii of which some count 255ths and others are values or fractions:
    "0.5 1" is more likely 0.5 and 1.0 than 0.5 and 1/255."""
    forms = {form_of(text): text for text in texts}
    if len(forms) > 1:
        ways = ", ".join(f"{text!r} is a {form}" for form, text in forms.items())
        raise ValueError(
            f"{where} has radii in different forms: {ways}; write all as fractions (8/255), all as "
            "counts of 255ths (8) or all as values (0.0314)"
        )


def parse_radii(texts: Sequence[str], norm: str, force: bool = False) -> tuple[float, ...]:
    """Return what several radii mean, all written in one form; one that is given twice counts
    once. Raises ValueError as parse_eps, and for two that rows and tables could not tell apart."""
    radii = {parse_eps(text, norm, force): text for text in texts}
    refuse_mixed(texts, f"--eval-{norm} {' '.join(texts)}")
    by_key: dict[str, str] = {}
    for eps, text in radii.items():
        if (other := by_key.setdefault(eps_key(eps), text)) != text:
            raise ValueError(
                f"--eval-{norm} {other} {text}: both are {eps_key(eps)} to six digits, by which "
                "results name a radius; leave one out"
            )
    return tuple(radii)


def split_name(name: str) -> tuple[str, int | None, int]:
    """Return kind, steps (None: the kind's own) and restarts of "pgd-50-10". Raises ValueError."""
    match = re.fullmatch(r"(.*?)(?:-([1-9]\d*))?(?:-([1-9]\d*))?", name)
    kind, steps, restarts = match.groups() if match else (name, None, None)
    if kind not in ATTACKS or (steps and not ATTACKS[kind]):
        near = meant(name, (*ATTACKS, "pgd-20", "pgd-50-10"))
        raise ValueError(f"unknown attack {name!r}{near}; choose from {NAMES}")
    return kind, int(steps) if steps else None, int(restarts or 1)

"""Finished runs, read back and put together: the seeds of one setting, the settings that can be
compared, and what the papers report for them."""

import json
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

from bench.attacks.notation import LARGEST_LINF, eps_key, in_both_forms, parse_eps
from bench.evaluation.evaluate import NORM_NAMES
from bench.files import row_of
from bench.reports.rows import NEEDED, read_summary
from bench.reports.statistics import aggregate, spread
from bench.settings.config import MACHINE, USED_BY, Config, resolve
from bench.settings.effects import without_effect
from bench.settings.evaluation import Evaluation, resolve_evaluation
from bench.settings.methods import ADVERSARIES, OPTIMIZERS, split_method
from bench.settings.names import method_name
from bench.settings.recipes import load_recipe, recipe_names
from bench.settings.setting import check_settings, settings_of

NUMBER, OBJECT = (int, float), dict
KINDS: dict[str, Any] = {
    "natural": NUMBER, "images_per_second": NUMBER, "train_seconds": NUMBER, "test_images": int,
    "robust": OBJECT, "best": OBJECT, "attacks": OBJECT, "config": OBJECT, "evaluation": OBJECT,
    "method": str, "versions": OBJECT, "device": str, "git": (str, NoneType),
}  # fmt: skip
DEFAULTS = {f.name: f.default for f in fields(Config) if f.default is not MISSING}


# ---- reading


def checked(text: str, where: str) -> dict[str, Any]:
    """Return the row in `text`; raise ValueError for what is no row of a run."""
    return completed(row_of(text, where, NEEDED, "run"), where)


def completed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row with its config's later fields. Raises ValueError for values of other kinds, and
    for accuracies that are none or that it does not have."""
    odd = [f"{k} is {row[k]!r}" for k, kind in KINDS.items()
           if not isinstance(row[k], kind) or kind is NUMBER and not math.isfinite(row[k])]
    if not isinstance(said := row.get("warnings", []), list):
        odd.append(f"warnings is {said!r}")
    if odd := odd or odd_accuracies(row) or odd_settings(row):
        raise ValueError(f"{where} is no row of a run: {odd[0]}; remove it, and repeat the run's "
                         "command")  # fmt: skip
    return row | {"config": DEFAULTS | row["config"], "history": []}


def odd_accuracies(row: dict[str, Any]) -> list[str]:
    """Return in words which accuracies of a row are no fractions, are missing at one of its
    attacks' radii, or are at other ones."""
    wanted, odd = radii_of(row["attacks"]), []
    for at, of in (("", row), ("best: ", row["best"])):
        found = {("natural", ""): of.get("natural")} | radii_of(of.get("robust"))
        odd += [f"{at}{' '.join(place).strip()} is {value!r}" for place, value in found.items()
                if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 <= value <= 1]
        if found.keys() - {("natural", "")} != wanted.keys():
            odd.append(f"{at}its accuracies are not at its attacks' radii")
    return odd


def odd_settings(row: dict[str, Any]) -> list[str]:
    """Return in words what of a row's config or evaluation cannot be."""
    config, evaluation = DEFAULTS | row["config"], row["evaluation"]
    if row["method"] != (own := config.get("method")):
        return [f"method is {row['method']!r}, and its config's is {own!r}"]
    for norm in NORM_NAMES:
        if not isinstance(radii := evaluation.get(norm), list | tuple):
            return [f"its evaluation's {norm} is {radii!r}"]
    try:
        split_method(row["method"])
        for owner, values in ((Config, config), (Evaluation, evaluation)):
            known = {f.name for f in fields(owner)}
            check_settings(owner(**{k: v for k, v in values.items() if k in known}))
    except ValueError as e:
        return [str(e)]
    return []


def radii_of(by_norm: Any) -> dict[tuple[str, str], Any]:
    """Return what stands at each norm and radius; nothing for what is no dict of dicts."""
    by_norm = by_norm if isinstance(by_norm, dict) else {}
    return {(norm, eps): value for norm, by_eps in by_norm.items() if isinstance(by_eps, dict)
            for eps, value in by_eps.items()}  # fmt: skip


def lines_of(path: Path) -> list[str]:
    """Return a text file's lines. Raises ValueError with the path for what is no text."""
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"{str(path)!r} is no text ({e}); give another file") from e


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [checked(line, f"{str(path)!r}, line {i},") for i, line in enumerate(lines_of(path), 1)]


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return a run's epochs' metrics. Raises ValueError with the path and line of damage."""
    rows = []
    for i, line in enumerate(lines_of(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        own = [row.get(k) for k in ("epoch", "seconds")] if isinstance(row, dict) else [None]
        if not all(isinstance(value, NUMBER) for value in own):
            raise ValueError(
                f"{str(path)!r}, line {i}, is damaged; remove the file, and the report has no "
                "curves of this run"
            )
        rows.append(row)
    return rows


def summaries_in(folder: Path) -> list[Path]:
    """Return a run's summary.json and, of a study's further evaluations, summary-1.json, ..."""
    found = [*folder.glob("summary.json"), *folder.glob("summary-[1-9]*.json")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_directory(path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the finished runs at any depth, with their epochs' metrics as "history", and the
    directories of the unfinished ones."""
    rows, unfinished = [], []
    for folder in sorted(p.parent for p in path.rglob("config.json")):
        summaries, metrics = summaries_in(folder), folder / "metrics.jsonl"
        if not summaries:
            unfinished.append(folder)
        for summary in summaries:
            row = completed(read_summary(summary), repr(str(summary)))
            if metrics.exists():
                row["history"] = read_history(metrics)
            rows.append(row)
    return rows, unfinished


def read_runs(paths: list[Path]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the rows of all runs in directories and JSONL files, and the unfinished runs'
    directories. Of two rows of one config, judged by the same attacks on the same images, the last
    counts, however many images were attacked at a time.

    Raises ValueError naming the path that is missing, empty or holds something else.
    """
    latest: dict[str, dict[str, Any]] = {}
    unfinished = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{str(path)!r} is not there; `bench compare --out {path}` writes it")
        rows, open_runs = read_directory(path) if path.is_dir() else (read_jsonl(path), [])
        unfinished += open_runs
        if not rows:
            raise ValueError(
                f"{str(path)!r} holds no finished run; `bench compare --out DIR` writes a "
                "directory of them, and --rows FILE a row for each"
            )
        for row in rows:
            key = identity(row["config"], measured(row))
            if not row["history"]:
                row["history"] = latest.get(key, row)["history"]
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values()), unfinished


def identity(*values: Any) -> str:
    return json.dumps(values, sort_keys=True)


# ---- grouping


@dataclass
class Group:
    """The runs of one setting that differ in the seed alone.

    label: the method, and what tells the group from others of its section. last, best: means over
    the seeds (`aggregate`) at the two checkpoints.
    """

    label: str
    runs: list[dict[str, Any]]
    last: dict[str, Any]
    best: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0]["config"]

    @property
    def seeds(self) -> list[int]:
        return [run["config"]["seed"] for run in self.runs]

    @property
    def histories(self) -> list[list[dict[str, Any]]]:
        """One list a seed of its epochs' metrics; none unless every seed has them."""
        histories = [run["history"] for run in self.runs]
        return histories if all(histories) else []


@dataclass
class Section:
    """Groups that one table can hold: the same data, attacks and number of test images."""

    title: str
    groups: list[Group]

    @property
    def attacks(self) -> dict[str, dict[str, str]]:
        return self.groups[0].runs[0]["attacks"]


def measured(row: dict[str, Any]) -> str:
    """Return what two rows must share for their accuracies to be comparable."""
    return identity(row["config"]["data"], row["attacks"], row["test_images"], judged_on(row))


def judged_on(row: dict[str, Any]) -> str:
    """Return "test", "held-out", or "test" with the directory of other test images."""
    on, data = row["evaluation"].get("on", "test"), row["evaluation"].get("data")
    return f"{on} ({data})" if data else on


def grouped(rows: Iterable[dict[str, Any]], key) -> list[list[dict[str, Any]]]:
    """Return the rows in lists of equal key, in the order in which the keys first appear."""
    lists: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lists.setdefault(key(row), []).append(row)
    return list(lists.values())


def recipe_named(row: dict[str, Any]) -> str | None:
    return row["config"].get("recipe") or row.get("recipe")


def setting_among(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """Return a row -> all of its values but the seed. A run that names no recipe is of the first
    one that a run with equal values names."""
    recipes: dict[str, str | None] = {}

    def values(row: dict[str, Any]) -> str:
        return identity(row["config"] | {"seed": None, "recipe": None})

    for row in rows:
        recipes[values(row)] = recipes.get(values(row)) or recipe_named(row)
    return lambda row: identity(values(row), recipe_named(row) or recipes[values(row)])


def sections_of(rows: list[dict[str, Any]]) -> list[Section]:
    """Return the rows as sections of groups, by method, then by what tells them apart."""
    sections = []
    for of_section in grouped(rows, measured):
        groups = grouped(of_section, setting_among(of_section))
        told = told_apart([group[0]["config"] for group in groups])
        pairs = sorted(zip(told, groups, strict=True), key=lambda pair: place(*pair))
        first = of_section[0]
        title = f"{first['config']['data']}, {first['test_images']} {judged_on(first)} images"
        sections.append(Section(title, [group_of(keys, runs) for keys, runs in pairs]))
    return sections


def place(told: list[str], runs: list[dict[str, Any]]) -> tuple:
    config = runs[0]["config"]
    adversary, optimizer = split_method(config["method"])
    methods = [None, *ADVERSARIES].index(adversary), OPTIMIZERS.index(optimizer)
    values = [config[k] for k in told]
    numbers = [v if isinstance(v, int | float) else -1 for v in values]
    return methods, numbers, list(map(str, values))


def group_of(told: list[str], runs: list[dict[str, Any]]) -> Group:
    """Return the runs of one setting as a group; told: the values that its label names."""
    runs, config = sorted(runs, key=lambda run: run["config"]["seed"]), runs[0]["config"]
    values = [f"{k} {shown(k, config[k])}" for k in told if config[k] is not None]
    label = f"{method_name(config['method'])} {', '.join(values)}".strip()
    last = aggregate(config["method"], runs) | {"label": label}
    best = aggregate(config["method"], [run | run["best"] for run in runs]) | {"label": label}
    times = [run["train_seconds"] for run in runs]
    time = {"train_seconds": fmean(times), "train_seconds_std": spread(times)}
    return Group(label, runs, last | time, best | time)


def told_apart(configs: list[dict[str, Any]]) -> list[list[str]]:
    """Return for each config the names of the values in which it differs from others.

    A value that belongs to methods (rho) counts where the same method has several; any other
    (epochs) where any two configs differ.
    """
    result = []
    for config in configs:
        alike = [c for c in configs if c["method"] == config["method"]]
        result.append([
            k for k in config if k not in ("seed", "method", "recipe")
            and len({identity(c.get(k)) for c in (alike if k in USED_BY else configs)}) > 1
        ])  # fmt: skip
    return result


def shown(key: str, value: Any) -> str:
    return in_both_forms(eps_key(value)) if key in ("eps", "alpha") and value else str(value)


def other_images(section: Section) -> list[str]:
    """Return a sentence for the training and one for the test images whose fingerprints differ
    among the runs although they were read alike. What was made before there were fingerprints is
    not compared, nor are noisy labels, which are of the fingerprint and other ones for every seed.
    """
    found: dict[tuple[str, Any], set[str]] = {}
    for run in (run for group in section.groups for run in group.runs):
        config, evaluation = run["config"], run["evaluation"]
        own = None if evaluation.get("data") else run.get("test_fingerprint")
        prints = {
            "training": None if config["label_noise"] else run.get("fingerprint"),
            "test": run.get("judged_fingerprint", own) if evaluation.get("on") == "test" else None,
        }
        how = config["image_size"], config["augment"] == "resized-crop"
        for part, value in prints.items():
            found.setdefault((part, how), set()).add(value)
    parts = dict.fromkeys(part for (part, _), values in found.items() if len(values - {None}) > 1)
    return [f"By their fingerprints, not all of these runs have the same {part} images: do not "
            "compare them." for part in parts]  # fmt: skip


# ---- the papers


def recipe_of(group: Group) -> str | None:
    """Return the name of the recipe that the runs came from, or that has all of their values."""
    named = next(filter(None, map(recipe_named, group.runs)), None)
    equal = (name for name in recipe_names() if not differing(name, group.config))
    return named or next(equal, None)


@cache
def values_of_recipe(name: str) -> dict[str, Any]:
    values = asdict(resolve(None, name, {}))
    return {k: v for k, v in values.items() if k not in MACHINE | {"recipe"}}


def differing(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe that a config does not have, the machine's own left out."""
    return {k: v for k, v in values_of_recipe(name).items() if v != config[k]}


def known_recipe(group: Group) -> str | None:
    """Return that name if such a recipe exists here."""
    try:
        return recipe_of(group) and load_recipe(recipe_of(group)).name
    except ValueError:
        return None


def published(group: Group) -> dict[str, float]:
    """Return what the paper reports for the group's recipe, in %: "natural", "std" (of natural),
    "linf 1/255", ...; nothing for runs without a recipe."""
    name = known_recipe(group)
    return load_recipe(name).published if name else {}


def deviations(group: Group) -> str:
    """Return "epochs 200 -> 2, ..." for the values in which the runs differ from their recipe."""
    wanted = differing(recipe_of(group), group.config)
    return ", ".join(f"{k} {shown(k, v)} -> {shown(k, group.config[k])}" for k, v in wanted.items())


# ---- commands


def command(group: Group) -> str:
    """Return the command line that repeats the group's runs: one a run for those of several
    processes, and a last one for attacks or norms other than those that `bench compare` has."""
    config, method, evaluation = group.config, group.config["method"], group.runs[0]["evaluation"]
    usual = asdict(resolve_evaluation(config["data"], {}))
    own, judging = option_words(group), evaluation_words(usual, evaluation)
    trained, judged = force_words(training_radii(config)), force_words(evaluation["linf"])
    apart = {"--attacks", "--norms"} & set(judging)
    own += trained if apart else [*judging, *(trained or judged)]
    if config["processes"] > 1:
        start = ["torchrun", "--nproc-per-node", str(config["processes"]), "-m", "bench", "train"]
        runs = [[*start, "--method", method, "--seed", str(seed), *own,
                 *["--out", f"runs/again/{method}-seed{seed}"] * bool(apart)]
                for seed in group.seeds]  # fmt: skip
    else:
        runs = [["python", "-m", "bench", "compare", "--methods", method, "--seeds",
                 *map(str, group.seeds), *own, *["--out", "runs/again"] * bool(apart)]]  # fmt: skip
    training = " && ".join(map(shlex.join, runs))
    if not apart:
        return training
    return (f"{training} && for run in runs/again/{method}-seed*; "
            f'do python -m bench evaluate "$run/last.pt" {shlex.join(judging + judged)}; done')


def training_radii(config: dict[str, Any]) -> list[float]:
    """Return the training attack's radius and step where they are of l_inf."""
    linf = split_method(config["method"])[0] != "at-l2"
    return [config[k] for k in ("eps", "alpha") if linf and config[k] is not None]


def force_words(linf: Iterable[float]) -> list[str]:
    """Return what the command line asks for where it is given such radii."""
    return ["--force"] * any(eps > LARGEST_LINF for eps in linf)


def option_words(group: Group) -> list[str]:
    """Return the options of the group's data or recipe, and of what differs from their usual
    values; none that is without effect, such as a preset's cutout where nothing is cropped: the
    command would be refused."""
    config, recipe = group.config, known_recipe(group)
    words = ["--recipe", recipe] if recipe else ["--data", config["data"]]
    usual = asdict(resolve(config["method"], recipe, {} if recipe else {"data": config["data"]}))
    run = Config(**{f.name: config[f.name] for f in fields(Config)})
    for k, value in config.items():
        if k in ("seed", "recipe", "processes") or value is None or value == usual.get(k):
            continue
        if without_effect(k, value, [run]):
            continue
        option = "--" + k.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        else:
            words += [option, text_of(value) if k in ("eps", "alpha") else str(value)]
    return words


def evaluation_words(usual: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """Return the options of an evaluation that differs from the usual one."""
    norms = [norm for norm in NORM_NAMES if evaluation[norm]]
    words = ["--norms", *norms] if len(norms) == 1 else []
    if not norms:
        evaluation = evaluation | {"attacks": ("clean",)}
    if "pgd" not in evaluation.get("attacks", usual["attacks"]):
        evaluation = evaluation | {"steps": usual["steps"]}
    for name, of in settings_of(Evaluation).items():
        value = evaluation.get(name, of.value)
        value = tuple(value) if isinstance(value, list) else value
        if value in (None, (), usual[name]):
            continue
        words.append(f"--{of.option}")
        words += [text_of(v) if isinstance(v, float) else str(v)
                  for v in (value if isinstance(value, tuple) else (value,))]  # fmt: skip
    return words


def text_of(eps: float) -> str:
    """Return eps as the command line reads it back, to the bit: "8/255", or "0.0301/1"."""
    key = eps_key(eps)
    return key if parse_eps(key, "l2") == eps else f"{eps!r}/1"

"""Faults put into a copy of the code, one at a time; the named tests must notice each.

python -m tests.mutants [PART ...]   (make mutants; PART: only mutants with this in their file or
text). Names the survivors, and exits 1 if there are any, 2 if a text to replace is no longer in its
file or the tests are red without a fault. Another mutant is another line of MUTANTS: a file of the
checkout, a text that stands in it once, what takes its place, and the tests to run, as pytest takes
them; a `**/` stands for folders that files may have been moved to.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
STRENGTH, APGD = "tests/bench/test_strength.py", "tests/bench/test_apgd.py"
NOT_FINITE, EVALUATE = "tests/bench/test_not_finite.py", "tests/bench/test_evaluate.py"
ROBUSTBENCH, UNSOUND = "tests/bench/test_robustbench.py", "tests/bench/test_unsound_models.py"
METHODS, REFERENCE = "tests/bench/test_methods.py", "tests/unit/test_reference.py"


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [Mutant(*fields) for fields in [
    # kernels for the CPU
    ("kernels/cpu/climb.py", "and not masters and saved_at % LINE == 0", "and not masters",
     "tests/backends/test_cpu.py -k past"),
    ("kernels/cpu/step.py", "and not masters and w_at % LINE == 0", "and not masters",
     "tests/backends/test_cpu.py -k past"),
    ("kernels/cpu/memory.py", "builder.sub(count, done)", "count.type(0)",
     "tests/backends/test_cpu.py -k past"),
    ("kernels/cpu/step.py", "store(w_to, i, w,", "store(w_at, i, w,",
     "tests/backends/test_cpu.py -k past"),
    ("kernels/cpu/counts.py", " or args[COUNTED] != 0", "",
     "tests/backends/test_cpu.py -k to_the_bit"),
    ("kernels/cpu/threads.py", "        builder.call(put, [there])\n", "",
     "tests/backends/test_threads.py -k flush"),
    ("kernels/cpu/threads.py", "        builder.call(put, [own])\n", "",
     "tests/backends/test_threads.py -k flush"),
    # graphs, and what is prepared for a GPU
    ("fastsam/layout.py", "self._buffers_on_gpus() != self._on_gpus", "False",
     "tests/backends/test_prepared_launches.py"),
    ("fastsam/optimizer.py", "        layout.clear_cells()\n", "",
     "tests/unit/test_graph.py -k 'eager and scale'"),
    ("fastsam/space.py", "elif name in self._held:", "elif False:",
     "tests/unit/test_graph.py -k one_capture"),
    ("fastsam/graph.py", "        self._clear_gradients()\n        if self.attack",
     "        if self.attack", "tests/unit/test_graph.py -k adds_to_no"),
    # attacks
    ("bench/attacks/objectives.py", "(spread(z) if scale is None else scale)", "SPREAD",
     f"{STRENGTH} -k 'sure or pgd-linf'"),
    ("bench/attacks/objectives.py",
     "third = z.topk(min(3, z.shape[1])).values[:, -1:]", "third = low",
     f"{STRENGTH} -k 'spread or switched'"),
    ("bench/attacks/objectives.py", "torch.where(ratio == 0, 1.0, ratio)", "(ratio + 1e-3)",
     f"{STRENGTH} -k 'underflows'"),
    ("bench/attacks/objectives.py", "F.log_softmax(SPREAD * ((z - z.gather(1, top)) / scale), 1)",
     "F.log_softmax(SPREAD * (z / scale), 1)", f"{STRENGTH} -k 'departure'"),
    ("bench/attacks/pgd.py", "    g = g / torch.where(size == 0, 1.0, size)\n", "",
     "tests/**/test_pgd_kernels.py -k gradients_size"),
    ("bench/attacks/pgd.py", "torch.where(norm == 0, 1.0, norm)", "(norm + 0.1)",
     "tests/bench/test_attacks.py -k course"),
    ("bench/attacks/pgd.py", "per_image(attack.eps * radius, x)", "attack.eps",
     f"{STRENGTH} -k l2_start"),
    ("bench/attacks/pgd.py", "t.uniform_(-radius, radius,", "t.uniform_(0, radius,",
     f"{STRENGTH} -k linf_start"),
    ("bench/attacks/pgd.py", "return torch.where(per_image(lost, x_adv), torch.nan, x_adv)",
     "return x_adv", f"{NOT_FINITE} -k gradient"),
    ("bench/attacks/pgd.py", "drawn(x, Tensor.normal_, generator)).clamp(0, 1)\n    return",
     "drawn(x, Tensor.normal_, generator))\n    return", f"{STRENGTH} -k trades_starts"),
    ("bench/attacks/pgd.py", "NOISE = 2.0", "NOISE = 1.0", f"{METHODS} -k n_fgsm"),
    ("bench/attacks/pgd.py", 'eps / (4 if norm == "linf" else 8)', "eps / 4",
     "tests/bench/test_attacks.py -k sam_ats"),
    ("bench/attacks/objectives.py", "((steps - 1 - i) / max(steps - 1, 1))",
     "(i / max(steps - 1, 1))", "tests/bench/test_attacks.py -k grows"),
    ("bench/attacks/apgd.py", "(1 - alpha) * (self.now - self.before)", "0",
     f"{APGD} -k transcription"),
    ("bench/attacks/apgd.py", "RHO = 0.75", "RHO = 0.70", f"{APGD} -k halves"),
    ("bench/attacks/apgd.py", "ALPHA = 0.75", "ALPHA = 0.70", f"{APGD} -k transcription"),
    ("bench/attacks/apgd.py", "stuck = ~self.halved & (", "stuck = (", f"{APGD} -k halves"),
    ("bench/attacks/apgd.py",
     "found[course.index] = course.best", "found[course.index] = course.now",
     f"{APGD} -k 'transcription or returns'"),
    ("bench/attacks/apgd.py", "over = ~right | lost", "over = ~right", f"{NOT_FINITE} -k gradient"),
    ("bench/attacks/apgd.py", "if judge is not None and not right.all():", "if False:",
     f"{STRENGTH} -k judged"),
    ("bench/training/awp.py", "w.detach().norm() * unit(g[None])[0]", "unit(g[None])[0]",
     f"{METHODS} -k awp"),
    ("bench/training/adversarial.py",
     "run.config.beta * divergence(clean, adv)", "divergence(clean, adv)",
     f"{METHODS} -k trades_loss"),
    ("bench/settings/config.py", 'values["alpha"] *= values["eps"] / preset["eps"]', "pass",
     f"{METHODS} -k eps_alone"),
    ("kernels/**/pgd.py", "largest = not_zero(tl.max(highest))", "largest = 1.0",
     "tests/**/test_pgd_kernels.py -k gradients_size"),
    ("bench/settings/methods.py", "if k != APART.get(name)}", "}",
     "tests/bench/test_recipe_files.py -k relative"),
    # evaluation
    ("bench/attacks/objectives.py",
     "torch.where(z.isfinite().all(1), z.argmax(1), -1)", "z.argmax(1)",
     f"{NOT_FINITE} -k network"),
    ("bench/evaluation/evaluate.py",
     "torch.where(x.isfinite().flatten(1).all(1), answers(model(x)), -1)",
     "answers(model(x))", f"{NOT_FINITE} -k gradient"),
    ("bench/evaluation/evaluate.py", "stands &= kept", "stands = kept",
     f"{EVALUATE} {ROBUSTBENCH} -k 'worst_case or autoattack_gets'"),
    ("bench/evaluation/evaluate.py", "own[a.name] = kept.sum().item() / len(split)",
     "own[a.name] = kept.sum().item() / len(right)", f"{EVALUATE} -k worst_case"),
    ("bench/evaluation/evaluate.py", "SeedSequence([seed, image])", "SeedSequence([seed])",
     f"{STRENGTH} -k start"),
    ("bench/evaluation/evaluate.py", "with torch.autocast(x.device.type, torch.bfloat16):",
     "with torch.autocast(x.device.type, torch.bfloat16, enabled=False):", f"{STRENGTH} -k bf16"),
    ("bench/evaluation/evaluate.py", "stands[i + left] = answer", "stands[i + left] |= answer",
     f"{EVALUATE} -k withstands"),
    ("bench/evaluation/evaluate.py", "    model.eval()\n    cudnn", "    cudnn",
     f"{EVALUATE} -k training_mode_is"),
    ("bench/evaluation/evaluate.py", "if x.min() < 0 or x.max() > 1:", "if False:",
     f"{UNSOUND} -k outside_0"),
    ("bench/evaluation/masked_gradients.py",
     "(of_randomness(z, again) or of_company(z, others))", "of_randomness(z, again)",
     f"{UNSOUND} -k depend_on_the_batch"),
    ("bench/evaluation/masked_gradients.py", "faint = (plain < GUARD)", "faint = (plain == 0)",
     f"{UNSOUND} -k hides"),
    ("bench/evaluation/masked_gradients.py",
     "still = (g < torch.finfo(g.dtype).tiny)", "still = (g == 0)",
     f"{UNSOUND} -k hides"),
    # training and checkpoints
    ("bench/training/train.py", "    refuse_divergence(run, row, loss, out)\n", "",
     f"{NOT_FINITE} -k 'training or diverged'"),
    ("bench/files.py", "return value if math.isfinite(value) else None", "return value",
     f"{NOT_FINITE} -k files"),
    ("bench/training/train.py", '    run.opt.load_state_dict(checkpoint["optimizer"])\n', "",
     "tests/bench/test_train.py -k any_epoch"),
    ("bench/training/train.py",
     "if parts := changed_data(checkpoint, run.data):", 'if parts := "":',
     "tests/bench/test_train.py -k images_that_changed"),
    ("bench/training/epoch_state.py", '        self.attack.set_state(own["attack"])\n', "",
     "tests/bench/test_resume.py -k every"),
    ("bench/training/epoch_state.py", '        torch.set_rng_state(own["global"])\n', "",
     "tests/bench/test_resume.py -k every"),
    ("bench/training/checkpoint.py",
     '"test": ("test_fingerprint", data.test_fingerprint)', '"test": ("", "")',
     "tests/bench/test_files.py -k among_the_test"),
    ("bench/files.py", "            os.replace(tmp, path)",
     "            path.write_bytes(tmp.read_bytes())",
     "tests/bench/test_files.py -k reads_it_whole"),
    # images
    ("bench/data/images.py", "for p in own for place in (p.resolve(), *p.resolve().parents)}",
     "for p in own[:1] for place in (p.resolve(), *p.resolve().parents)}",
     "tests/bench/test_images.py -k circle"),
    ("bench/data/images.py", "            refuse_lost_end(image, data)\n", "",
     "tests/bench/test_images.py -k every_reader"),
    ("bench/data/datasets.py", "        warn_of_shared(name, pixels_of(train), pixels_of(test))\n",
     "", "tests/bench/test_images.py -k among"),
    # the optimizer: the mathematics, which every other backend is held to
    ("fastsam/reference.py", "h.lmbda * m + h.ema_share * g", "h.lmbda * m + g", REFERENCE),
    ("fastsam/reference.py", "return g - sigma * m", "return g + sigma * m", REFERENCE),
    ("fastsam/reference.py", "h.momentum * v + h.momentum_share * g", "h.momentum * v + g",
     REFERENCE),
    ("fastsam/reference.py", "g = g + h.momentum * v if h.nesterov else v", "g = v", REFERENCE),
    ("fastsam/reference.py", "c1, c2 = h.corrections(t)", "c1, c2 = 1, 1", REFERENCE),
    ("fastsam/reference.py", "gg.sqrt() * mm.sqrt()", "gg.sqrt()", REFERENCE),
    ("fastsam/reference.py", "1 / (1 + a * g * g).sqrt()", "1 / (1 + a * g * g)", REFERENCE),
    ("fastsam/batchnorm.py", "            norm.track_running_stats = False", "            pass",
     "tests/unit/test_batchnorm.py"),
    ("fastsam/interrupts.py", "    finally:\n        then()\n", "    finally:\n        pass\n",
     "tests/unit/test_invariants.py -k own_value"),
    ("fastsam/memory.py", "_push_on_torch_function_stack(ONLY_THEMSELVES)",
     "_len_torch_function_stack()", "tests/unit/test_state_edits.py -k one_element"),
    ("fastsam/calls.py", "profiler._is_profiler_enabled or ", "",
     "tests/unit/test_optimizer.py -k profiler_sees"),
    ("fastsam/calls.py", "or torchs._global_optimizer_pre_hooks", "",
     "tests/unit/test_optimizer.py -k global_hooks"),
    ("fastsam/calls.py", "was = torch.is_grad_enabled()", "was = True",
     "tests/unit/test_optimizer.py -k grad_mode"),
]]  # fmt: skip


class Unfit(Exception):
    """The list does not fit the code, or the code its tests."""


def found(root: Path, pattern: str) -> Path:
    paths = list(root.glob(pattern))
    if len(paths) != 1:
        raise Unfit(f"{pattern} is {len(paths)} files here, not one: name the file that it became")
    return paths[0]


def mutated(root: Path, mutant: Mutant) -> str:
    """Return the mutant's file with the fault in it."""
    text = found(root, mutant.file).read_text()
    if (n := text.count(mutant.old)) != 1:
        raise Unfit(f"{mutant.file} has {n} times, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def copy_of_checkout(folder: Path) -> Path:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def parted(tests: str) -> tuple[str, str]:
    """Return the files, and what -k chooses of them."""
    files, _, chosen = tests.partition(" -k ")
    return files, chosen.strip("'")


def together(tests: list[str]) -> list[str]:
    """Return commands that run all of these, one for each file."""
    by_files: dict[str, list[str]] = {}
    for files, chosen in map(parted, tests):
        by_files.setdefault(files, []).append(chosen)
    return [files if "" in chosen else f"{files} -k '{' or '.join(dict.fromkeys(chosen))}'"
            for files, chosen in by_files.items()]  # fmt: skip


def run(root: Path, tests: str) -> tuple[int, str]:
    """Return pytest's exit code and the end of what it said."""
    names, chosen = parted(tests)
    files = [str(found(root, name).relative_to(root)) for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command + (["-k", chosen] if chosen else []), cwd=root, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def survives(root: Path, mutant: Mutant) -> bool:
    """Whether the tests are green with the fault. Raises Unfit where they did not run."""
    path = found(root, mutant.file)
    whole = path.read_text()
    path.write_text(mutated(root, mutant))
    try:
        code, said = run(root, mutant.tests)
    finally:
        path.write_text(whole)
    if code not in (0, 1, -signal.SIGSEGV):  # as at addresses that no store takes
        raise Unfit(f"pytest ended with {code} on {mutant.tests}: {said}")
    return code == 0


def main(parts: list[str]) -> int:
    chosen = [m for m in MUTANTS if not parts or any(p in m.file + m.old for p in parts)]
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(WORKERS):
            trees.put(copy_of_checkout(Path(folder, str(i))))

        def in_a_tree(of: Callable[[Path, Any], Any], what: Any) -> Any:
            tree = trees.get()
            try:
                return of(tree, what)
            finally:
                trees.put(tree)

        for mutant in chosen:  # before the first test
            mutated(Path(folder, "0"), mutant)
        lives = []
        with ThreadPoolExecutor(WORKERS) as pool:
            whole = together([m.tests for m in chosen])
            for tests, (code, said) in zip(whole, pool.map(partial(in_a_tree, run), whole),
                                           strict=True):  # fmt: skip
                if code != 0:
                    raise Unfit(f"{tests} are not green without a fault: {said}")
            for mutant, lived in zip(chosen, pool.map(partial(in_a_tree, survives), chosen),
                                     strict=True):  # fmt: skip
                print(f"{'SURVIVES' if lived else 'killed  '} {mutant.file}: {mutant.old.strip()!r}"
                      f" -> {mutant.new.strip()!r}", flush=True)  # fmt: skip
                lives += [mutant] if lived else []
    print(f"{len(chosen) - len(lives)} of {len(chosen)} killed")
    return int(bool(lives))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unfit as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)

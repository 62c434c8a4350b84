"""A network's source as one file that needs no other of this repository."""

import ast
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType

from bench.models import MODELS, layers, library

HERE = "bench."


def standalone(name: str, width: int, channels: int, classes: Sequence[str]) -> str:
    """Return a Python file's text with `CLASSES` and `build()`, which returns the network that
    `bench.models.build_model` of these values does, normalisation first, to load weights into."""
    if name in MODELS:
        network = MODELS[name]
        parts = with_needed(sys.modules[network.__module__])
        made = f"{network.__name__}({channels}, {len(classes)}, {width})"
    else:
        parts = with_needed(library)
        made = f"library_model({name!r}, {channels}, {len(classes)})"
    parts = list(dict.fromkeys([layers, *parts]))
    imports: dict[str, None] = {}
    bodies: list[str] = []
    for part in parts:
        own, body = split_source(inspect.getsource(part))
        imports |= dict.fromkeys(own)
        bodies.append(body)
    return "\n\n\n".join([
        '"""The network that the weights beside this file belong to: CLASSES, build()."""',
        "\n".join(sorted(imports)), f"CLASSES = {list(classes)!r}",
        *bodies,
        "def build() -> nn.Module:\n"
        '    """(B, C, H, W) images in [0, 1] -> (B, classes) logits; load weights next."""\n'
        f"    return nn.Sequential(Normalize([0.0] * {channels}, [1.0] * {channels}), {made})\n",
    ])  # fmt: skip


def with_needed(part: ModuleType) -> list[ModuleType]:
    """Return a module of this repository after those that it imports from."""
    needed = [str(node.module) for node in ast.parse(inspect.getsource(part)).body
              if isinstance(node, ast.ImportFrom)]  # fmt: skip
    found = [other for name in needed if name.startswith(HERE)
             for other in with_needed(sys.modules[name])]  # fmt: skip
    return list(dict.fromkeys([*found, part]))


def split_source(text: str) -> tuple[list[str], str]:
    """Return a module's imports from elsewhere than this repository, and the rest, its docstring as
    a comment."""
    tree, lines = ast.parse(text), text.splitlines()
    imports = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not str(getattr(node, "module", "")).startswith(HERE):
                imports.append(ast.unparse(node))
        elif not is_docstring(node):
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        lines[first:last] = [""] * (last - first)
    about = (ast.get_docstring(tree) or "").splitlines()
    return imports, "\n".join(f"# {line}".rstrip() for line in about) + "\n\n" + "\n".join(
        lines
    ).strip("\n")


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

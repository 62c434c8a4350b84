"""The order of bench's floors: a room imports from those below it, and no two modules each other.

Imports inside functions count, for they are there for speed's sake; those for types alone do not
count as circles.
"""

import ast
from collections.abc import Iterator

from bench.provenance import ROOT

FLOORS = (
    {"spelling", "files", "provenance", "devices"},
    {"attacks", "data"},
    {"settings"},
    {"models"},
    {"evaluation"},
    {"training"},
    {"reports"},
    {"experiments"},
    {"speed", "theory"},
    {"cli"},
    {"__main__"},
)
# a program of its own, which plays a user of the command line
EXCEPT = {("bench.speed.gpu_tools", "bench.__main__")}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in (ROOT / "bench").glob("**/*.py")}  # fmt: skip
MODULES.pop("bench")


def imports(node: ast.AST, for_types: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each module of bench that is imported anywhere below, and whether for types alone."""
    for child in ast.iter_child_nodes(node):
        typed = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        names = []
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("bench"):
            inside = [f"{child.module}.{a.name}" for a in child.names]
            names = [name if name in MODULES else child.module for name in inside]
        elif isinstance(child, ast.Import):
            names = [a.name for a in child.names if a.name.startswith("bench.")]
        yield from ((name, typed) for name in names)
        yield from imports(child, typed)


def edges() -> dict[str, dict[str, bool]]:
    found: dict[str, dict[str, bool]] = {}
    for name, path in MODULES.items():
        found[name] = {}
        for other, typed in imports(ast.parse(path.read_text())):
            if other != name and (name, other) not in EXCEPT:
                found[name][other] = typed and found[name].get(other, True)
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor_and_imports_from_those_below():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == {room(name) for name in MODULES}
    up = [f"{name} -> {other}" for name, others in edges().items() for other in others
          if other != "bench" and room(name) != room(other)
          and floor[room(name)] <= floor[room(other)]]  # fmt: skip
    assert not up


def test_no_modules_import_each_other_in_a_circle():
    left = {name: {o for o, typed in others.items() if not typed and o in MODULES}
            for name, others in edges().items()}  # fmt: skip
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_the_graph_is_seen():
    found = edges()
    assert found["bench.experiments.pool"]["bench.experiments.places"] is False
    assert found["bench.settings.checks"]["bench.settings.config"] is True
    assert "bench.speed.step" in found["bench.cli.speed"]  # inside a function
    assert sum(map(len, found.values())) > 300

"""The package keeps to its plan: which room may know which, how large it may be, and what it never does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "bco_lightning"
ORDER = (
    {"errors", "options", "batch", "places", "identity"},
    {"parallel", "checkpoints"},
    {"objectives", "models", "data"},
    {"reference", "importance", "metrics", "figures"},
    {"callbacks"},
    {"module"},
    {"serving", "inspection", "demo"},
    {"cli"},
    {"__init__", "__main__"},
)
# May only become fewer; docs/architecture.md says what the package aims at.
MOST_LINES = 21_970
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))
LINES = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(node: ast.AST, everywhere: bool) -> Iterator[str]:
    """Names of our own modules, or of what is in them, that a file imports; not those for type checkers alone.

    Args:
        node: The file's tree.
        everywhere: Within functions too.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "bco_lightning":
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "bco_lightning")
        elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_of(child, everywhere)


def imported_rooms(path: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(ast.parse(path.read_text(encoding="utf-8")), everywhere=True)]
    return {name[1] if len(name) > 1 and name[1] in FLOOR else "__init__" for name in names} - {room_of(path)}


def test_a_room_imports_only_rooms_before_it() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {imported}"
        for path in FILES
        for imported in sorted(imported_rooms(path))
        if FLOOR[imported] > FLOOR.get(room_of(path), -1)
    ]
    assert wrong == []


def test_no_rooms_and_no_files_import_each_other_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        rooms.setdefault(room_of(path), set()).update(imported_rooms(path))
    tuple(TopologicalSorter(rooms).static_order())
    modules = {".".join(["bco_lightning", *path.relative_to(SOURCE).with_suffix("").parts]): path for path in FILES}
    files = {}
    for module, path in modules.items():
        names = list(imports_of(ast.parse(path.read_text(encoding="utf-8")), everywhere=False))
        candidates = [f"{name}{end}" for name in names for end in ("", ".__init__")]
        candidates += [f"{name.rpartition('.')[0]}{end}" for name in names for end in ("", ".__init__")]
        # A package's __init__ gathers what its own files hold; they may name it by way of no other package.
        files[module] = {name for name in candidates if name in modules and name != module}
    tuple(TopologicalSorter(files).static_order())


def test_the_package_does_not_grow() -> None:
    assert {name: lines for name, lines in LINES.items() if lines > 450} == {}
    assert LINES["module.py"] <= 400
    assert sum(LINES.values()) <= MOST_LINES
    assert len({room_of(path) for path in FILES}) <= 22
    assert {room_of(path) for path in FILES} <= set(FLOOR)


def test_types_are_rarely_left_unchecked() -> None:
    assert sum(path.read_text(encoding="utf-8").count("type: ignore") for path in FILES) < 40


def test_only_the_room_for_processes_knows_collectives() -> None:
    knowing = {room_of(path) for path in FILES if "torch.distributed." in path.read_text(encoding="utf-8")}
    assert knowing <= {"parallel", "checkpoints"}


def test_nothing_pickled_is_read_or_written() -> None:
    banned = ("import pickle", "import joblib", "weights_only=False", "yaml.load(", "estimated_stepping_batches(")
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in banned if word in text], path

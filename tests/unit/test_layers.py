"""Imports go one way, as the architecture says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "bco_lightning"
LAYERS = [
    {"errors", "batch", "seeding", "fingerprints", "cache_folder", "auc"},
    {"packaged", "faults", "config_safety", "gguf_reading", "shards", "distributed"},
    {"objectives", "reward_shift", "data", "models", "demo", "checkpointing"},
    {"metrics", "report", "reference_store", "optimizers", "trunk_cache", "strategies", "planning"},
    {"reference_cache", "importance"},
    {"module", "callbacks"},
    {"export", "inspection"},
    {"cli"},
    {"help_texts"},
    {"__main__", "__init__"},
]
# The module brings the callbacks that belong to the method; the demonstration samples the model.
NEIGHBOURS = [{"module", "callbacks"}, {"demo", "models"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name and name.startswith("bco_lightning."):
                imported = name.split(".")[1]
                assert LEVEL[imported] <= LEVEL[part(path)], f"{path.name} imports {name}"
                if LEVEL[imported] == LEVEL[part(path)] and {imported, part(path)} not in NEIGHBOURS:
                    assert imported == part(path), f"{path.name} imports its neighbour {name}"


def test_collectives_sharding_and_sharded_files_are_known_to_one_file_each() -> None:
    callers = {path.name for path in SOURCE.rglob("*.py") if "torch.distributed." in path.read_text(encoding="utf-8")}
    assert callers == {"distributed.py", "parallel.py", "shards.py"}


def test_nothing_pickled_is_read_or_written() -> None:
    banned = ("import pickle", "import joblib", "weights_only=False", "yaml.load(", "estimated_stepping_batches(")
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in banned if word in text], path

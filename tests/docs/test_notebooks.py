"""The notebooks run from top to bottom; what is committed of a run is pictures and words for those who only read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from bco_lightning.places import resolve_packaged

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def num_pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


@pytest.mark.parametrize("is_real", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.real_model])])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs_on_a_small_budget_and_shows_the_pictures_that_are_committed(
    path: Path, is_real: bool, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCO_NOTEBOOK_STEPS", "2")
    if not is_real:
        monkeypatch.setenv("BCO_NOTEBOOK_MODEL", tiny_model)
    for variable, name, number in (("BCO_NOTEBOOK_LOG", "train", 320), ("BCO_NOTEBOOK_HELD_OUT", "heldout", 32)):
        log = Path(resolve_packaged(f"package:bco_lightning/demo/{name}.jsonl"))
        few = tmp_path / log.name
        few.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:number]), encoding="utf-8")
        monkeypatch.setenv(variable, str(few))
    notebook = nbformat.read(path, as_version=4)
    expected = num_pictures(notebook)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    assert num_pictures(notebook) == expected > 8
    said = "".join(output.text for output in outputs_of(notebook) if output.get("name") == "stderr")
    assert "warn" not in said.lower()  # a model that is converted once shows a bar
    assert (tmp_path / "runs" / "explore" / "version_0" / "report.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_is_one_whole_run_without_paths_or_warnings(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = outputs_of(notebook)
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    said = "".join(str(output.get("text", output.get("data"))) for output in outputs)
    assert not re.search(r"(?<![\w/])/(?:root|home|Users|tmp)/", said)
    assert path.stat().st_size < 700_000

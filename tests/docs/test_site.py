"""The site is built without a word of complaint, fetches nothing from other hosts, and shows equations by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIGRATING = (ROOT / "docs" / "migrating_from_trl.md").read_text(encoding="utf-8")
TRL = json.loads((Path(__file__).parent / "trl_options.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.mark.slow
def test_it_builds_strictly_and_no_page_fetches_anything_from_another_host(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 25
    for path, text in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"']?(https?:[^\"' >]+)", text)
        fetched += re.findall(
            r"<link(?![^>]*rel=[\"']?(?:canonical|next|prev))[^>]+href=[\"']?(https?:[^\"' >]+)", text
        )
        assert fetched == [], path
        assert 'data-md-component="source"' not in text, path  # which would ask a forge for stars
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)[\"' ]*https?:", styles) == []


@pytest.mark.slow
def test_equations_and_options_are_shown(site: Path) -> None:
    how = (site / "how_it_works" / "index.html").read_text(encoding="utf-8")
    assert how.count("<math") == 4
    assert "$$" not in how
    assert 'href="../api/method/#bco_lightning.objectives.bco.bco_loss"' in how
    method = (site / "api" / "method" / "index.html").read_text(encoding="utf-8")
    assert "<math" in method
    assert ":math:" not in re.sub(r"<details.*?</details>", "", method, flags=re.DOTALL)
    training = (site / "api" / "training" / "index.html").read_text(encoding="utf-8")
    assert "Scale of the implicit reward; small allows a larger distance from the reference." in training


@pytest.mark.parametrize("kind", ["BCOConfig", "KTOConfig"])
def test_every_option_of_trl_is_in_the_table_with_its_default(kind: str) -> None:
    table = MIGRATING.partition(f"## Options of `{kind}`")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    versions = [fields[kind] for fields in TRL.values() if kind in fields]
    assert {row[0].strip("`") for row in rows} == set().union(*versions)
    for row in rows:
        told = [cell.strip("`") for cell in row[1 : 1 + len(versions)]]
        assert told == [repr(fields[row[0].strip("`")]) for fields in versions], row[0]

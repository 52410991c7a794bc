"""What README and the guides tell a user to type exists and parses, and what they point at is there."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import bco_lightning
from bco_lightning.cli import app, run
from bco_lightning.cli.safety import safe_parsing
from bco_lightning.metrics import ImplicitRewardMetrics

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    if path.name != "CHANGELOG.md"  # tells of what was
}
BLOCKS = [
    (name, language, code)
    for name, text in PAGES.items()
    for language, code in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
]
LAUNCHERS = ("configs/torchrun.sh", "configs/slurm.sbatch")  # they give what follows to `fit --config`


class ParsedError(Exception):
    """Nothing is to happen beyond."""


@pytest.fixture(scope="module")
def parser() -> Any:
    """Takes the words of a command line as far as all options are checked, by one parser for each kind of command."""
    parsers: dict[str, Any] = {}
    made: list[Any] = []

    def keep(cli: Any) -> None:
        made.append(cli.parser)
        raise ParsedError

    def parsing(kind: type, name: str) -> Callable[[list[str]], None]:
        def parse_with(words: list[str]) -> None:
            key = name or words[0]
            if key not in parsers:
                with pytest.raises(ParsedError):
                    kind([*([] if name else words[:1]), *bco])
                parsers[key] = made.pop()
            with safe_parsing():
                parsers[key].parse_args(words)

        return parse_with

    parsed = run.BCOArgumentParser.parsed
    bco = [f"--config={ROOT / 'configs' / 'bco.yaml'}"]

    def only_parsed(one: Any, words: list[str]) -> dict[str, Any]:
        parsed(one, words)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.BCOCLI, "instantiate_classes", keep)
        patch.setattr(run.InspectCLI, "instantiate_classes", keep)
        patch.setattr(run.BCOArgumentParser, "parsed", only_parsed)
        patch.setattr(app, "BCOCLI", parsing(run.BCOCLI, ""))
        patch.setattr(app, "InspectCLI", parsing(run.InspectCLI, "inspect"))

        def dispatched(words: list[str]) -> None:
            try:
                app._dispatch(app._with_recipes(words))
            except ParsedError:
                return

        yield dispatched


@pytest.fixture
def parse(parser: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return parser


def commands_in(code: str) -> list[list[str]]:
    """The words of each command of this package, behind its name."""
    found = []
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        if "bco_lightning " not in line and "bco-lightning " not in line and not any(one in line for one in LAUNCHERS):
            continue
        words = shlex.split(line, comments=True)
        if launcher := [word for word in words if word in LAUNCHERS]:
            found.append(["fit", "--config", *words[words.index(launcher[0]) + 1 :]])
        else:
            ours = [number for number, word in enumerate(words) if word in ("bco_lightning", "bco-lightning")]
            found += [words[number + 1 :] for number in ours]
    return [words for words in found if words]


def test_every_command_it_tells_to_type_is_one_with_its_options(parse: Any) -> None:
    commands: dict[str, dict[str, list[str]]] = {}  # the words of each option, and those that stand before any
    for _, language, code in BLOCKS:
        for name, *words in commands_in(code) if not language else ():
            option = ""
            for word in words:
                option = word.partition("=")[0] if word.startswith("--") else option
                if word.startswith("--") or not option:
                    commands.setdefault(name, {})[option] = []
                commands[name][option].append(word)
    assert len(commands) > 6
    for name, options in commands.items():
        parse([name, *(word for words in options.values() for word in words)])


def test_every_config_it_shows_is_one(parse: Any, tmp_path: Path) -> None:
    shown = [code for _, language, code in BLOCKS if language == "yaml"]
    files = [tmp_path / f"{number}.yaml" for number in range(len(shown))]
    for file, code in zip(files, shown, strict=True):
        file.write_text(code, encoding="utf-8")
    parse(["fit", "--config", "configs/bco.yaml", *(f"--config={file}" for file in files)])


def test_every_option_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(
            ["fit", f"--config={ROOT / 'configs' / 'bco.yaml'}", "--data.columns.prompt=question", "--print_config"]
        )
    config = yaml.safe_load(capsys.readouterr().out)
    groups = "model|data|trainer|checkpoint|guard|samples|predictions"
    for page, text in PAGES.items():
        prose = re.sub(r"^```python.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for group, name in re.findall(rf"(?:--|`)({groups})\.([a-z_]+)\b(?!\()", prose):
            assert name in config[group] or name in ("jsonl", "py"), f"{page}: {group}.{name}"


def test_every_file_it_names_or_links_exists() -> None:
    for page, text in PAGES.items():
        for name in re.findall(r"(?<![\w./-])(?:configs|docs|notebooks|tests|src)/[\w./]+", text):
            assert (ROOT / name.rstrip("./")).exists(), f"{page}: {name}"
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page}: {link}"


def test_every_function_it_links_is_in_that_file() -> None:
    linked = [
        (page, name, path)
        for page, text in PAGES.items()
        for name, path in re.findall(r"\[`(\w+)`\]\(\.\./(src/[\w/]+\.py)\)", text)
    ]
    assert len(linked) > 8
    for page, name, path in linked:
        assert re.search(rf"^(?:class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), (
            f"{page}: {name} in {path}"
        )


def test_every_metric_is_explained() -> None:
    for name in ImplicitRewardMetrics().compute():
        assert f"`{name.split('/')[-1]}`" in PAGES["docs/reading_a_run.md"], name


def test_its_python_example_runs_as_far_as_building_the_objects() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    exec(example.rsplit("Trainer(", 1)[0], namespace)  # noqa: S102
    assert isinstance(namespace["module"], bco_lightning.BCOModule)


def test_what_python_examples_take_from_the_package_is_there() -> None:
    for page, language, code in BLOCKS:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bco_lightning"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(str(node.module)), alias.name), f"{page}: {alias.name}"


def test_rows_it_shows_are_json() -> None:
    for _, language, code in BLOCKS:
        if language == "json":
            assert all(isinstance(json.loads(line), dict) for line in code.splitlines())


def test_the_front_page_is_short_and_begins_with_what_to_type() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line.startswith("make demo") for line in lines].index(True) < 25
    assert 'OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical -m "not slow"' in lines


def test_links_of_the_front_page_work_on_pypi() -> None:
    told = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert PROJECT["project"]["dynamic"] == ["readme"]
    assert [part["path"] for part in told["fragments"]] == ["README.md"]
    text = README
    for each in told["substitutions"]:
        replacement = re.sub(r"\\g<(\d)>", r"\\\1", each["replacement"])
        text = re.sub(each["pattern"], replacement, text)
    repository = PROJECT["project"]["urls"]["Repository"]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [link.removeprefix(repository) for link in links if link.startswith(repository)]
    assert len(ours) > 20
    for link in ours:
        (path,) = re.findall(r"^/(?:blob|raw)/main/([\w./]+)$", link)
        assert (ROOT / path).exists()
        assert link.startswith("/raw/") == path.endswith(".png")


def test_every_public_name_can_be_imported() -> None:
    for name in bco_lightning.__all__:
        assert getattr(bco_lightning, name).__doc__, name


def test_one_version_is_told_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == bco_lightning.__version__ == cited["version"]

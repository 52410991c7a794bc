"""What the site does with pages that are read in the repository too: links, equations, and pages from outside docs/."""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
FROM_OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^]\n]*(?:\n[^]\n]+)?)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]+)?\)")


def on_config(config: Any) -> Any:
    """Takes addresses from pyproject.toml, where alone they stand."""
    # As repo_url, of a known forge, the pages would ask that forge for stars.
    config.extra = {"generator": False, "social": [{"icon": "fontawesome/brands/git-alt", "link": REPOSITORY}]}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie at the top of the repository, and pictures of the benchmarks."""
    for name in FROM_OUTSIDE:
        files.append(File.generated(config, name, content=""))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"assets/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Reads pages from outside; makes links to files beside docs/ lead to the repository or into the API pages."""
    name = page.file.src_uri
    source = FROM_OUTSIDE.get(name, f"docs/{name}")
    if name in FROM_OUTSIDE:
        markdown = (ROOT / source).read_text(encoding="utf-8")
    if name == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    return with_equations(_LINK.sub(lambda link: _led(link, source, name), markdown))


def _led(link: re.Match[str], source: str, page: str) -> str:
    """A link of a file of the repository as it is on its page of the site."""
    picture, text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = {outside: name for name, outside in FROM_OUTSIDE.items()}.get(path)
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
    elif picture:
        inside = f"assets/{posixpath.basename(path)}"
    if inside:
        return f"{picture}[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor or ''})"
    if path.startswith("src/") and re.fullmatch(r"`\w+`", text):
        module = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return f"[{text}][{module}.{text.strip('`')}]"
    return f"[{text}]({REPOSITORY}/blob/main/{path}{anchor or ''})"


def with_equations(text: str) -> str:
    """Text with its equations as MathML, which browsers show by themselves."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: _mathml(found[1], "block"), text, flags=re.DOTALL)
    text = re.sub(
        r"^\.\. math::\n((?:[ ]+.*\n|\n)+)", lambda found: _mathml(found[1], "block") + "\n\n", text, flags=re.MULTILINE
    )
    return re.sub(r":math:`([^`]+)`", lambda found: _mathml(found[1], "inline"), text)


def _mathml(latex: str, display: str) -> str:
    return convert(" ".join(latex.split()), display=display)


class Roles(griffe.Extension):
    """Makes links and equations of the roles in docstrings, and docstrings of the help that options have."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """The help of an option, its first argument, is what there is to say about it."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option" and value.arguments:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(value.arguments[0])), parent=attr)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of whatever griffe has read."""
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod):`~?([\w.]+)`", _reference, obj.docstring.value)
            obj.docstring.value = with_equations(text.replace("``", "`"))


def _reference(role: re.Match[str]) -> str:
    return f"`{role[1].rpartition('.')[2]}`"

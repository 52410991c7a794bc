"""What jsonargparse has to say of a command line or a config, in one line: where, expected, found, and the nearest."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable

_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN = re.compile(
    r"(?:Group '([\w.]+)' does not )?(?:accept option|nested key|[Uu]nrecognized arguments:|Option|Key) '?([^\s'=]+)"
)
_IN_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s*(.+?)(?=\n\s*- |\n\s*Given value|\Z)", re.DOTALL)
_GIVEN_CLASS = re.compile(r"Given value: Namespace\(class_path='([\w.]+)'")
_IN_UNION = re.compile(r"\n\s*- (?!Expected a|Not a valid|Does not validate)(.+?)(?=\n\s*- |\n\s*Given|\Z)", re.DOTALL)
_NO_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_EXPECTED = re.compile(r"Expected an? (?!path but )(.+?)(?:\. Got value|\n|$)")
_FOUND = re.compile(r"(?:Given value: |(?<!\n)Got value: (?!.*Given value: ))(.*)\Z", re.DOTALL)
_REQUIRED = re.compile(r"arguments are required: (?:fit\.|validate\.|test\.|predict\.)?(\S+)")
_CHOICES = re.compile(r"invalid choice: '(\w*)' \(choose from|to be one of \{fit,")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null",
    "list": "a list", "Iterable": "a list", "dict": "a mapping", "tuple": "a list",
}  # fmt: skip
_NO_OPTION = re.compile(r"[hc]|(.+\.)?help|.+\+|print_.+|config")
_ANY = "command line"
_MOST, _LONGEST = 6, 1000


def in_one_line(message: str, options: Iterable[str] = (), commands: Iterable[str] = ()) -> tuple[str, str]:
    """Where something is wrong, and what; of a name that is not known, the nearest among ``options``."""
    key = _KEY.search(message)
    where = key[1] if key else _ANY
    if choice := _CHOICES.search(message):
        return "command", f"expected {_nearest(choice[1] or '', commands)}, found {choice[1] or 'none'}."
    if message.startswith("Unexpected config"):
        return "config", "expected a mapping of options, found YAML that is none."
    if problem := _IN_CLASS.search(message):
        return _of_class(where, problem[1], problem[2])
    given, told = _GIVEN_CLASS.search(message), _IN_UNION.findall(message)
    if given and told:  # a class was made, and has raised something
        return _of_class(where, given[1], told[0])
    if required := _REQUIRED.search(message):
        return required[1].rstrip(","), "expected a value, found none."
    if unknown := None if key else _UNKNOWN.search(message):
        name = ".".join(filter(None, unknown.groups()))
        return name, f"expected an option, found none of that name; nearest are {_nearest(name, options)}."
    if kinds := list(dict.fromkeys(_kind(found, message) for found in _EXPECTED.findall(message))):
        found = _FOUND.search(message)
        return where, f"expected {' or '.join(kinds)}, found {_short(found[1]) if found else 'something else'}."
    return where, _short(_KEY.sub("", message).lstrip(": "))


def _of_class(where: str, path: str, problem: str) -> tuple[str, str]:
    """What is wrong with the arguments of a class, or with its name."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", problem):
        names = inspect.signature(found).parameters if found else ()
        nearest = _nearest(unknown[1], names)
        return f"{where}.{unknown[1]}", f"expected an option of {name}, found none of that name; nearest are {nearest}."
    if missing := _NO_CLASS.search(problem):
        nearest = _nearest(missing[2], getattr(sys.modules.get(missing[1]), "__all__", ()))
        return where, f"expected a class of {missing[1]}, found no {missing[2]}; nearest are {nearest}."
    inner, told = in_one_line(problem)
    told = told if inner == _ANY else f"{inner}: {told}"
    return (path, told) if where == _ANY else (where, f"{name}: {told}")


def _kind(expected: str, message: str) -> str:
    """The words of users for a type of Python."""
    if words := re.match(r"typing\.Literal\[(.+)\]", expected):
        return words[1].replace(", ", " or ").replace("'", "")
    if expected.startswith("dot import path"):  # of which class, stands among the members of the union
        members = re.findall(r"(?<=[\[' ])((?:\w+\.)+)(\w+)", message)
        module, name = next((each for each in members if not each[0].startswith(("collections", "typing"))), ("", ""))
        base = getattr(sys.modules.get(module := module.rstrip(".")), name, type(None))
        home, found = sys.modules.get(module.rpartition(".")[0]), _FOUND.search(message)
        public = [getattr(home, each, None) for each in getattr(home, "__all__", ())]
        names = [each.__name__ for each in public if inspect.isclass(each) and issubclass(each, base) and each != base]
        return f"a {name} such as {_nearest(found[1] if found else '', names)}" if names else "a mapping"
    kind = expected.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return _KINDS.get(kind, f"a {kind}")


def _nearest(given: str, names: Iterable[str]) -> str:
    """Some names, those that look most like the given one first; of dotted ones only what lies in the same group."""
    given, names = given.lstrip("-"), [name for name in names if not _NO_OPTION.fullmatch(name)]
    if not given:
        return ", ".join(names)
    group = given.rpartition(".")[0]
    same = [name for name in names if name.rpartition(".")[0] == group] if group else []
    return ", ".join(difflib.get_close_matches(given, same or names, n=_MOST, cutoff=0.0)) or "none"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."

"""Where things are: files of installed packages, recipes, and the folder for what can be computed again."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import stat
from pathlib import Path

from bco_lightning.errors import ConfigError

_SCHEME = "package:"


def cache_root(given: str | None = None) -> Path:
    """The folder of all caches: the one given, that of ``BCO_CACHE``, or the user's own for such things."""
    named = given or os.environ.get("BCO_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bco_lightning"


def recipe(name: str) -> str:
    """The file of a config that comes with this package, such as ``bco``; what names none comes back unchanged."""
    bare = re.fullmatch(r"(?:configs/)?([\w/-]+)\.yaml|[\w/-]+", name)
    if not bare or os.path.lexists(name):
        return name
    # Within an installed package, or beside the sources that it is installed from.
    folders = [folder for parent in (0, 2) if (folder := Path(__file__).parents[parent] / "configs").is_dir()]
    known = {
        str(file.relative_to(folder).with_suffix("")): file for folder in folders for file in folder.rglob("*.yaml")
    }
    if bare[1]:
        if bare[1] not in known:
            return name
        remedy = f"Type it where the repository is, or --config {bare[1]} anywhere."
        raise ConfigError("--config", f"expected a file, found none at {name!r}.", remedy)
    if name not in known:
        raise ConfigError("--config", f"expected a file, or one of {', '.join(sorted(known))}; found {name!r}.")
    return str(known[name])


def require_free(option: str, target: Path, ours: str | None = None) -> None:
    """Refuses, before any work is done, to write where something is already, be it a link, or where nobody can.

    ``ours`` is how files of the same kind begin: such a one may be replaced, as the user has said; empty if they could
    have said so.
    """
    target, found = target.absolute(), ""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(f"{target}.partial-12345678")  # about the name that it has until it is whole
        if os.path.lexists(target):
            found = "something of that name"
            if ours and target.is_file() and not target.is_symlink():
                with target.open("rb") as file:
                    found = "" if file.read(len(ours)) == ours.encode() else f"{found} that this command did not write"
        folder = next((folder for folder in target.parents if os.path.lexists(folder)), target)
        if not os.access(folder, os.W_OK | os.X_OK):
            found = f"that {folder} cannot be written to"
    except OSError as error:
        found = f"that it cannot be ({error.strerror})"
    if found:
        problem = f"expected a name to write under that is free ({target}), found {found}."
        also = "" if ours is None else " With --overwrite, what this command wrote is replaced."
        raise ConfigError(option, problem, f"Nothing is replaced: remove it, or choose another.{also}")


def is_private(folder: Path) -> bool:
    """Whether it is a folder, and no link to one, whose content nobody but this user can have made or changed."""
    status = folder.lstat()
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o077
    return stat.S_ISDIR(status.st_mode) and is_ours


def resolve_packaged(name: str) -> str:
    """Turns ``package:NAME/path`` into the path of that file or folder; any other name comes back unchanged.

    The package is located, not imported; a path that leads out of it is refused.
    """
    if not name.startswith(_SCHEME):
        return name
    package, _, inside = name.removeprefix(_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        problem = f"expected an installed Python package called {package!r}, found none."
        raise ConfigError(name, problem, f"Install it, for instance: pip install --no-deps {package.replace('_', '-')}")
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise ConfigError(name, f"expected a file or folder inside the package {package!r}, found no {inside!r} there.")
    return str(path)

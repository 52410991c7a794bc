"""Which files can be read from the middle, and how."""

from __future__ import annotations

from bco_lightning.data.files import HUB, arrow_folder, expand, suffix_of
from bco_lightning.data.remote import is_remote, public_name
from bco_lightning.data.source import Source
from bco_lightning.data.streaming.blocks import RecordFile
from bco_lightning.data.streaming.json_lines import JsonLines
from bco_lightning.data.streaming.tables import ArrowFolder, ParquetRows
from bco_lightning.errors import FeedbackRowError

_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")


def files_of(source: Source) -> list[str]:
    """The files of a source, each of which can be read from the middle.

    Raises:
        FeedbackRowError: If there are none, or one of them cannot.
    """
    if source.path.startswith(HUB):
        name = source.path.removeprefix(HUB).partition("@")[0]
        raise FeedbackRowError(
            source.path,
            "expected files with data.streaming, found a data set of the hub.",
            f"Name its Parquet files, for instance hf://datasets/{name}/**/*.parquet.",
        )
    files = expand(source.path)
    for file in files:
        _require_middle(file)
    return files


def record_file(path: str) -> RecordFile:
    """Reads a file that :func:`files_of` has given."""
    suffix = suffix_of(path)
    if suffix in _LINES:
        return JsonLines(path)
    return ParquetRows(path) if suffix == ".parquet" else ArrowFolder(path)


def _require_middle(file: str) -> None:
    name, suffix = public_name(file), suffix_of(file)
    if name.lower().endswith(_PACKED):
        raise _refused(name, "a packed one", "Unpack it, or convert it to Parquet, which is packed inside.")
    if suffix in (*_LINES, ".parquet") or (not is_remote(file) and arrow_folder(file) is not None):
        return
    raise _refused(name, f"a {suffix} file", "Convert it to JSON lines or Parquet.")


def _refused(name: str, found: str, remedy: str) -> FeedbackRowError:
    return FeedbackRowError(
        name, f"expected a file that can be read from the middle with data.streaming, found {found}.", remedy
    )

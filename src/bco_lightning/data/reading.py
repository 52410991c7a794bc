"""From sources to the rows of each data set, read now or found as they were read before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bco_lightning.data.conflicts import Conflicts
from bco_lightning.data.files import content_key, expand
from bco_lightning.data.loading import BadRowPolicy, BadRows, Loaded, RowLoader
from bco_lightning.data.row_cache import ReadRows, RowCache
from bco_lightning.data.row_counts import Counted, FeedbackSummary, RowCounts
from bco_lightning.data.row_table import RowTable, held_out_prompts
from bco_lightning.data.source import RowFormat, Source, chosen_rating
from bco_lightning.data.tokenize import LengthLimits, RowTokenizer, chosen_template
from bco_lightning.errors import check_choice
from bco_lightning.identity import digest_of_tokenizer, digest_of_values

_VERSIONS = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")


@dataclass(frozen=True)
class ReadingOptions:
    """What rows depend on besides their sources and the tokenizer.

    Args:
        row_format: How records become rows, where a source does not say it itself.
        limits: Lengths in tokens.
        chat_template: As :class:`RowTokenizer` takes it.
        conflicts: What becomes of answers with thumbs of both kinds.
        bad_rows: What becomes of malformed rows.
        max_bad_rows: Share of them that is too many.
        seed: Seed of the choice of prompts to hold out.
    """

    row_format: RowFormat = field(default_factory=RowFormat)
    limits: LengthLimits = field(default_factory=LengthLimits)
    chat_template: str | None = None
    conflicts: Conflicts = "keep"
    bad_rows: BadRowPolicy = "strict"
    max_bad_rows: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("data.conflicts", self.conflicts, get_args(Conflicts))

    def format_of(self, source: Source) -> RowFormat:
        """How the records of one source become rows."""
        default = self.row_format
        return RowFormat(
            source.format or default.format,
            source.columns or default.columns,
            chosen_rating(source.rating) or default.rating,
            default.loss_on,
        )


class RowReader:
    """Reads data sets.

    Args:
        options: What rows depend on.
        tokenizer: A transformers tokenizer.
        cache: Where rows are looked up and kept; ``None`` reads them each time.
    """

    def __init__(self, options: ReadingOptions, tokenizer: Any, cache: RowCache | None = None) -> None:
        self._options, self._cache = options, cache
        self._tokenizer = tokenizer
        self.row_tokenizer = RowTokenizer(tokenizer, options.limits, options.chat_template)

    def read_all(self, name: str, sources: Sequence[Source], labelled: bool = True) -> ReadRows:
        """All rows of ``sources`` as one data set.

        Raises:
            FeedbackRowError: On a missing source or a malformed row.
        """

        def read(folder: Path | None) -> ReadRows:
            return self._read_whole(name, sources, folder, labelled)[0]

        return self._read(read, name, {name: sources}, labelled=labelled)

    def read_training(
        self, sources: Sequence[Source], validation_sources: Sequence[Source], validation_fraction: float
    ) -> ReadRows:
        """Rows to train on, and those to validate with: of their own sources, or held out by prompt.

        Raises:
            FeedbackRowError: On a missing source or a malformed row.
        """

        def read(folder: Path | None) -> ReadRows:
            with self._table(sources) as table:
                bad_rows, loaded = self._load(sources, table)
                summary = FeedbackSummary.of(table.answer_keys, table.thumbs_up, loaded.rows_of)
                table.leave_out_conflicts(self._options.conflicts)
                held_out = np.zeros(len(table), dtype=bool)
                others = ReadRows({})
                if validation_sources:
                    others, prompt_keys = self._read_whole("validation", validation_sources, folder)
                    shared = np.isin(prompt_keys, table.prompt_keys)
                    summary.validation_prompts_in_training = int(shared.sum())
                elif validation_fraction:
                    held_out = held_out_prompts(table.prompt_keys, validation_fraction, self._options.seed)
                chosen = {"train": ~held_out, **({"validation": held_out} if held_out.any() else {})}
                row_sets = table.divide(chosen, folder)
            _note_others(row_sets["train"].counts, bad_rows, loaded)
            return ReadRows({**row_sets, **others.row_sets}, summary)

        named = {"train": sources, "validation": validation_sources}
        return self._read(read, "training", named, validation_fraction=validation_fraction)

    def _read_whole(
        self, name: str, sources: Sequence[Source], folder: Path | None, labelled: bool = True
    ) -> tuple[ReadRows, np.ndarray[Any, Any]]:
        """All rows as one data set, and the keys of their prompts."""
        with self._table(sources) as table:
            bad_rows, loaded = self._load(sources, table, labelled)
            row_sets = table.divide({name: np.ones(len(table), dtype=bool)}, folder)
            prompt_keys = table.prompt_keys
        _note_others(row_sets[name].counts, bad_rows, loaded)
        return ReadRows(row_sets), prompt_keys

    def _table(self, sources: Sequence[Source]) -> RowTable:
        return RowTable([source.label for source in sources])

    def _load(self, sources: Sequence[Source], table: RowTable, labelled: bool = True) -> tuple[BadRows, Loaded]:
        bad_rows = BadRows(self._options.bad_rows, self._options.max_bad_rows)
        loader = RowLoader(self._options.format_of, self.row_tokenizer, bad_rows, labelled)
        return bad_rows, loader.load(sources, table)

    def _read(self, read: Any, kind: str, sources: dict[str, Sequence[Source]], **others: Any) -> ReadRows:
        contents = [_contents_of(source.path) for named in sources.values() for source in named]
        if self._cache is None or any(content is None for content in contents):
            return read(None)  # type: ignore[no-any-return]
        key = digest_of_values(
            {
                "code": _digest_of_code(),
                "versions": {name: version(name) for name in _VERSIONS},
                "kind": kind,
                "contents": contents,
                "sources": {name: [asdict(source) for source in named] for name, named in sources.items()},
                "options": {
                    **asdict(self._options),
                    "chat_template": chosen_template(self._tokenizer, self._options.chat_template),
                },
                "tokenizer": digest_of_tokenizer(self._tokenizer),
                "templates": str(self._tokenizer.chat_template),
                **others,
            }
        )
        return self._cache.get(key, read)


@cache
def _digest_of_code() -> str:
    """A digest of all that makes rows of records: a mended fault must not leave the rows that it made."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _contents_of(source: str) -> dict[str, str] | None:
    """What tells the content of each file of a source, or nothing where that cannot be known without reading."""
    if source.startswith("hub:"):
        return None
    keys = {path: content_key(path) for path in expand(source)}
    return keys if all(keys.values()) else None


def _note_others(counts: RowCounts, bad_rows: BadRows, loaded: Loaded) -> None:
    counts.formats = loaded.formats
    counts.skip(Counted(bad_rows.count, bad_rows.places))
    for reason, counted in loaded.left_out.items():
        counts.leave_out(reason, counted)

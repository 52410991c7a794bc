"""From the sources of a data set to its rows: read now, or found as they were read before."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.cache import kept_folder
from bco_lightning.data.chat import asks_for_date, chosen_template, today
from bco_lightning.data.counts import FeedbackSummary, RowCounts
from bco_lightning.data.feedback_beside import FeedbackBeside
from bco_lightning.data.files import content_key, expand
from bco_lightning.data.formats.record_format import RowFormat
from bco_lightning.data.images import ImageFinder, ImageInputs
from bco_lightning.data.options import Columns, DataOptions, Rating, Source
from bco_lightning.data.presets import PRESETS
from bco_lightning.data.records import record_file, seekable_files
from bco_lightning.data.records.record_file import RecordFile
from bco_lightning.data.remote import GIVEN, place_in, public_name
from bco_lightning.data.rows import RatedRow, RowMaker
from bco_lightning.data.stream import PlaceTable, RowPlace
from bco_lightning.data.table import RowTable, held_out_prompts
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.data.values import keys_of
from bco_lightning.errors import FeedbackRowError
from bco_lightning.identity import digest_of_code, digest_of_tokenizer, digest_of_values

BAD_ROWS = "bad_rows.jsonl"  # of what is read together: each malformed row, by FeedbackRowError.as_fields
SEE_ALL = f"To see all such rows at once: python -m bco_lightning inspect, which writes {BAD_ROWS}."
_VERSIONS = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")
# Rows are many small objects without cycles; looking for some after every 700 of them took a fifth of the time.
_COLLECT_AFTER = (50_000, 20, 50)
_OF_ROWS = (
    "format", "columns", "rating", "preset", "loss_on", "conflicts", "max_length", "max_prompt_length", "long_prompts",
    "long_completions", "seed", "bad_rows", "max_bad_rows", "few_bad_rows", "streaming", "image_folder",
    "image_urls",
)  # fmt: skip


@dataclass
class RowSet:
    """The rows of a data set: what became of all that were read, a digest of what they say, and those that are used."""

    counts: RowCounts
    digest: str
    dataset: Dataset | None = None  # of a stream, the places of its rows
    files: list[dict[str, Any]] | None = None  # of a stream


@dataclass
class ReadRows:
    """What reading has found, in a folder that other processes of this node open too."""

    folder: Path
    row_sets: dict[str, RowSet]
    summary: FeedbackSummary | None = None

    @classmethod
    def opened(cls, folder: Path, values: Mapping[str, Any]) -> ReadRows:
        """Opens the files of a folder; whatever error comes where they or the values are not such as ours."""
        row_sets = {}
        for name, told in values["row_sets"].items():
            counts = RowCounts.from_values(told["counts"])
            if counts.name != name or not name.isidentifier():
                raise ValueError(name)
            if any(Path(path).stat().st_mtime_ns != mark for path, mark in told.get("images", {}).items()):
                raise ValueError("images that have changed")
            dataset = Dataset.from_file(str(folder / f"{name}.arrow")) if counts.used else None
            row_sets[name] = RowSet(counts, told["digest"], dataset, told.get("files"))
        return cls(folder, row_sets, FeedbackSummary(**values["summary"]) if "summary" in values else None)

    def bad_rows(self) -> list[dict[str, str]]:
        """Each malformed row that was left out."""
        return [json.loads(line) for line in (self.folder / BAD_ROWS).read_text(encoding="utf-8").splitlines()]

    def contents(self) -> dict[str, Any]:
        """Digest and numbers of each data set, which are the same on every node; places may differ."""
        told = ((name, known.digest, known.counts) for name, known in self.row_sets.items())
        return {name: (digest, counts.read, counts.up, counts.down) for name, digest, counts in told}


class RowReader:
    """Reads data sets with a tokenizer, as options say."""

    def __init__(self, options: DataOptions, tokenizer: Any) -> None:
        self._options, self._tokenizer = options, tokenizer
        self.row_tokenizer = RowTokenizer(tokenizer, options)

    def read(self, name: str, sources: Sequence[Source], cache: Path | None, *, labelled: bool = True) -> ReadRows:
        """All rows of ``sources`` as one data set."""

        def make(folder: Path) -> dict[str, Any]:
            log = self._fill(RowTable, folder, sources, labelled=labelled)
            return {"row_sets": log.divide({name: log.all})}

        return kept_folder(cache, lambda: self._key({name: sources}, labelled=labelled), make, ReadRows.opened)

    def read_training(self, cache: Path | None) -> ReadRows:
        """Rows to train on, and those to validate with: of their own sources, or held out by prompt."""
        options = self._options
        sources = {name: options.sources(name) for name in ("train", "validation")}

        def make(folder: Path) -> dict[str, Any]:
            log = self._fill(PlaceTable if options.streaming else RowTable, folder, sources["train"])
            summary = log.summary()
            log.leave_out_conflicts(options.conflicts)
            chosen, row_sets, keys = {"train": log.all}, dict[str, Any](), log.rows["prompt"]
            if sources["validation"]:
                held_out = self._fill(RowTable, folder, sources["validation"])
                row_sets = held_out.divide({"validation": held_out.all})
                summary.validation_prompts_in_training = int(np.isin(held_out.rows["prompt"], keys).sum())
            elif options.validation_fraction and not options.streaming:
                out = held_out_prompts(keys, options.validation_fraction, options.row_seed, log.classes())
                chosen = {"train": ~out, **({"validation": out} if out.any() else {})}
            return {"row_sets": {**log.divide(chosen), **row_sets}, "summary": asdict(summary)}

        others = {"validation_fraction": options.validation_fraction}
        return kept_folder(cache, lambda: self._key(sources, **others), make, ReadRows.opened)

    def tokenized(self, rows: Iterable[FeedbackRow], numbers: Sequence[int], sources: Sequence[Source]) -> Dataset:
        """The usable ones of some rows, given with the numbers of their sources, as a table."""

        def make(folder: Path) -> dict[str, Any]:
            log = RowTable(folder, [source.label for source in sources])
            for number, (row, outcome) in zip(numbers, self.row_tokenizer.tokenize(rows), strict=True):
                if not isinstance(outcome, FeedbackRowError):
                    log.append(row, number, outcome)
            return {"row_sets": log.divide({"train": log.all})}

        found = kept_folder(None, lambda: None, make, ReadRows.opened).row_sets["train"]
        found.counts.require_used()
        return found.dataset

    def _fill(
        self, kind: type[RowTable], folder: Path, sources: Sequence[Source], *, labelled: bool = True
    ) -> RowTable:
        """The rows of all sources; malformed ones go into a file."""
        log, malformed = kind(folder, [source.label for source in sources]), list[FeedbackRowError]()
        others = log.others
        for number, source in enumerate(sources):
            before = len(log) + others.read
            maker = maker_of(self._options, source, labelled)
            with _rare_collections(), (folder / BAD_ROWS).open("a", encoding="utf-8") as bad_rows:
                for row in self._append(log, source, number, maker):
                    others.take(row)
                    if isinstance(row, FeedbackRowError):
                        if self._options.bad_rows == "strict":
                            raise FeedbackRowError(row.where, row.problem, f"{row.remedy} {SEE_ALL}".lstrip())
                        malformed = malformed or [row]
                        bad_rows.write(json.dumps(row.as_fields(), ensure_ascii=False) + "\n")
            maker.check_rated()
            if len(log) + others.read == before:
                raise FeedbackRowError(public_name(source.path), "expected at least one row, found none.")
            others.formats[source.label] = maker.format or "auto"
            known = {"system prompt": maker.systems, "not used": maker.unused}
            said = [f"{what}: {keys_of(names)}" for what, names in known.items() if names]
            if lost := maker.options.feedback.lost:
                said.append(f"feedback on no answer that was read: {lost}")
            if said:
                others.columns[source.label] = "; ".join(said)
        bad, read, share = others.malformed, len(log) + others.read, self._options.max_bad_rows
        if bad.count > max(share * read, few := self._options.few_bad_rows):
            raise FeedbackRowError(
                ", ".join(public_name(source.path) for source in sources),
                f"expected at most {share:.2%} malformed rows (data.max_bad_rows) or {few} (data.few_bad_rows), found "
                f"{bad.count} of {read}, the first of them at {', '.join(bad.places)}.",
                f"The first reads: {malformed[0]} {SEE_ALL}",
            ) from malformed[0]
        return log

    def _append(
        self, log: RowTable, source: Source, number: int, maker: RowMaker
    ) -> Iterator[LeftOut | FeedbackRowError]:
        """Appends the rows of a source, with their tokens or places, and gives the others."""
        outcomes: Iterable[tuple[RatedRow, Any]]
        if isinstance(log, PlaceTable):
            seekable = seekable_files(source.path)
            outcomes = self._read(seekable, maker, log.begin(seekable, number))
        else:
            files = [record_file(path, maker.cells) for path in expand(source.path)]
            outcomes = self.row_tokenizer.tokenize(row for row, _ in self._read(files, maker))
        for row, outcome in outcomes:
            if isinstance(outcome, FeedbackRowError):
                yield outcome
            elif isinstance(row, FeedbackRow):
                log.append(row, number, outcome)
            else:
                yield row

    def _read(
        self, files: Sequence[RecordFile], maker: RowMaker, first: int = 0
    ) -> Iterator[tuple[RatedRow, RowPlace]]:
        """The rows of one source with their places, to the first malformed one where that is not to be skipped."""
        finders = [ImageFinder.of(file.path, self._options) for file in files]
        records = (((number, place), record) for number, file in enumerate(files) for place, record in file)
        for (number, place), record in maker.learn(records):
            where = place_in(files[number].name, place.line)
            rows = [record] if isinstance(record, FeedbackRowError) else maker.rows(record, where, finders[number])
            for part, row in enumerate(map(self.row_tokenizer.seen, rows)):
                yield row, RowPlace(first + number, place.offset, place.line, place.check, part)
                if isinstance(row, FeedbackRowError) and self._options.bad_rows == "strict":
                    return

    @property
    def depends_on(self) -> dict[str, Any]:
        """What a model brings that rows depend on."""
        return {
            "chat_template": chosen_template(self._tokenizer, self._options.chat_template),
            "tokenizer": digest_of_tokenizer(self._tokenizer),
            "templates": str(self._tokenizer.chat_template),
            "processor": ImageInputs(self._tokenizer).digest(),
        }

    def _key(self, sources: Mapping[str, Sequence[Source]], **others: Any) -> str | None:
        """A digest of all that rows depend on; nothing where that cannot be known without reading."""
        contents: list[tuple[str, str]] = []
        for source in (source for named in sources.values() for source in named):
            hub = "hub:" in (source.path[:4], (source.feedback or "")[:4])
            if hub or (GIVEN in source.path and self._options.streaming):
                return None
            for known in filter(None, (source.path, source.feedback)):
                contents += [(public_name(path), content_key(path)) for path in expand(known)]
        if not all(key for _, key in contents):
            return None
        if asks_for_date(self._tokenizer, self._options.chat_template):
            others["template_date"] = self._options.template_date or today()
        return digest_of_values(
            {
                "code": digest_of_code("batch.py", "data"),
                "versions": {name: version(name) for name in _VERSIONS},
                "contents": contents,
                "sources": {
                    name: [{**asdict(source), "path": public_name(source.path)} for source in named]
                    for name, named in sources.items()
                },
                "options": {name: value for name, value in self._options.plain().items() if name in _OF_ROWS},
                **self.depends_on,
                **others,
            }
        )


def row_format_of(options: DataOptions, source: Source) -> RowFormat:
    """How the records of one source become rows; where something is left at its default, it is that of the preset."""
    preset, layout, columns, rating = source.preset, source.format, source.columns, source.rating
    if not preset:
        preset, layout = options.preset, layout or options.format
        columns, rating = columns or options.columns, rating or options.rating
    known, usual = PRESETS[preset] if preset else {}, Columns().plain()
    given = {name: value for name, value in (columns or Columns()).plain().items() if value != usual[name]}
    if layout in (None, "auto"):
        layout = known.get("format", "auto")
    if rating is None and "rating" in known:
        rating = Rating(**known["rating"])
    return RowFormat(layout or "auto", Columns(**{**known.get("columns", {}), **given}), rating, options.loss_on)


def maker_of(options: DataOptions, source: Source, labelled: bool = True) -> RowMaker:
    """What makes rows of the records of one source, with the feedback that stands beside them read."""
    return RowMaker(replace(row_format_of(options, source), feedback=FeedbackBeside(source.feedback)), labelled)


@contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)

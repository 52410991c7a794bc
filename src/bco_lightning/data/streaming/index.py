"""The index of a stream: where its blocks are, and, where all of it was read once, the thumb of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bco_lightning.data.feedback_row import LabelVocabulary
from bco_lightning.data.files import content_key
from bco_lightning.data.formats import format_of
from bco_lightning.data.loading import BadRows
from bco_lightning.data.parsing import RecordParser
from bco_lightning.data.remote import public_name
from bco_lightning.data.row_counts import Counted, RowCounts
from bco_lightning.data.source import RowFormat, Source
from bco_lightning.data.streaming.blocks import BLOCK, Blocks, RecordFile
from bco_lightning.data.streaming.index_file import IndexFile
from bco_lightning.data.streaming.record_files import files_of, record_file
from bco_lightning.data.streaming.scanning import DOWN, UP, Dialect, Job, Scanned, rows_per_record, scan, scan_all
from bco_lightning.data.streaming.source_rows import SourceRows
from bco_lightning.errors import ConfigError, FeedbackRowError


@dataclass
class StreamIndex:
    """Where the rows of some sources are.

    Rows are numbered through all sources, in order; malformed ones and those left out have a number too.

    Args:
        sources: The sources.
        dialects: What is known of how the records of each speak.
        files: All files, as blocks number them.
        num_rows: All rows.
        counts: What became of them; all zero if they were not read.
        digest: SHA-256 of the content, and of what decides how it is read.
        file: Blocks, and flags of rows if they were read.
    """

    sources: list[Source]
    dialects: list[Dialect]
    files: list[str]
    num_rows: int
    counts: RowCounts
    digest: str
    file: IndexFile

    @classmethod
    def build(
        cls,
        sources: Sequence[Source],
        formats: Sequence[RowFormat],
        *,
        name: str = "train",
        bad_rows: BadRows | None = None,
        read_rows: bool = True,
        processes: int | None = None,
    ) -> StreamIndex:
        """Makes the index, by one pass over all files; of Parquet files whose rows are not read, only over footers.

        Args:
            sources: Their files are JSON lines, Parquet or Arrow.
            formats: How the records of each source become rows.
            name: Of the data set.
            bad_rows: Takes the malformed rows.
            read_rows: Whether to parse and validate every row.
            processes: How many read; if left out, as many as there are processors for.

        Raises:
            FeedbackRowError: If a file cannot be read from the middle, has no rows, or malformed ones that are not to
                be skipped.
            ConfigError: If a format does not have the same number of rows in each record.
        """
        maker = _IndexMaker(sources, formats, name, bad_rows or BadRows(), read_rows)
        for job, scanned in scan_all(maker.jobs(), processes):
            maker.take(job, scanned)
        return maker.index()

    @property
    def blocks(self) -> Blocks:
        """All blocks, in the order of their rows."""
        return self.file.blocks

    @property
    def flags(self) -> np.ndarray[Any, Any] | None:
        """Of each row what is known of it: ``UNUSABLE``, ``UP`` or ``DOWN``; ``None`` if rows were not read."""
        return self.file.flags

    def pools(self, by_class: bool) -> list[list[SourceRows]]:
        """The rows to draw from, by source: in one pool, or in one for each class.

        Raises:
            ConfigError: If they are wanted by class, and rows were not read.
        """
        if by_class and self.flags is None:
            raise ConfigError(
                "data.balanced_sampling",
                "expected false where only a sample of the rows was read, found true.",
                "Leave out data.streaming_sample, so that the class of every row is known.",
            )
        return [[self.source_rows(number, flag) for number in range(len(self.sources))] for flag in _flags(by_class)]

    def block_of(self, row: int) -> int:
        """Number of the block of a row."""
        return int(np.searchsorted(self._first_rows, row, side="right")) - 1

    @property
    def _first_rows(self) -> np.ndarray[Any, Any]:
        if "first_rows" not in self.__dict__:
            self.__dict__["first_rows"] = np.ascontiguousarray(self.blocks["first_row"])
        return self.__dict__["first_rows"]  # type: ignore[no-any-return]

    def source_of(self, row: int) -> int:
        """Number of the source of a row."""
        return int(self.blocks[self.block_of(row)]["source"])

    def source_rows(self, number: int, flag: int) -> SourceRows:
        """The rows of a source to draw from: those of a class (``UP``, ``DOWN``) where it is known, or of any (0)."""
        start, stop = np.searchsorted(self.blocks["source"], [number, number + 1])
        blocks = self.blocks[start:stop]
        if self.flags is None:
            num_rows = blocks["rows"]
        else:
            num_rows = {0: blocks["up"] + blocks["down"], UP: blocks["up"], DOWN: blocks["down"]}[flag]
        return SourceRows(blocks, num_rows, self.flags, flag, self.sources[number].weight)

    def told(self) -> dict[str, Any]:
        """Plain values by which another process of this node has the same index."""
        return {
            "files": self.files,
            "num_rows": self.num_rows,
            "counts": asdict(self.counts),
            "digest": self.digest,
            "file": self.file.told(),
            "dialects": [
                {
                    "format": known.format,
                    "labels": {"candidates": known.labels.candidates, "seen": known.labels.seen},
                }
                for known in self.dialects
            ],
        }

    @classmethod
    def shared(cls, told: dict[str, Any], sources: Sequence[Source], formats: Sequence[RowFormat]) -> StreamIndex:
        """The index of another process of this node.

        Raises:
            FaultError: If its file cannot be seen from here.
        """
        dialects = [
            Dialect(options, known["format"], LabelVocabulary(**known["labels"], thumbs=options.columns.thumbs))
            for options, known in zip(formats, told["dialects"], strict=True)
        ]
        counts, file = RowCounts.from_values(told["counts"]), IndexFile.shared(told["file"])
        return cls(list(sources), dialects, told["files"], told["num_rows"], counts, told["digest"], file)


class _IndexMaker:
    """Puts together what the pieces of files hold, in order."""

    def __init__(
        self, sources: Sequence[Source], formats: Sequence[RowFormat], name: str, bad_rows: BadRows, read_rows: bool
    ) -> None:
        self._sources, self._bad_rows, self._read_rows = list(sources), bad_rows, read_rows
        self._files = [(number, file) for number, source in enumerate(sources) for file in files_of(source)]
        self._parsers = [self._parser(number, options) for number, options in enumerate(formats)]
        self._counts = RowCounts(name, by_source={source.label: (0, 0) for source in sources})
        self._file, self._blocks = IndexFile(), [np.zeros(0, BLOCK)]
        self._num_rows, self._lines = 0, [0] * len(self._files)
        self._digest = hashlib.sha256(json.dumps([asdict(options) for options in formats], default=str).encode())
        self._digest.update(json.dumps([source.weight for source in sources]).encode())
        self._files_digest = hashlib.sha256()  # of its own, as files are opened before the pieces of others come back

    def jobs(self) -> Iterator[Job]:
        """The pieces of all files; each knows what was learned from those that came back by now."""
        for number, (source, path) in enumerate(self._files):
            file = record_file(path)
            self._files_digest.update(self._content_of(file, path).encode())
            for start, stop in pairwise(file.borders()):
                dialect = Dialect.of(self._parsers[source]) if self._read_rows else None
                yield Job(source, number, path, start, stop, dialect, self._bad_rows.policy == "strict")

    def take(self, job: Job, scanned: Scanned) -> None:
        """Adds the next piece.

        Raises:
            FeedbackRowError: On a malformed row, unless they are skipped.
        """
        if job.dialect is not None:
            scanned = self._in_one_vocabulary(job, scanned)
            self._count(job, scanned)
            self._file.write_flags(scanned.flags)
            self._digest.update(hashlib.sha256(scanned.flags).digest())
        self._digest.update(scanned.digest)
        blocks = scanned.blocks
        blocks["source"], blocks["file"] = job.source, job.file
        blocks["line"] += self._lines[job.file]
        blocks["rows"] *= rows_per_record(self._parsers[job.source])
        blocks["first_row"] = self._num_rows + np.cumsum(blocks["rows"]) - blocks["rows"]
        self._blocks.append(blocks)
        self._lines[job.file] += scanned.num_lines
        self._num_rows += int(blocks["rows"].sum())

    def index(self) -> StreamIndex:
        """The index of all that was added.

        Raises:
            FeedbackRowError: If a source has no rows, or too many malformed ones.
        """
        self._blocks = [np.concatenate(self._blocks)]
        for number, source in enumerate(self._sources):
            if not (self._blocks[0]["source"] == number).any():
                raise FeedbackRowError(public_name(source.path), "expected at least one row, found none.")
        self._bad_rows.check([public_name(source.path) for source in self._sources], self._counts.read)
        self._file.write_blocks(self._blocks[0])
        self._digest.update(self._files_digest.digest())
        return StreamIndex(
            self._sources,
            [Dialect.of(parser) for parser in self._parsers],
            [path for _, path in self._files],
            self._num_rows,
            self._counts,
            self._digest.hexdigest(),
            self._file,
        )

    def _parser(self, source: int, options: RowFormat) -> RecordParser:
        """One that knows the format of the source, by its first record if it is not said."""
        parser = RecordParser(options)
        if parser.format is None:
            record = _first_record([file for number, file in self._files if number == source])
            parser.format = None if record is None else format_of(record, options)
        if parser.format is not None and parser.format.rows_per_record is None:
            raise ConfigError(
                "data.streaming",
                f"expected records with the same number of rows in each, found those of {Dialect.of(parser).format} "
                f"({self._sources[source].label}).",
                "Set data.streaming: false, or convert the log to one row in a line.",
            )
        return parser

    def _content_of(self, file: RecordFile, path: str) -> str:
        return file.fingerprint() and ((self._read_rows and content_key(path)) or file.fingerprint())

    def _in_one_vocabulary(self, job: Job, scanned: Scanned) -> Scanned:
        """What a piece holds, where earlier ones have narrowed the vocabulary down since it was begun."""
        parser = self._parsers[job.source]
        if job.dialect is None or parser.labels.candidates == job.dialect.labels.candidates:
            parser.labels = scanned.labels if len(scanned.blocks) else parser.labels
            return scanned
        common = tuple(pair for pair in parser.labels.candidates if pair in scanned.labels.candidates)
        if scanned.findings.malformed or not common:
            again = Job(job.source, job.file, job.path, job.start, job.stop, Dialect.of(parser), job.strict)
            return self._in_one_vocabulary(again, scan(again))
        seen = list(dict.fromkeys(parser.labels.seen + scanned.labels.seen))
        parser.labels = LabelVocabulary(common, seen, parser.labels.thumbs)
        return scanned

    def _count(self, job: Job, scanned: Scanned) -> None:
        findings, counts = scanned.findings, self._counts
        errors = [FeedbackRowError(self._place(job, e.where), e.problem, e.remedy) for e in findings.errors]
        for error in errors:
            self._bad_rows.take(error)
        self._bad_rows.count += findings.malformed - len(errors)
        up, down = scanned.flags.count(UP), scanned.flags.count(DOWN)
        counts.read, counts.up, counts.down = counts.read + up + down, counts.up + up, counts.down + down
        label = self._sources[job.source].label
        before = counts.by_source[label]
        counts.by_source[label] = before[0] + up, before[1] + down
        counts.skip(Counted(findings.malformed, [error.where for error in errors]))
        for reason, counted in findings.left_out.items():
            counts.leave_out(reason, Counted(counted.count, [self._place(job, line) for line in counted.places]))

    def _place(self, job: Job, line: str) -> str:
        """File and line of what is at a line of a piece; what is no number says a place itself."""
        return f"{public_name(job.path)}:{self._lines[job.file] + int(line) + 1}" if line.isdigit() else line


def _first_record(files: Sequence[str]) -> Any:
    for path in files:
        file = record_file(path)
        for start, stop in pairwise(file.borders()):
            for content in file.piece(start, stop).contents():
                for _, parse in content.records():
                    try:
                        return parse(path)
                    except FeedbackRowError:
                        continue
    return None


def _flags(by_class: bool) -> tuple[int, ...]:
    return (UP, DOWN) if by_class else (0,)

"""Scans pieces of files for blocks, and their rows for thumbs, in several processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.feedback_row import LabelVocabulary
from bco_lightning.data.formats import FORMATS
from bco_lightning.data.formats.record_format import Candidate
from bco_lightning.data.parsing import RecordParser
from bco_lightning.data.records import Record
from bco_lightning.data.row_counts import NUM_PLACES, Counted
from bco_lightning.data.source import RowFormat
from bco_lightning.data.streaming.blocks import Blocks, Content, RecordFile
from bco_lightning.data.streaming.record_files import record_file
from bco_lightning.errors import FaultError, FeedbackRowError

# What is known of a row: nothing that could be used, or its thumb.
UNUSABLE, UP, DOWN = 0, 1, 2
_MOST_PROCESSES, _PIECES_ALONE = 8, 4


@dataclass(frozen=True)
class Dialect:
    """What is known of how the records of a source speak.

    Args:
        options: How records become rows.
        format: Name of the format, where ``options`` leave it to the first record.
        labels: Vocabularies that its labels could be of, and labels seen.
    """

    options: RowFormat
    format: str | None = None
    labels: LabelVocabulary = field(default_factory=LabelVocabulary)

    @classmethod
    def of(cls, parser: RecordParser) -> Dialect:
        """What a parser has learned."""
        name = next((name for name, known in FORMATS.items() if known is parser.format), None)
        return cls(parser.options, name, replace(parser.labels, seen=list(parser.labels.seen)))

    def parser(self) -> RecordParser:
        """A new parser that knows this."""
        parser = RecordParser(self.options)
        parser.format = FORMATS[self.format] if self.format else parser.format
        parser.labels = replace(self.labels, seen=list(self.labels.seen))
        return parser


@dataclass(frozen=True)
class Job:
    """A piece of a file to scan.

    Args:
        source: Number of its source.
        file: Number of the file.
        path: Of the file.
        start: A border of the file.
        stop: The next one.
        dialect: How to read its rows; ``None`` only cuts it into blocks.
        strict: Whether to end at the first malformed row.
    """

    source: int
    file: int
    path: str
    start: int
    stop: int
    dialect: Dialect | None
    strict: bool = True


@dataclass
class Findings:
    """Why rows cannot be used; the place of each is its line, from 0.

    Args:
        left_out: Those left out, by reason.
        malformed: How many are malformed.
        errors: The first of them.
    """

    left_out: dict[str, Counted] = field(default_factory=dict)
    malformed: int = 0
    errors: list[FeedbackRowError] = field(default_factory=list)

    def take(self, outcome: LeftOut | FeedbackRowError) -> int:
        """Counts a row, and gives its flag."""
        if isinstance(outcome, LeftOut):
            self.left_out.setdefault(outcome.reason, Counted()).add(outcome.place)
        else:
            self.malformed += 1
            if len(self.errors) < NUM_PLACES:
                self.errors.append(outcome)
        return UNUSABLE


@dataclass
class Scanned:
    """What a piece of a file holds.

    Args:
        blocks: With ``line`` from that of the piece, ``rows`` in records.
        num_lines: Lines of the piece.
        digest: Of its bytes.
        flags: Of each row, records that have fewer rows filled up; nothing if rows were not read.
        findings: What became of the rows.
        labels: The vocabulary after them.
    """

    blocks: Blocks
    num_lines: int
    digest: bytes
    flags: bytes = b""
    findings: Findings = field(default_factory=Findings)
    labels: LabelVocabulary = field(default_factory=LabelVocabulary)


def scan(job: Job) -> Scanned:
    """Scans one piece.

    Raises:
        FeedbackRowError: If the file cannot be read.
    """
    piece = _record_file(job.path, os.getpid()).piece(job.start, job.stop)
    scanned = Scanned(piece.blocks, piece.num_lines, piece.digest)
    if job.dialect is None or not len(piece.blocks):
        return scanned
    parser = job.dialect.parser()
    scanned.labels = parser.labels
    flags = bytearray()
    for block, content in zip(piece.blocks, piece.contents(), strict=True):
        begin = len(flags)
        _read_rows(content, int(block["line"]), parser, scanned.findings, flags)
        block["up"], block["down"] = flags.count(UP, begin), flags.count(DOWN, begin)
        if job.strict and scanned.findings.malformed:
            break
    scanned.flags = bytes(flags)
    return scanned


@lru_cache(maxsize=64)
def _record_file(path: str, process: int) -> RecordFile:
    # An open file has one position for a process and those forked from it.
    return record_file(path)


def outcomes_of(parser: RecordParser, record: Record, place: str) -> list[FeedbackRow | LeftOut | FeedbackRowError]:
    """Each row of a record with its thumb; a malformed one ends them."""
    outcomes: list[FeedbackRow | LeftOut | FeedbackRowError] = []
    for candidate in parser.candidates(record, place):
        if not isinstance(candidate, Candidate):
            outcomes.append(candidate)
            continue
        try:
            outcomes.append(parser.rated(candidate))
        except FeedbackRowError as error:
            outcomes.append(error.without_cause())
    return outcomes


def rows_per_record(parser: RecordParser) -> int:
    """Rows of each record, once the format is known."""
    return (parser.format and parser.format.rows_per_record) or 1


def _read_rows(content: Content, first_line: int, parser: RecordParser, findings: Findings, flags: bytearray) -> None:
    for line, parse in content.records():
        place = str(first_line + line)
        begin = len(flags)
        try:
            record = parse(place)
        except FeedbackRowError as error:
            findings.take(error.without_cause())
        else:
            for outcome in outcomes_of(parser, record, place):
                if isinstance(outcome, FeedbackRow):
                    flags.append(UP if outcome.thumbs_up else DOWN)
                else:
                    flags.append(findings.take(outcome))
        rows = rows_per_record(parser)
        if len(flags) < begin + rows:
            flags += bytes(begin + rows - len(flags))


def scan_all(jobs: Iterable[Job], processes: int | None = None) -> Iterator[tuple[Job, Scanned]]:
    """Scans pieces in several processes, and gives what they hold in order.

    Args:
        jobs: Pieces; one is asked for when a process is free for it.
        processes: How many; if left out, as many as there are processors for, on Linux. Elsewhere processes would have
            to load this program anew.

    Raises:
        FeedbackRowError: If a file cannot be read.
        FaultError: If a process is killed.
    """
    processes = _free_processors() if processes is None else processes
    _record_file.cache_clear()  # files may be others than when they were last read
    remaining = iter(jobs)
    # A small log is read before processes have begun.
    alone = None if processes < 2 or sys.platform != "linux" else _PIECES_ALONE
    yield from ((job, scan(job)) for job in islice(remaining, alone))
    if alone is not None:
        yield from _scan_together(remaining, processes)


def _scan_together(jobs: Iterator[Job], processes: int) -> Iterator[tuple[Job, Scanned]]:
    first = next(jobs, None)
    if first is None:
        return
    waiting: deque[tuple[Job, Future[Scanned]]] = deque()
    # Frozen objects are left alone by the collector, which would make a copy of their pages in each process.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), gc.freeze)
    try:
        for job in chain([first], jobs):
            waiting.append((job, pool.submit(scan, job)))
            if len(waiting) > 2 * processes:
                done, scanned = waiting.popleft()
                yield done, scanned.result()
        for done, scanned in waiting:
            yield done, scanned.result()
    except BrokenProcessPool as error:
        raise FaultError(
            "data.streaming",
            "expected the processes that read the rows for the first time to live, found one killed.",
            "Mostly memory was short: start with more of it, or read a sample only (data.streaming_sample).",
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _free_processors() -> int:
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 1

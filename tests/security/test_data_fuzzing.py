"""Whatever stands on a line, it becomes a valid row or a clear error, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.records.strict_json import parse_line
from bco_lightning.data.rows import RowFormat, RowMaker
from bco_lightning.errors import FeedbackRowError
from tests.trials import Trials

REPEATABLE: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}
ROLES = ("system", "user", "assistant", "tool")


def row_of(line: bytes) -> FeedbackRow | LeftOut | None:
    """The whole way from the bytes of a line to a row."""
    record = parse_line(line, "log.jsonl:1")
    if record is None:
        return None
    [row] = (
        [record]
        if isinstance(record, FeedbackRowError)
        else RowMaker(RowFormat("unpaired")).rows(record, "log.jsonl:1")
    )
    if isinstance(row, FeedbackRowError):
        raise row
    assert isinstance(row, FeedbackRow) or row == LeftOut("log.jsonl:1", "no feedback")
    return row


def check(line: bytes) -> None:
    """Fails unless the line is blank, a valid row, one without feedback or a clear error."""
    try:
        row = row_of(line)
    except FeedbackRowError as error:
        assert str(error).startswith("log.jsonl:1: ")
        return
    if row is None:
        assert not line.strip() or not line.decode().strip()
        return
    if isinstance(row, LeftOut):
        return
    assert isinstance(row.thumbs_up, bool)
    for messages in (row.prompt, row.completion):
        assert messages
        for message in messages:
            assert message["role"] in ROLES
            may_be_empty = message["role"] in ("system", "tool") or message.get("tool_calls")
            assert message["content"].strip() or may_be_empty
            assert "\x00" not in message["content"]
            json.dumps(message, ensure_ascii=False).encode()


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20).filter(
    lambda drawn: drawn.strip()
)
space = st.sampled_from(["", "", " ", "\n", "\u3000"])
text = st.tuples(space, text, space).map("".join)
message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": text}, optional={"name": text})
said = st.fixed_dictionaries({"role": st.just("assistant"), "content": text})
completion = st.tuples(said, st.lists(message, max_size=2), said).map(lambda parts: [parts[0], *parts[1], parts[2]])
valid = st.fixed_dictionaries(
    {
        "prompt": text | st.lists(message, min_size=1, max_size=3),
        "completion": text | completion,
        "label": st.sampled_from([True, False, 1, 0, -1, "up", "down", "true", "false", "👍", "👎"]),
    }
)
ODD: list[Any] = [float("nan"), float("-inf"), 10**400, "\ud800", "\x00", " "]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
near_rows = st.dictionaries(st.sampled_from(["prompt", "completion", "label", "x"]), values | text | st.lists(message))

SPLINTERS = [b"\\ud800", b'"', b"}", b"\\", b"NaN", b"1e999", b"\x00", b"[[[["]


@st.composite
def damaged(draw: Any) -> bytes:
    """A valid line with some bytes replaced, inserted or cut off."""
    line = bytearray(json.dumps(draw(valid), ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(line)))
        end = min(len(line), start + draw(st.integers(0, 3)))
        line[start:end] = draw(
            st.binary(max_size=3) | st.sampled_from([b"\\ud800", b'"', b"}", b"\\", b"NaN", b"1e999"])
        )
    return bytes(line)


odd_rows = st.builds(lambda row, column, odd: {**row, column: odd}, valid, st.sampled_from(["label", "x"]), values)
records = near_rows | odd_rows | valid
lines = st.binary(max_size=60) | damaged() | records.map(lambda record: json.dumps(record).encode())


@pytest.mark.promise("S7", "any line gives a valid row or a FeedbackRowError, nothing else")
def test_any_line_gives_a_row_or_a_clear_error(trials: Trials) -> None:
    examples = trials.count(200, 2000)

    @settings(max_examples=examples, **REPEATABLE)
    @given(lines)
    def run(line: bytes) -> None:
        check(line)
        trials.run += 1

    run()
    assert trials.run >= examples


@pytest.mark.promise("S7", "a row that is written and parsed again is the same row")
def test_a_written_row_is_read_back_the_same(trials: Trials) -> None:
    examples = trials.count(200, 2000)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(valid, st.booleans())
    def run(record: dict[str, Any], ascii_only: bool) -> None:
        row = row_of(json.dumps(record, ensure_ascii=ascii_only).encode())
        assert isinstance(row, FeedbackRow)
        for column, role in (("prompt", "user"), ("completion", "assistant")):
            given_ = record[column]
            assert getattr(row, column) == ([{"role": role, "content": given_}] if isinstance(given_, str) else given_)
        dumped = json.dumps({"prompt": row.prompt, "completion": row.completion, "label": row.thumbs_up})
        assert row_of(dumped.encode()) == row
        trials.run += 1

    run()
    assert trials.run >= examples


FUZZER = """
import sys
import atheris
data = "bco_lightning.data"
read = [f"{data}.records.strict_json", f"{data}.formats", f"{data}.messages", f"{data}.labels", "json"]
with atheris.instrument_imports(include=read):
    from tests.security.test_data_fuzzing import check
atheris.Setup(sys.argv, check)
atheris.Fuzz()
"""


@pytest.mark.promise("S7", "60 s of coverage-guided fuzzing find no line that gives anything else")
def test_coverage_guided_fuzzing_finds_nothing(trials: Trials, tmp_path: Path) -> None:
    if not trials.full:
        pytest.skip("60 seconds long: a full run only")
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, label in enumerate((b"true", b'"up"', b"4", b"NaN")):
        said = b'[{"role": "assistant", "content": "a"}]'
        (corpus / str(number)).write_bytes(b'{"prompt": "q", "completion": %s, "label": %s}' % (said, label))
    command = [sys.executable, "-c", FUZZER, str(corpus), "-max_total_time=60", "-max_len=2000", "-print_final_stats=1"]
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    executed = next(line for line in ended.stderr.splitlines() if "number_of_executed_units" in line)
    trials.run += int(executed.split(":")[-1])
    assert trials.run > 1000

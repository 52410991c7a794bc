"""Whatever is given as a feedback log, it ends in one clear message or in a count, and no message holds a row's text.

The tables below are the promise: what is given, and the whole sentence, or the count, that comes of it.
"""

from __future__ import annotations

import gzip
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bco_lightning import FeedbackDataModule
from bco_lightning.batch import FeedbackRow
from bco_lightning.cli import app as cli
from bco_lightning.data.counts import Counted
from bco_lightning.data.formats.record_format import NO_ANSWER
from bco_lightning.data.labels import NO_FEEDBACK
from bco_lightning.data.options import Columns, Rating, Source
from bco_lightning.data.rows import RowFormat, RowMaker
from bco_lightning.errors import ConfigError, FeedbackRowError, UserError
from tests.reliability.tiny_run import byte_tokenizer
from tests.unit.made_rows import rows_of

# Stands in every text of every log here, and in no message: it is no identifier, and longer than what labels are.
SAID = "kestrel-over-bremen"
TOKENIZER = byte_tokenizer()
STARS = Rating("stars", up=4, down=2)
MIB = 2**20

Record = dict[str, Any]
Options = dict[str, Any]
Files = Mapping[str, bytes] | Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What is given, and what has to come of it.

    Args:
        files: Content of each file by its name, or what writes them into the working directory.
        where: The place that the message names, and the only one that is malformed where rows are skipped.
        problem: The whole sentence of the message, as a regular expression.
        used: Rows that are used where malformed ones are skipped; ``None`` where skipping rows does not help.
        source: What ``data.train_files`` is.
        options: More options of the data module.
    """

    files: Files
    where: str
    problem: str
    used: int | None = None
    source: Any = "log.jsonl"
    options: Options = field(default_factory=dict)


def table(cases: Mapping[str, Any]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


# ---- Good records of each format, with a thumb of either kind. ----


def row(label: Any = True, **changes: Any) -> Record:
    return {"prompt": f"{SAID}?", "completion": f"{SAID}!", "label": label, **changes}


def stars(label: bool, **changes: Any) -> Record:
    return {"prompt": f"{SAID}?", "completion": f"{SAID}!", "stars": 5 if label else 1, **changes}


def user(content: Any = f"{SAID}?", **more: Any) -> Record:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = f"{SAID}!", **more: Any) -> Record:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any = SAID) -> Record:
    return {"role": "tool", "content": content}


def chat(*messages: Any, label: Any = True, **more: Any) -> Record:
    return {"messages": list(messages or (user(), assistant())), "label": label, **more}


def pair(_: bool = True, **changes: Any) -> Record:
    return {"prompt": f"{SAID}?", "chosen": f"{SAID}!", "rejected": f"{SAID}.", **changes}


def open_webui(label: bool = True, nodes: Record | None = None, **changes: Any) -> Record:
    nodes = nodes or {"1": user(parentId=None), "2": assistant(parentId="1")}
    return {
        "type": "rating",
        "data": {"rating": 1 if label else -1, "comment": SAID},
        "meta": {"message_id": "2"},
        "snapshot": {"chat": {"chat": {"history": {"messages": nodes}}}},
        **changes,
    }


def langfuse(label: Any = True, **changes: Any) -> Record:
    scores = [{"name": "user-feedback", "value": int(label), "dataType": "NUMERIC", "comment": SAID}]
    return {"traceId": "1", "input": [user()], "output": f"{SAID}!", "scores": scores, **changes}


def langsmith(label: Any = True, **changes: Any) -> Record:
    feedback = [{"key": "user-feedback", "score": int(label), "comment": SAID}]
    return {"run_type": "llm", "inputs": [user()], "outputs": f"{SAID}!", "feedback": feedback, **changes}


def argilla(label: Any = True, **changes: Any) -> Record:
    fields = {"prompt": f"{SAID}?", "response": f"{SAID}!"}
    responses = {"label": [{"value": "up" if label else "down", "user_id": "1"}]}
    return {"fields": fields, "responses": responses, **changes}


def chainlit(label: Any = True, answer: Record | None = None, **changes: Any) -> Record:
    feedback = {"forId": "2", "value": int(label), "comment": SAID}
    steps = [
        {"id": "1", "type": "user_message", "output": f"{SAID}?"},
        {"id": "2", "type": "assistant_message", "output": f"{SAID}!", "feedback": feedback, **(answer or {})},
    ]
    return {"createdAt": "2026-06-18T10:00:00Z", "steps": steps, **changes}


def chitchat(label: bool = True, **changes: Any) -> Record:
    turns = [[{"sender": str(number), "text": f"{SAID} {number}"}] for number in range(2)]
    return {"start": "2018", "messages": turns, "ratings": {"stars": 5 if label else 1}, **changes}


def without(record: Record, name: str) -> Record:
    return {key: value for key, value in record.items() if key != name}


# ---- Files. ----


def lines(*records: Record | bytes, end: bytes = b"\n") -> bytes:
    return b"".join((record if isinstance(record, bytes) else json.dumps(record).encode()) + end for record in records)


def array(*records: Any) -> bytes:
    return json.dumps(records).encode()


def parquet(*records: Record, schema: Any = None, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(records), schema=schema), sink, **options)
    return bytes(sink.getvalue())


def arrow(*records: Record) -> bytes:
    sink, rows = pa.BufferOutputStream(), pa.Table.from_pylist(list(records))
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def with_hole(content: bytes) -> bytes:
    """The same with the first page overwritten."""
    return content[:4] + b"\xff" * 40 + content[44:]


ROW = lines(row()).rstrip()
LOG = lines(row(), row(False))
PARQUET = parquet(row(), row(False))
CSV = f"prompt,completion,label\n{SAID} a,{SAID} b,1\n{SAID} c,{SAID} d,0\n".encode()
# What a packer makes of these is as large as they are, so a part of it holds whole lines.
PACKABLE = lines(*(row(number % 2 == 0, prompt=f"{SAID} {number * 7919 % 1000003}") for number in range(2000)))


def bad(
    record: Record | bytes, problem: str, good: Callable[[bool], Record] = row, used: int = 2, **options: Any
) -> Case:
    """A record between two good ones."""
    content = lines(good(True), record, good(False))
    return Case({"log.jsonl": content}, "log.jsonl:2", problem, used, options=options)


def unrated(value: Any, found: str) -> Case:
    """A rating that is no number."""
    return bad(stars(True, stars=value), f"expected a number as rating 'stars', found {found}.", stars, rating=STARS)


def bad_file(content: bytes, where: str, problem: str, name: str = "log.jsonl", **options: Any) -> Case:
    """A file that is malformed as a whole."""
    return Case({name: content}, where, problem, source=name, options=options)


def with_template(template: str, where: str, problem: str) -> Case:
    files = {"log.jsonl": LOG, "template.jinja": template.encode()}
    return Case(files, where, problem, options={"chat_template": "template.jinja"})


def save_folder(name: str = "rows") -> None:
    Dataset.from_list([row(), row(False)]).save_to_disk(name)


def save_folder_without_shards() -> None:
    save_folder()
    for shard in Path("rows").glob("*.arrow"):
        shard.unlink()


def save_folder_with_a_wrong_description() -> None:
    save_folder()
    Path("rows/dataset_info.json").write_text("[]")


def save_folder_with_a_cut_shard() -> None:
    save_folder()
    [shard] = Path("rows").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-20])


def nested(depth: int) -> Any:
    value: Any = SAID
    for _ in range(depth):
        value = [value]
    return value


def calls(*functions: Any) -> Record:
    return assistant(None, tool_calls=list(functions))


# ---- Malformed rows: they stop the start, or are skipped and nothing else is. ----

LABELS = r'label must be one of true/false, 1/0, 1/-1, "up"/"down", "true"/"false", "True"/"False" or "👍"/"👎", found '
TEXT_OR_MESSAGES = "must be text or a list of chat messages, found "
ROLE = "must have a 'role' out of system, user, assistant, tool, or what others call these, found "
CONTENT = "must have a text 'content', found "
NO_TEXT = "must hold text, found nothing but white space."
HALF = "expected Unicode text, found half of a surrogate pair."
CSV_ROWS = CSV.splitlines(keepends=True)

ROWS_OF_TEXT: dict[str, Case] = {
    "prompt is a number": bad(row(prompt=5), f"'prompt' {TEXT_OR_MESSAGES}a value of type int."),
    "prompt is null": bad(row(prompt=None), rf"'prompt' {TEXT_OR_MESSAGES}nothing \(null\)."),
    "prompt is an empty list": bad(row(prompt=[]), f"'prompt' {TEXT_OR_MESSAGES}an empty list."),
    "prompt is blank": bad(row(prompt=" \n\t"), f"'prompt' {NO_TEXT}"),
    "completion is empty": bad(row(completion=""), f"'completion' {NO_TEXT}"),
    "no column is known": bad(
        {"question": SAID, "answer": SAID},
        "expected a column 'prompt' and a column 'completion', found 'question', 'answer'.",
    ),
    "columns are texts": bad(
        {f"{SAID} a": 1, f"{SAID} b": 2},
        "expected a column 'prompt' and a column 'completion', found a text of 21 characters, a text of 21 characters.",
    ),
    "label is a word": bad(row("yes"), f'{LABELS}"yes".'),
    "label is a rating": bad(row(4), f"{LABELS}4."),
    "label is a number with a point": bad(row(1.5), rf"{LABELS}1\.5."),
    "label is a huge integer": bad(row(10**300), f"{LABELS}another number."),
    "label of another vocabulary": bad(row(1), "label 1 mixes two vocabularies; labels so far were true."),
    "label with no meaning in the map": bad(
        row("unsure"), r'label must be one of data.columns.thumbs \("true", "false"\), found "unsure".',
        columns=Columns(thumbs={"true": "up", "false": "down"}),
    ),
    "half of a surrogate pair in the prompt": bad(row(prompt=f"{SAID} \ud83d"), HALF),
    "half of a surrogate pair in a key": bad(row(more={"\udc4d": SAID}), HALF),
    "half of a surrogate pair in JSON text": bad(
        chat(tools=json.dumps([{"name": f"{SAID} \ud83d"}])), HALF, columns=Columns()
    ),
    "NUL in a text": bad(row(completion=f"{SAID}\x00"), "expected text, found a NUL character."),
    "NUL in the file": bad(ROW.replace(b"!", b"\x00"), "expected text, found a NUL byte."),
    "text of 10 MB": bad(
        b'{"prompt": "%s", "completion": "a", "label": true}' % (SAID.encode() * (10 * MIB // len(SAID))),
        "expected a row of at most 4 MiB, found a longer one.",
    ),
    "text over the limit of characters": bad(
        row(prompt=SAID * 60_000), "expected at most 1,000,000 characters in a row, found 1,140,020."
    ),
    "integer of 5,000 digits": bad(
        ROW.replace(b"true", b"7" * 5000), "expected numbers of at most 309 digits, found one of 5000."
    ),
    "number beyond all": bad(ROW.replace(b"true", b"1e999"), "expected finite numbers, found one beyond 1.8e308."),
    "label is NaN": bad(
        ROW.replace(b"true", b"NaN"),
        "expected plain JSON values, found the constant NaN, which is no JSON.",
    ),
    "key twice": bad(
        ROW.replace(b"}", b', "label": true}'),
        'expected each key once, found "label" twice in one object.'
    ),
    "brackets 100,000 deep": bad(
        b'{"prompt": ' + b"[" * 100_000, "expected plain JSON values, found brackets nested too deeply."
    ),
    "a list": bad(b'["%s"]' % SAID.encode(), "expected a JSON object, found a list of 1."),
    "null": bad(b"null", "expected a JSON object, found null."),
    "no JSON": bad(
        SAID.encode(), r"expected one JSON object per line, found malformed JSON \(Expecting value, column 1\)."
    ),
    "a row that is cut off within the file": bad(
        ROW[:30],
        r"expected one JSON object per line, found malformed JSON \(Unterminated string starting at, column 12\).",
    ),
    "a row that is cut off at the end of the file": Case(
        {"log.jsonl": LOG + ROW[:30]}, "log.jsonl:3",
        r"expected one JSON object per line, found malformed JSON \(Unterminated string starting at, column 12\).", 2,
    ),
    "two objects on a line": bad(
        ROW + ROW,
        r"expected one JSON object per line, found malformed JSON \(Extra data, column 88\).",
    ),
    "no UTF-8": bad(ROW.replace(b"?", b"\xff"), "expected UTF-8, found byte 0xff at column 32."),
    "byte order mark within": bad(b"\xef\xbb\xbf" + ROW, "expected UTF-8 without a byte order mark, found one."),
}  # fmt: skip


ROWS_OF_MESSAGES: dict[str, Case] = {
    "no assistant": bad(chat(user()), "'messages' must hold a message of the assistant, which is rated, found none."),
    "nothing but an assistant": bad(chat(assistant()), "expected a prompt before what the assistant says, found none."),
    "completion by a user": bad(
        row(completion=[user()]),
        "the completion must begin and end with an assistant message, found 1 messages, the first by user, the last "
        "by user.",
    ),
    "unknown role": bad(
        chat({"role": SAID, "content": SAID}, assistant()), f"message 1 of 'messages' {ROLE}a text of 19 characters."
    ),
    "no role": bad(chat(user(), {"content": SAID}), f"message 2 of 'messages' {ROLE}the keys 'content'."),
    "message is a text": bad(
        chat(SAID, assistant()),
        "message 1 of 'messages' must be an object with 'role' and 'content', found a text of 19 characters.",
    ),
    "content is null": bad(chat(user(), assistant(None)), f"message 2 of 'messages' {CONTENT}none."),
    "content is blank": bad(chat(user("  "), assistant()), f"'messages' {NO_TEXT}"),
    "content is an image": bad(
        chat(user([{"type": "text", "text": SAID}, {"type": "image_url", "image_url": {"url": SAID}}]), assistant()),
        "expected an image file below ., found none of at most 64 MiB there.",
    ),
    "text of a part is null": bad(
        chat(user([{"type": "text", "text": None}]), assistant()),
        'message 1 of \'messages\' must have text parts as its content, found one of type "text".',
    ),
    "tool call without a name": bad(
        chat(user(), calls({"function": {"arguments": SAID}})),
        "message 2 of 'messages' must have a list of function calls as 'tool_calls'.",
    ),
    "tool call by a user": bad(
        chat(user(tool_calls=[{"function": {"name": "find"}}]), assistant()),
        "message 1 of 'messages' must be the assistant's, as it has 'tool_calls'.",
    ),
    "messages are an object": bad(
        chat() | {"messages": {"a": SAID}}, "'messages' must be a list of chat messages, found a value of type dict."
    ),
    "messages are a text": bad(
        chat() | {"messages": SAID}, "'messages' must hold JSON, found a text of 19 characters that is none."
    ),
    "501 messages": bad(
        chat(*[user(), assistant()] * 250, assistant()), "expected at most 500 messages in a row, found 501."
    ),
    "message nested 40 deep": bad(
        chat(user(more=nested(40)), assistant()), "expected at most 32 levels of nesting in a message, found more."
    ),
    "tools are a text": bad(chat(tools=SAID), "'tools' must hold JSON, found a text of 19 characters that is none."),
    "tools are an object": bad(
        chat(tools={"name": SAID}), "'tools' must be a list of JSON schemas, found an object of 1."
    ),
    "options of the template are a list": bad(
        chat(chat_template_kwargs=[SAID]), "'chat_template_kwargs' must be an object, found a list of 1."
    ),
    "options of the template name messages": bad(
        chat(chat_template_kwargs={"messages": [SAID]}),
        "'chat_template_kwargs' must hold options of the template, found 'messages', which is none.",
    ),
    "options of the template name a special token": bad(
        chat(chat_template_kwargs={"eos_token": SAID}),
        "'chat_template_kwargs' must hold options of the template, found 'eos_token', which is none.",
    ),
    "options of the template are called by a text": bad(
        chat(chat_template_kwargs={f"{SAID} is my_token": 1}),
        "'chat_template_kwargs' must hold options of the template, found a text of 31 characters, which is none.",
    ),
}  # fmt: skip

# Malformed in the eyes of the chat template alone.
ROWS_OF_TOKENS: dict[str, Case] = {
    "two assistant turns in a row": bad(
        chat(user(), assistant(), assistant()), "expected turns between assistant messages, found two in a row."
    ),
    "tool call that the template does not print": bad(
        chat(user(), calls({"function": {"name": "find", "arguments": {"text": SAID}}})),
        "expected a completion of which the chat template leaves tokens to learn from, found none.",
    ),
}  # fmt: skip

PARTING = "expected both conversations to part at an answer of the assistant, found "
ROWS_OF_PAIRS: dict[str, Case] = {
    "no prompt": bad(without(pair(), "prompt"), "expected a column 'prompt', found 'chosen', 'rejected'.", pair, 4),
    "no rejected answer": bad(
        without(pair(), "rejected"), "expected a column 'rejected', found 'prompt', 'chosen'.", pair, 4
    ),
    "rejected answer is null": bad(pair(rejected=None), rf"'rejected' {TEXT_OR_MESSAGES}nothing \(null\).", pair, 4),
    "chosen answer is a number": bad(pair(chosen=1), f"'chosen' {TEXT_OR_MESSAGES}a value of type int.", pair, 4),
    "chosen answer is blank": bad(pair(chosen=" "), f"'chosen' {NO_TEXT}", pair, 4),
    "conversations with nothing in common": bad(
        {"chosen": [user("a"), assistant()], "rejected": [user("b"), assistant("c")]},
        f"{PARTING}them part at another message.", pair, 4,
    ),
    "a conversation that the other goes on": bad(
        {"chosen": [user(), assistant(), user()], "rejected": [user(), assistant()]},
        f"{PARTING}one that goes on where the other ends.", pair, 4,
    ),
    "an answer beside a conversation": bad(
        pair(chosen=[user(), assistant()]),
        f"{PARTING}them part at another message.", pair, 4,
    ),
    "a prompt beside other conversations": bad(
        pair(chosen=[user("a"), assistant()], rejected=[user("a"), assistant("b")]),
        "expected 'prompt' to be a message of the conversations, found another text.", pair, 4,
    ),
}  # fmt: skip

ROWS_OF_RATINGS: dict[str, Case] = {
    "rating is a word": unrated("five", '"five"'),
    "rating is true": unrated(True, "true"),
    "rating beyond all floats": unrated(10**309 - 1, "another number"),
    "rating of a CSV is NaN": Case(
        {"log.csv": f"prompt,completion,stars\n{SAID},{SAID},5\n{SAID},{SAID},nan\n{SAID},{SAID},1\n".encode()},
        "log.csv:3", "expected a number as rating 'stars', found \"nan\".", 2, "log.csv", {"rating": STARS},
    ),
}  # fmt: skip

UTTERANCES = "expected utterances with 'sender' and 'text', found something else."
BROKEN_NODE = {"1": user(parentId=None), "2": assistant(5, parentId="1")}
ROWS_OF_EXPORTS: dict[str, Case] = {
    "Open WebUI: rating of ten is a word": bad(
        open_webui(data={"rating": 1, "details": {"rating": SAID}}),
        "expected a number as rating 'details.rating', found a text of 19 characters.",
        lambda up: open_webui(data={"rating": 1, "details": {"rating": 9 if up else 1}}),
        rating=Rating("details.rating", up=4, down=3),
    ),
    "Open WebUI: thumb is another number": bad(open_webui(data={"rating": 2.0}), f"{LABELS}2.", open_webui),
    "Open WebUI: answer is a number": bad(
        open_webui(nodes=BROKEN_NODE), f"message 1 of 'snapshot' {CONTENT}5.", open_webui
    ),
    "Langfuse: no score of the usual names": bad(
        langfuse(scores=[{"name": "tone", "value": 1}, {"name": SAID, "value": 1}]),
        "expected a score 'user-feedback', found a text of 19 characters, 'tone'.", langfuse,
    ),
    "Langfuse: score is a text": bad(
        langfuse(scores=[{"name": "user-feedback", "dataType": "CATEGORICAL", "stringValue": f"{SAID}, yes"}]),
        f"{LABELS}a text of 24 characters.", langfuse,
    ),
    "Langfuse: no input": bad(
        without(langfuse(), "input"), "expected a column 'input', found 'traceId', 'output', 'scores'.", langfuse
    ),
    "Langfuse: input is a number": bad(langfuse(input=5), "expected text or messages as 'input', found 5.", langfuse),
    "Langfuse: input of several texts": bad(
        langfuse(input={"city": SAID, "street": SAID}),
        "expected text or messages as 'input', found 'city', 'street'.", langfuse,
    ),
    "LangSmith: message of an unknown kind": bad(
        langsmith(inputs=[{"lc": 1, "id": ["x", "RemoveMessage"], "kwargs": {"content": SAID}}]),
        f"message 1 of 'input' {ROLE}a text of 13 characters.", langsmith,
    ),
    "LangSmith: score of an unknown kind": bad(
        langsmith(feedback=[{"key": "user-feedback", "score": [SAID]}]), f"{LABELS}a list of 1.", langsmith
    ),
    "Argilla: no field with the prompt": bad(
        argilla(fields={"text": SAID}), "expected a column 'prompt' and a column 'completion', found 'text'.", argilla
    ),
    "Argilla: no such question": bad(
        argilla(responses={"tone": [{"value": "up"}]}), "expected a score 'user-feedback', found 'tone'.", argilla
    ),
    "Chainlit: steps are a text": bad(
        chainlit(steps=SAID), "expected a list of steps, found a text of 19 characters.", chainlit
    ),
    "Chainlit: answer is a number": bad(
        chainlit(answer={"output": 5}), f"message 1 of 'steps' {CONTENT}5.", chainlit
    ),
    "chitchat: utterance is a text": bad(
        chitchat(messages=[[SAID]]), UTTERANCES, chitchat, rating=STARS,
    ),
    "chitchat: text is null": bad(
        chitchat(messages=[[{"sender": "1", "text": None}], [{"sender": "2", "text": SAID}]]), UTTERANCES,
        chitchat, rating=STARS,
    ),
    "chitchat: no such rating": bad(
        chitchat(ratings={"tone": 5}), "expected a rating 'stars', found 'tone'.", chitchat, rating=STARS
    ),
    "chitchat: rating is a word": bad(
        chitchat(ratings={"stars": "great"}), "expected a number as rating 'stars', found \"great\".",
        chitchat, rating=STARS,
    ),
}  # fmt: skip

ROWS_OF_TABLES: dict[str, Case] = {
    "CSV: a cell less": Case(
        {"log.csv": CSV + f"{SAID},{SAID}\n".encode()}, "log.csv:4",
        "expected 3 cells as in the header, found 2.", 2, "log.csv",
    ),
    "CSV: no UTF-8": Case(
        {"log.csv": CSV + f"{SAID},".encode() + b"\xff,1\n"}, "log.csv:4",
        "expected UTF-8, found byte 0xff, as Windows-1252 writes 'ÿ'.", 2, "log.csv",
    ),
    "CSV: NUL": Case(
        {"log.csv": CSV + f"{SAID},".encode() + b"\x00,1\n"}, "log.csv:4",
        "expected text, found a NUL byte.", 2, "log.csv",
    ),
    "CSV: label is NaN": Case(
        {"log.csv": CSV + f"{SAID},{SAID},NaN\n".encode()}, "log.csv:4", f'{LABELS}"NaN".', 2, "log.csv"
    ),
    "CSV: empty completion, after a cell of two lines": Case(
        {"log.csv": CSV + f'"{SAID}\n{SAID}",,1\n'.encode()}, "log.csv:5", f"'completion' {NO_TEXT}", 2, "log.csv"
    ),
    "JSON: a list in the array": Case(
        {"log.json": array(row(), [SAID], row(False))}, "log.json:2",
        "expected a JSON object, found a list of 1.", 2, "log.json",
    ),
    "JSON: half of a surrogate pair as an id": Case(
        {"log.json": json.dumps({"a": row(), "\ud83d": row(), "b": row(False)}).encode()}, "log.json:2",
        HALF, 2, "log.json",
    ),
    "Parquet: label is NaN": Case(
        {"log.parquet": parquet(row(1.0), row(float("nan")), row(0.0))}, "log.parquet:2",
        r'label must be one of data.columns.thumbs \("1.0", "0.0"\), found nan.', 2, "log.parquet",
        {"columns": Columns(thumbs={"1.0": "up", "0.0": "down"})},
    ),
    "Parquet: message is null": Case(
        {"log.parquet": parquet(chat(), chat(user(), None), chat(label=False))}, "log.parquet:2",
        "message 2 of 'messages' must be an object with 'role' and 'content', found null.", 2, "log.parquet",
    ),
    "Parquet: prompt is bytes": Case(
        {"a.jsonl": LOG, "b.parquet": parquet(row(prompt=SAID.encode()))}, "b.parquet:1",
        f"'prompt' {TEXT_OR_MESSAGES}a value of type bytes.", 2, "*.*",
    ),
    "Parquet: text of 10 MB": Case(
        {"log.parquet": parquet(row(), row(prompt="a" * 10 * MIB), row(False))}, "log.parquet:2",
        "expected a row of at most 4 MiB, found a longer one.", 2, "log.parquet",
    ),
    "a file of pairs among others": Case(
        {"a.jsonl": LOG, "b.jsonl": lines(pair()), "c.jsonl": LOG}, "b.jsonl:1",
        "expected a column 'completion', found 'prompt', 'chosen', 'rejected'.", 4, "*.jsonl",
    ),
    "a file with another vocabulary among others": Case(
        {"a.jsonl": LOG, "b.jsonl": lines(row(-1)), "c.jsonl": LOG}, "b.jsonl:1",
        "label -1 mixes two vocabularies; labels so far were true/false.", 4, "*.jsonl",
    ),
    "a CSV among lines of another vocabulary": Case(
        {"a.jsonl": LOG, "b.csv": CSV_ROWS[0] + CSV_ROWS[1]}, "b.csv:2",
        "label 1 mixes two vocabularies; labels so far were true/false.", 2, "*.*",
    ),
}  # fmt: skip

# ---- Files and options that skipping rows does not mend. ----

SUFFIXES = r"expected a file ending in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, or hub:OWNER/NAME; found "
DOCUMENT = r"expected one JSON document, found malformed JSON "
NOT_LOADED = r"expected a data set, but it could not be loaded \(.*\)."
NO_SUCH_FILE = "expected a feedback log, found no such file."
NOT_WHOLE_GZIP = "expected a whole gzip file, found "

FILES: dict[str, Case] = {
    "no such file": Case({}, "log.jsonl", NO_SUCH_FILE),
    "a folder": Case({"logs/log.jsonl": LOG}, "logs", "expected a file, found a folder.", source="logs"),
    "a glob that nothing matches": Case(
        {"log.jsonl": LOG}, r"logs/\*\.jsonl", "expected at least one file, found none that matches.",
        source="logs/*.jsonl",
    ),
    "a glob that matches a note too": Case(
        {"log.jsonl": LOG, "notes.txt": b""}, "notes.txt", f"{SUFFIXES}'.txt'.", source="*"
    ),
    "an unknown suffix": bad_file(LOG, "log.txt", f"{SUFFIXES}'.txt'.", "log.txt"),
    "no suffix": bad_file(LOG, "log", f"{SUFFIXES}one without a suffix.", "log"),
    "a packing that is not known": bad_file(LOG, "log.jsonl.zip", f"{SUFFIXES}'.zip'.", "log.jsonl.zip"),
    "an unknown protocol": Case(
        {}, "ftp://host/log.jsonl", "expected a path or a URL of s3, .*, found ftp://.", source="ftp://host/log.jsonl"
    ),
    "a chain of URLs": Case(
        {}, "zip://log.jsonl::s3://bucket/logs.zip", "expected a path or a URL of s3, .*, found a chain of URLs.",
        source="zip://log.jsonl::s3://bucket/logs.zip",
    ),
    "a store whose package is not installed": Case(
        {}, "adl://bucket/log.jsonl",
        "expected the package adlfs for adl:// URLs, found it not installed.", source="adl://bucket/log.jsonl",
    ),
    "no such file in a store": Case(
        {}, "memory://bad_inputs/log.jsonl", NO_SUCH_FILE,
        source="memory://bad_inputs/log.jsonl",
    ),
    "no such file in a package": Case(
        {}, "package:bco_lightning/log.jsonl",
        "expected a file or folder inside the package 'bco_lightning', found no 'log.jsonl' there.",
        source="package:bco_lightning/log.jsonl",
    ),
    "a data set of the hub that cannot be reached": Case(
        {}, "hub:nobody/nothing", NOT_LOADED,
        source="hub:nobody/nothing",
    ),
    "an empty file": bad_file(b"", "log.jsonl", "expected at least one row, found none."),
    "an empty file among others": Case(
        {"a.jsonl": LOG, "b.jsonl": b""}, "b.jsonl", "expected at least one row, found none.",
        source=["a.jsonl", "b.jsonl"],
    ),
    "UTF-16": bad_file(LOG.decode().encode("utf-16"), "log.jsonl:1", "expected UTF-8 text, found UTF-16."),
    "gzip without its suffix": bad_file(gzip.compress(LOG), "log.jsonl:1", "expected UTF-8 text, found a gzip file."),
    "Parquet by the name of lines": bad_file(PARQUET, "log.jsonl:1", "expected UTF-8 text, found a Parquet file."),
    "text by the name of gzip": bad_file(LOG, "log.jsonl.gz:1", f"{NOT_WHOLE_GZIP}damaged bytes.", "log.jsonl.gz"),
    "gzip that is cut off": bad_file(
        gzip.compress(PACKABLE)[:-20], r"log.jsonl.gz:\d{3,}", f"{NOT_WHOLE_GZIP}one that is cut off.", "log.jsonl.gz"
    ),
    "gzip with a wrong digest": bad_file(
        gzip.compress(LOG)[:-8] + bytes(8), r"log.jsonl.gz:\d", f"{NOT_WHOLE_GZIP}damaged bytes.", "log.jsonl.gz"
    ),
    "empty gzip": bad_file(b"", "log.jsonl.gz", f"{NOT_WHOLE_GZIP}an empty one.", "log.jsonl.gz"),
    "zstd that is cut off": bad_file(
        zstd(PACKABLE)[:-20], r"log.jsonl.zst:\d+", "expected a whole zstd file, found one that is cut off.",
        "log.jsonl.zst",
    ),
    "zstd with damage": bad_file(
        zstd(LOG)[:8] + b"\xff" * 8 + zstd(LOG)[16:], "log.jsonl.zst:1",
        "expected a whole zstd file, found damaged bytes.", "log.jsonl.zst",
    ),
    "packed Parquet": bad_file(
        gzip.compress(PARQUET), "log.parquet.gz", "expected .parquet as it is, found it packed as .gz.",
        "log.parquet.gz",
    ),
    "a CSV with nothing but a header": bad_file(
        CSV_ROWS[0], "log.csv", "expected at least one row, found none.", "log.csv"
    ),
    "an empty CSV": bad_file(
        b"", "log.csv:1", "expected a header with the names of the columns, found an empty line or file.", "log.csv"
    ),
    "a CSV with a column name twice": bad_file(
        CSV.replace(b"completion", b"prompt"), "log.csv:1",
        "expected each column name once, found the same one in columns 1, 2.", "log.csv",
    ),
    "a CSV in UTF-16": bad_file(
        CSV.decode().encode("utf-16"), "log.csv:1", "expected UTF-8 text, found UTF-16.", "log.csv"
    ),
    "a CSV with two delimiters": bad_file(
        b"note;" + CSV, "log.csv:1",
        "expected one kind of delimiter in the header, found commas and semicolons.", "log.csv",
    ),
    "a CSV with a quotation that does not end": bad_file(
        CSV + f'"{SAID},{SAID},1\n'.encode(), "log.csv:4", "expected CSV, found unexpected end of data.", "log.csv"
    ),
    "a CSV with text behind a quotation": bad_file(
        CSV + f'"{SAID}" {SAID},1\n'.encode(), "log.csv:4", "expected CSV, found ',' expected after '\"'.", "log.csv"
    ),
    "a CSV with a row of 10 MB": bad_file(
        CSV + b'"' + b"a\n" * (5 * MIB) + b'",b,1\n', r"log.csv:\d+",
        "expected a row of at most 4 MiB, found a longer one.", "log.csv",
    ),
    "a JSON number": bad_file(b"42", "log.json", "expected a JSON array or object, found neither.", "log.json"),
    "an empty JSON file": bad_file(
        b" \n", "log.json", "expected a JSON array or object, found an empty file.", "log.json"
    ),
    "an empty JSON array": bad_file(b"[]", "log.json", "expected at least one row, found none.", "log.json"),
    "JSON lines by the name of JSON": bad_file(
        LOG, "log.json", rf"{DOCUMENT}\(more than one value, line 2\).", "log.json"
    ),
    "JSON that is cut off": bad_file(
        array(row(), row(False))[:-20], "log.json",
        rf"{DOCUMENT}\(Unterminated string starting at, line 1\).", "log.json"
    ),
    "a comma behind the last record": bad_file(
        array(row(), row(False))[:-1] + b",]", "log.json", rf"{DOCUMENT}\(a comma before the end, line 1\).", "log.json"
    ),
    "JSON with an id twice": bad_file(
        b'{"a": %s, "a": %s}' % (ROW, lines(row(False)).rstrip()), "log.json",
        "expected each key once, found one twice in the outermost object.", "log.json",
    ),
    "brackets 100,000 deep in JSON": bad_file(
        b"[" * 100_000, "log.json", "expected plain JSON values, found brackets nested too deeply.", "log.json"
    ),
    "Parquet without its end": bad_file(
        PARQUET[:-30], "log.parquet", "expected a Parquet file, found .*", "log.parquet"
    ),
    "Parquet with a damaged footer": bad_file(
        PARQUET[:-60] + b"\xff" * 50 + PARQUET[-10:], "log.parquet", "expected a Parquet file, found .*", "log.parquet"
    ),
    "Parquet with a damaged page": bad_file(
        with_hole(PARQUET), "log.parquet", "expected a Parquet file, found .*", "log.parquet"
    ),
    "text by the name of Parquet": bad_file(LOG, "log.parquet", "expected a Parquet file, found .*", "log.parquet"),
    "Parquet without rows": bad_file(
        parquet(schema=pa.schema({"prompt": pa.string()})), "log.parquet", "expected at least one row, found none.",
        "log.parquet",
    ),
    "Arrow that is cut off": bad_file(
        arrow(row(), row(False))[:-8], "log.arrow",
        "expected an Arrow file, found no end of the stream; it may have been cut off.", "log.arrow",
    ),
    "an empty Arrow file": bad_file(b"", "log.arrow", "expected an Arrow file, found an empty one.", "log.arrow"),
    "a saved folder without its shards": Case(
        save_folder_without_shards, "rows",
        r"expected a data set, but it could not be loaded \(No such file or directory\).", source="rows",
    ),
    "a saved folder with a shard that is cut off": Case(
        save_folder_with_a_cut_shard, "rows", NOT_LOADED, source="rows"
    ),
    "a saved folder with a list as its description": Case(
        save_folder_with_a_wrong_description, "rows", NOT_LOADED, source="rows"
    ),
    "a saved folder of no such split": Case(
        save_folder, "rows@test", "expected one data set, found one without splits.", source="rows@test"
    ),
    "a name that is too long": Case({}, "a{300}.jsonl", NO_SUCH_FILE, source="a" * 300 + ".jsonl"),
    "a home that is nobody's": Case({}, "~no_such_user/log.jsonl", NO_SUCH_FILE, source="~no_such_user/log.jsonl"),
    "a name that is no UTF-8": Case(
        {"log-\udcff.jsonl": LOG}, r"log-\\udcff.jsonl", "expected a name in UTF-8, found other bytes.",
        source="*.jsonl",
    ),
    "no name of the hub": Case(
        {}, "hub:", "expected a data set as hub:OWNER/NAME@SPLIT, found no name.", source="hub:"
    ),
}  # fmt: skip

REFUSED = "expected messages that the chat template takes, found that it refuses them "
TEMPLATES: dict[str, Case] = {
    "a template that refuses messages in its own words": with_template(
        "{{ raise_exception('no such messages') }}", "log.jsonl:1", rf"{REFUSED}\(no such messages\)."
    ),
    "a template that repeats what it refuses": with_template(
        "\n{{ raise_exception(messages[0]['content']) }}", "log.jsonl:1",
        rf"{REFUSED}\(TemplateError in line 2 of the template\).",
    ),
    "a template that divides by zero": with_template(
        "{{ 1 // (messages | length - 2) }}", "log.jsonl:1",
        rf"{REFUSED}\(ZeroDivisionError in line 1 of the template\).",
    ),
}  # fmt: skip

NOTHING_LEFT = r"expected rows to use, found none \({} left out, 0 malformed\)."
LOGS: dict[str, Case] = {
    "thumbs-up alone": bad_file(
        lines(row(), row()), "log.jsonl",
        "expected thumbs of both kinds to train on, found 2 rows that are all thumbs-up.",
    ),
    "thumbs-down alone": bad_file(
        lines(row(False)), "log.jsonl",
        "expected thumbs of both kinds to train on, found 1 rows that are all thumbs-down.",
    ),
    "every row over the limit of tokens": bad_file(
        LOG, "train", NOTHING_LEFT.format(2), max_length=16, long_prompts="drop"
    ),
    "every rating in the band between": bad_file(
        lines(stars(True, stars=3), stars(True, stars=3)), "train", NOTHING_LEFT.format(2), rating=STARS
    ),
    "every thumb in conflict": bad_file(LOG, "train", NOTHING_LEFT.format(2), conflicts="drop"),
    "no rating of that name in an export": bad_file(
        array(open_webui()), "log.json:1", "expected a rating 'tone', found 'rating', 'details.rating', 'label'.",
        "log.json", rating=Rating("tone", up=4, down=3),
    ),
}  # fmt: skip

OPTIONS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "no files": (lambda: start([]), "data.train_files", "expected files to train on, found none."),
    "a source twice": (
        lambda: start(["log.jsonl", "log.jsonl"]), "data.train_files",
        "expected a name for each source, found 'log.jsonl' twice.",
    ),
    "a source of no weight": (
        lambda: start([Source("log.jsonl", weight=0)]), "data.train_files",
        "expected a weight above 0 for 'log.jsonl', found 0.",
    ),
    "a rule for pairs": (
        lambda: start("pairs.jsonl", rating=STARS), "data.rating", "expected no rule of ratings for pairs, found one.",
    ),
    "no rule for the ratings of chitchat": (
        lambda: start("chitchat.jsonl"), "data.rating", "expected a rule for one of the ratings stars, found none."
    ),
    "an unknown policy for long prompts": (
        lambda: start("log.jsonl", long_prompts="keep"), "data.long_prompts",
        "expected keep_end or keep_start or drop, found 'keep'.",
    ),
    "a template that does not exist": (
        lambda: start("log.jsonl", chat_template="no.jinja"), "data.chat_template",
        "expected 'plain' or the path of a Jinja file, found 'no.jinja'.",
    ),
    "a template that is no text": (
        lambda: start("log.jsonl", chat_template="log.parquet"), "data.chat_template",
        "expected 'plain' or the path of a Jinja file, found 'log.parquet'.",
    ),
    "no name": (lambda: start(""), "data", "expected a path or URL of each feedback log, found an empty one."),
    "an unknown format": (
        lambda: start("log.jsonl", format="banana"), "data.format", "expected auto or unpaired or .*, found 'banana'."
    ),
    "an unknown word for the turns that carry loss": (
        lambda: start("log.jsonl", loss_on="banana"), "data.loss_on",
        "expected rated_turn or all_turns, found 'banana'.",
    ),
    "an unknown word for conflicts": (
        lambda: start("log.jsonl", conflicts="banana"), "data.conflicts",
        "expected keep or drop or majority or last, found 'banana'.",
    ),
    "an unknown word for malformed rows": (
        lambda: start("log.jsonl", bad_rows="banana"), "data.bad_rows", "expected strict or skip, found 'banana'."
    ),
}  # fmt: skip


# ---- What works after all: every row is used, or left out for a counted reason. ----


@dataclass(frozen=True)
class Counts:
    """What is given, and the rows of it that are used and left out.

    Args:
        files: As of a :class:`Case`.
        used: Rows that are used.
        left_out: Places of those that are left out, by reason.
        source: What ``data.train_files`` is.
        options: More options of the data module.
    """

    files: Files
    used: int
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    source: Any = "log.jsonl"
    options: Options = field(default_factory=dict)


def aside(record: Record, reason: str, good: Callable[[bool], Record] = row, used: int = 2, **options: Any) -> Counts:
    """A record that is no fault and no use, between two good ones."""
    places = ["log.jsonl:2"] * (2 if good is pair else 1)
    return Counts({"log.jsonl": lines(good(True), record, good(False))}, used, {reason: places}, options=options)


def whole(content: bytes, name: str, **options: Any) -> Counts:
    return Counts({name: content}, 2, {}, name, options)


COUNTED: dict[str, Counts] = {
    "line ends of Windows": whole(lines(row(), row(False), end=b"\r\n"), "log.jsonl"),
    "line ends of Windows in a CSV": whole(CSV.replace(b"\n", b"\r\n"), "log.csv"),
    "no line end at the end": whole(LOG[:-1], "log.jsonl"),
    "blank lines": whole(lines(b"", row(), b" \t", row(False), b""), "log.jsonl"),
    "blank lines in a CSV": whole(CSV.replace(b"\n", b"\n\n"), "log.csv"),
    "line separators of Unicode": whole(lines(row(prompt=f"{SAID}\u2028\x85\x0c"), row(False)), "log.jsonl"),
    "cells of many lines": whole(CSV.replace(b" a", b" a\x0b\x0c").replace(b"kest", b"\xe2\x80\xa8"), "log.csv"),
    "pretty JSON with line ends of Windows": whole(
        json.dumps([row(), row(False)], indent=1).replace("\n", "\r\n").encode(), "log.json"
    ),
    "an object of records by id": whole(json.dumps({"a": row(), "b": row(False)}).encode(), "log.json"),
    "a suffix in capitals": whole(LOG, "LOG.JSONL"),
    "gzip in two parts": whole(gzip.compress(lines(row())) + gzip.compress(lines(row(False))), "log.jsonl.gz"),
    "zstd": whole(zstd(LOG), "log.jsonl.zst"),
    "nulls that a Parquet file fills up with": whole(
        parquet(chat(user(name=None), assistant()), chat(user(name=SAID), assistant(), label=False)), "log.parquet"
    ),
    "a Parquet file with null columns": whole(
        parquet(row(tools=None, chat_template_kwargs=None), row(False, tools=None)), "log.parquet"
    ),
    "a saved folder": Counts(save_folder, 2, source="rows"),
    "numbers of 300 digits beside the row": whole(lines(row(more=10**300), row(False, more=-(10**300))), "log.jsonl"),
    "roles of the API and of ShareGPT": whole(
        lines(
        chat({"role": "developer", "content": SAID}, user(), assistant()),
        chat({"from": "human", "value": SAID}, {"from": "gpt", "value": SAID}, label=False), ), "log.jsonl",
    ),
    "empty system and tool messages": whole(
        lines(
        chat({"role": "system", "content": ""}, user(), assistant()),
        chat(user(), assistant(), tool(""), assistant(), label=False), ), "log.jsonl",
    ),
    "arguments of a call that are no JSON": whole(
        lines(
            chat(user(), calls({"function": {"name": "find", "arguments": "{" + SAID}}), tool(), assistant()),
            row(False),
        ),
        "log.jsonl",
    ),
    "messages after the rated turn": whole(lines(chat(user(), assistant(), user()), row(False)), "log.jsonl"),
    "a label mapped to drop": aside(
        row("meh"), "label mapped to drop", columns=Columns(thumbs={"true": "up", "false": "down", "meh": "drop"})
    ),
    "a rating in the band between": aside(
        stars(True, stars=3), "rating between thumbs-up and thumbs-down", stars, rating=STARS
    ),
    "no label": aside(without(row(), "label"), NO_FEEDBACK),
    "a label that is null": aside(row(None), NO_FEEDBACK),
    "a label that is null in a Parquet file": Counts(
        {"log.parquet": parquet(row(), row(None), row(False))}, 2, {NO_FEEDBACK: ["log.parquet:2"]}, "log.parquet"
    ),
    "a label that is an empty cell": Counts(
        {"log.csv": CSV + f"{SAID},{SAID},\n".encode()}, 2, {NO_FEEDBACK: ["log.csv:4"]}, "log.csv"
    ),
    "no rating": aside(without(stars(True), "stars"), NO_FEEDBACK, stars, rating=STARS),
    "a rating in an object that is none": aside(
        stars(True), NO_FEEDBACK, lambda up: stars(up, feedback={"score": 5 * up}),
        rating=Rating("feedback.score", up=4, down=3),
    ),
    "a rating that is null": aside(stars(True, stars=None), NO_FEEDBACK, stars, rating=STARS),
    "a rating that is an empty cell": aside(stars(True, stars=""), NO_FEEDBACK, stars, rating=STARS),
    "a rating that nobody touched": aside(
        stars(True, stars=3), "rating left at its default", stars, rating=Rating("stars", 4, 2, {"stars": 3})
    ),
    "a prompt over its limit": aside(
        row(prompt=SAID * 10), "prompt over data.max_prompt_length", max_prompt_length=100, long_prompts="drop"
    ),
    "a completion over its limit": aside(
        row(completion=SAID * 10), "completion too long (data.max_length)", max_length=150, long_completions="drop"
    ),
    "thumbs of both kinds": Counts(
        {"log.jsonl": lines(row(prompt=SAID), row(), row(False, prompt=SAID), row(False, completion=SAID))}, 2,
        {"conflicting thumbs on one answer (data.conflicts)": ["log.jsonl:1", "log.jsonl:3"]},
        options={"conflicts": "drop"},
    ),
    "a pair of equal answers": aside(pair(rejected=f"{SAID}!"), "both answers are the same", pair, 4),
    "Open WebUI: a draw in the arena": aside(open_webui(data={"rating": 0}), NO_FEEDBACK, open_webui),
    "Open WebUI: a thumb of a column of floats": whole(
        lines(open_webui(data={"rating": 1.0}), open_webui(data={"rating": -1.0})), "log.jsonl"
    ),
    "Open WebUI: no snapshot": aside(open_webui(snapshot=None), "no snapshot of the chat", open_webui),
    "Open WebUI: another message rated": aside(
        open_webui(meta={"message_id": "9"}), "rated message is not in the snapshot", open_webui
    ),
    "Open WebUI: messages that lead to each other": aside(
        open_webui(nodes={"1": user(parentId="2"), "2": assistant(parentId="1")}),
        "rated message is not in the snapshot", open_webui,
    ),
    "Open WebUI: an image": aside(
        open_webui(nodes={"1": user(parentId=None, files=[{"type": "image"}]), "2": assistant(parentId="1")}),
        "conversation with an image", open_webui,
    ),
    "Langfuse: no score": aside(langfuse(scores=[]), NO_FEEDBACK, langfuse),
    "Langfuse: no output": aside(langfuse(output=None), NO_ANSWER, langfuse),
    "LangSmith: a mean": aside(
        without(langsmith(feedback_stats={"user-feedback": {"n": 2, "avg": 0.5}}), "feedback"),
        "mean of several users' feedback", langsmith,
    ),
    "LangSmith: no outputs": aside(langsmith(outputs=None), NO_ANSWER, langsmith),
    "Argilla: no response yet": aside(argilla(responses={}), NO_FEEDBACK, argilla),
    "Chainlit: an error as the answer": aside(
        chainlit(answer={"isError": True}), "answer is an error message", chainlit
    ),
    "Chainlit: no feedback": aside(chainlit(answer={"feedback": None}), NO_FEEDBACK, chainlit),
    "chitchat: one speaker": aside(
        chitchat(messages=[[{"sender": "1", "text": SAID}]]), "conversation of other than two speakers",
        chitchat, rating=STARS,
    ),
    "chitchat: no ratings": aside(chitchat(ratings=None), NO_FEEDBACK, chitchat, rating=STARS),
}  # fmt: skip


# ---- Running them. ----


def write(files: Files) -> None:
    if callable(files):
        files()
        return
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def start(source: Any, **options: Any) -> FeedbackDataModule:
    module = FeedbackDataModule(source, **{"tokenizer": TOKENIZER, "validation_fraction": 0.0, **options})
    module.setup("fit")
    return module


def start_case(case: Case | Counts, **options: Any) -> FeedbackDataModule:
    return start(case.source, **{**case.options, **options})


def says(error: UserError, where: str, problem: str) -> None:
    """Fails unless an error names the place and the problem as promised, and holds no text of a row."""
    assert error.where
    assert re.fullmatch(where, error.where), error.where
    assert re.fullmatch(problem, error.problem), error.problem
    assert SAID not in str(error)
    assert str(error).isprintable()


@contextmanager
def in_seconds(limit: float) -> Iterator[None]:
    """Ends what is inside with a TimeoutError if it takes longer."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def used_places(module: FeedbackDataModule) -> list[str]:
    [counts] = module.counts
    places = list(module.train_dataset["place"])
    # Counted apart from each other: the rows that are there, and those that were not taken.
    assert counts.read == len(places) + counts.num_left_out + counts.malformed.count
    assert counts.up + counts.down == len(places)
    assert SAID not in str(counts)
    return places


MALFORMED = {
    **ROWS_OF_TEXT, **ROWS_OF_MESSAGES, **ROWS_OF_PAIRS, **ROWS_OF_RATINGS, **ROWS_OF_EXPORTS, **ROWS_OF_TABLES,
}  # fmt: skip


@table(MALFORMED)
def test_a_malformed_row_is_named_with_its_place_and_costs_no_other(case: Case) -> None:
    write(case.files)
    outcomes = list(rows_of(case.source, RowMaker(RowFormat(**case.options))))
    [error] = [outcome for outcome in outcomes if not isinstance(outcome, FeedbackRow)]
    assert isinstance(error, FeedbackRowError)
    says(error, case.where, case.problem)
    assert len(outcomes) - 1 == case.used


@table({**ROWS_OF_TOKENS, "prompt is a number": ROWS_OF_TEXT["prompt is a number"]})
def test_a_malformed_row_stops_the_start_or_is_skipped(case: Case) -> None:
    write(case.files)
    with pytest.raises(FeedbackRowError) as caught:
        start_case(case)
    says(caught.value, case.where, case.problem)
    module = start_case(case, bad_rows="skip", max_bad_rows=1.0)
    assert len(used_places(module)) == case.used
    assert module.counts[0].malformed == Counted(1, [case.where])


@table({**FILES, **LOGS, **TEMPLATES})
def test_a_log_that_is_malformed_as_a_whole_is_refused(case: Case) -> None:
    write(case.files)
    with pytest.raises(UserError) as caught:
        start_case(case)
    says(caught.value, case.where, case.problem)


@table(OPTIONS)
def test_options_that_cannot_be_meant_are_refused(case: tuple[Callable[[], Any], str, str]) -> None:
    write({"log.jsonl": LOG, "log.parquet": PARQUET, "pairs.jsonl": lines(pair()), "chitchat.jsonl": lines(chitchat())})
    make, where, problem = case
    with pytest.raises(ConfigError) as caught:
        make()
    says(caught.value, where, problem)


@table(COUNTED)
def test_every_row_is_used_or_left_out_for_a_counted_reason(case: Counts) -> None:
    write(case.files)
    module = start_case(case)
    [counts] = module.counts
    assert len(used_places(module)) == case.used
    assert counts.left_out == {reason: Counted(len(places), places) for reason, places in case.left_out.items()}
    assert counts.malformed == Counted()


def test_a_word_that_was_said_a_trillion_times_does_not_stall_the_start() -> None:
    stats = {"user-feedback": {"n": 10**12, "values": {"up": 10**12, "down": -(10**12)}}}
    problem = "expected at most 10,000 ratings of one run, found more."
    case = bad(without(langsmith(feedback_stats=stats), "feedback"), problem, langsmith)
    write(case.files)
    with in_seconds(0.5), pytest.raises(FeedbackRowError) as caught:
        start_case(case)
    says(caught.value, case.where, case.problem)


# ---- The command line. ----

TYPED: dict[str, tuple[Case, list[str]]] = {
    "a malformed message": (ROWS_OF_MESSAGES["content is an image"], []),
    "a rule without its limits": (
        Case({"log.jsonl": LOG}, "data.rating", "expected both up and down, found no up and down."),
        ["--data.rating.column=stars"],
    ),
    "a glob that nothing matches": (FILES["a glob that nothing matches"], []),
    "a damaged Parquet file": (FILES["Parquet with a damaged page"], []),
    "thumbs-up alone": (LOGS["thumbs-up alone"], []),
    "a source whose rule has swapped bounds": (
        Case({"log.jsonl": LOG}, "data.rating", "expected down below up, found 4 as down and 2 as up."),
        ["--data.train_files=[{path: log.jsonl, rating: {up: 2, down: 4}}]"],
    ),
}


def typed(command: str, model: str, source: str, *more: str) -> list[str]:
    options = [f"--model.name_or_path={model}", "--data.validation_fraction=0", "--trainer.accelerator=cpu"]
    shown = "--hide_examples" if command == "inspect" else "--trainer.enable_progress_bar=false"
    return [command, *options, shown, f"--data.train_files={source}", *more]


@table(TYPED)
def test_a_command_says_it_in_one_message(
    byte_model: str, capfd: pytest.CaptureFixture[str], case: tuple[Case, list[str]]
) -> None:
    given, more = case
    write(given.files)
    command = "inspect" if "data" in given.where else "fit"
    assert cli.main(typed(command, byte_model, given.source, *more)) == 2
    said = capfd.readouterr()
    [message] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {given.where}: {given.problem}", message), message
    assert said.err.rstrip().endswith(message)
    assert "Traceback" not in said.err + said.out
    assert SAID not in said.err + said.out
    assert not Path("runs").exists()


def test_an_error_of_this_package_is_told_without_the_text_that_led_to_it(
    byte_model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise KeyError(SAID)

    monkeypatch.setattr("bco_lightning.data.records.json_lines.parse_line", fail)
    write({"log.jsonl": LOG})
    assert cli.main(typed("inspect", byte_model, "log.jsonl")) == 1
    said = capfd.readouterr()
    [message] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    place = r"\w+\.py:\d+"
    assert re.match(rf"error: internal error: KeyError at {place}\. Run the same command again with --debug", message)
    assert "Traceback" not in said.err + said.out
    assert SAID not in said.err + said.out


def test_a_traceback_is_there_only_where_it_was_asked_for(byte_model: str, capfd: pytest.CaptureFixture[str]) -> None:
    write(ROWS_OF_TEXT["prompt is a number"].files)
    told = "log.jsonl:2: 'prompt' must be text or a list of chat messages, found a value of type int."
    assert cli.main(typed("fit", byte_model, "log.jsonl")) == 2
    said = capfd.readouterr()
    assert told in said.err
    assert "Traceback" not in said.err + said.out
    assert SAID not in said.err + said.out
    with pytest.raises(FeedbackRowError) as raised:  # Python then shows where it comes from, and ends with status 1
        cli.main([*typed("fit", byte_model, "log.jsonl"), "--debug"])
    assert told in str(raised.value)
    assert SAID not in str(raised.value)

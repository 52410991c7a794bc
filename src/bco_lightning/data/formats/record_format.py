"""What all formats of records have in common: what they go by, what they give, and how a row is put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from bco_lightning.batch import FeedbackRow, LeftOut, Message
from bco_lightning.data.feedback_beside import FeedbackBeside
from bco_lightning.data.images import WITH_IMAGE as WITH_IMAGE
from bco_lightning.data.images import ImageFinder, with_pictures
from bco_lightning.data.messages import check_size, messages_in, out_of_text
from bco_lightning.data.options import Columns, FormatName, LossOn, Rating
from bco_lightning.data.presets import presets_for
from bco_lightning.data.values import MISSING, Record, from_json_text, keys_of, shown, unpacked, value_at, without_nulls
from bco_lightning.errors import ConfigError, FeedbackRowError

NO_ANSWER = "no answer that holds text"
NO_PROMPT = "answer without a prompt"
SECOND_ANSWER = "answer right after another one"
UNFINISHED = "answer that does not end where its model ended it"
# What a row may not tell the chat template: what this package itself says, and how the template is called.
_RESERVED_OPTIONS = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {"documents"}


@dataclass(frozen=True)
class RowFormat:
    """How the records of a source become rows, as the options of the same names say."""

    format: FormatName = "auto"
    columns: Columns = field(default_factory=Columns)
    rating: Rating | None = None
    loss_on: LossOn = "rated_turn"
    feedback: FeedbackBeside = field(default_factory=FeedbackBeside)

    def __post_init__(self) -> None:
        if self.rating is not None and self.columns.thumbs:
            found = "expected either data.rating or data.columns.thumbs for one source, found both."
            remedy = "Keep the one that says what its labels mean; of several sources, each can have its own."
            raise ConfigError("data.rating", found, remedy)


class Candidate(NamedTuple):
    """A row, whose thumb only pairs have, with its label and all ratings for a rule as they stand in the source."""

    row: FeedbackRow
    ratings: Record


Rows = Iterator[Candidate | LeftOut]


@dataclass
class Origin:
    """File and line of one record, and what the making of its rows goes by; a row may need no label."""

    place: str
    options: RowFormat
    labelled: bool = True
    images: ImageFinder = field(default_factory=ImageFinder)

    def __post_init__(self) -> None:
        self.columns = self.options.columns

    def left_out(self, reason: str) -> LeftOut:
        """A row of the record that is not used."""
        return LeftOut(self.place, reason)

    def error(self, problem: str, remedy: str = "") -> FeedbackRowError:
        """What is wrong with the record."""
        return FeedbackRowError(self.place, problem, remedy)

    def label_is_optional(self) -> AbstractContextManager[None]:
        """A context in which what is wrong with a label is nothing where rows need none."""
        return nullcontext() if self.labelled else suppress(FeedbackRowError)

    def required(self, record: Record, column: str, *others: str) -> Any:
        """What stands in a column; an error that names all of these columns that are not there."""
        missing = [name for name in (column, *others) if value_at(record, name, MISSING) is MISSING]
        if missing:
            found = f"expected a column {' and a column '.join(map(repr, missing))}, found {keys_of(record)}."
            options = {known: f"data.columns.{name}" for name, known in vars(self.columns).items() if known in missing}
            like = "".join(f" It looks like data.preset: {name}." for name in presets_for(record))
            named = " and ".join(options.get(name, "data.columns") for name in missing)
            raise self.error(found, f"Rename the column{'s' * (len(missing) > 1)}, or set {named}.{like}")
        return value_at(record, column)

    def messages(self, value: Any, name: str, role: str = "") -> list[Message]:
        """The messages in a column; see :func:`~bco_lightning.data.messages.messages_in`."""
        value = out_of_text(value, name, self.place)
        if role and isinstance(value, str) and value and not value.isspace():
            return [{"role": role, "content": value}]
        return messages_in(value, name, self.place, role)

    def row(
        self, prompt: list[Message], completion: list[Message], record: Record | None = None, num_trailing: int = 0
    ) -> FeedbackRow:
        """A row without a thumb, of messages that are valid each for itself; an error if they are not as a whole.

        System prompt, tools and options of the template stand in ``record``, if there are any.
        """
        record, history = record or {}, self.columns.history
        if history and (before := value_at(record, history)):
            prompt = self.messages(before, history) + prompt
        system = value_at(record, name := system_column(record, self.columns))
        if system and str(system).strip():
            prompt = self._with_system(prompt, system, name)
        if self.options.loss_on == "all_turns":
            # One at the end is no answer yet: the completion goes on with it.
            answers = (at for at, message in enumerate(prompt[:-1]) if at and message["role"] == "assistant")
            first = next(answers, len(prompt))
            prompt, completion = prompt[:first], prompt[first:] + completion
        if not prompt:
            raise self.error("expected a prompt before what the assistant says, found none.")
        if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            first, last = completion[0]["role"], completion[-1]["role"]
            found = f"found {len(completion)} messages, the first by {first}, the last by {last}"
            raise self.error(f"the completion must begin and end with an assistant message, {found}.")
        tools = self._given(record, self.columns.tools)
        tools = list(map(unpacked, tools)) if isinstance(tools, list) else tools
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise self.error(f"{self.columns.tools!r} must be a list of JSON schemas, found {shown(tools)}.")
        told = self._given(record, name := self.columns.template_options) or {}
        if not isinstance(told, dict):
            raise self.error(f"{name!r} must be an object, found {shown(told)}.")
        for option in told:
            if option in _RESERVED_OPTIONS or option.endswith("_token"):
                found = f"found {keys_of([option])}, which is none"
                raise self.error(f"{name!r} must hold options of the template, {found}.")
        images = unpacked(value_at(record, self.columns.images))
        said = with_pictures([*prompt, *completion], images, self.images, self.place)
        prompt, completion = said[: len(prompt)], said[len(prompt) :]
        check_size([*said, *(tools or ()), *([told] if told else ())], self.place)
        return FeedbackRow(prompt, completion, None, self.place, tools or None, told, num_trailing)

    def answered(
        self, turns: Iterable[list[Message] | LeftOut], name: str, system: Any = None
    ) -> FeedbackRow | LeftOut:
        """The row of an exported chat, whose turns stand in the column ``name``; messages that say nothing are none."""
        before: list[Message] = []
        answer = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        for turn in turns:
            if isinstance(turn, LeftOut):
                return turn
            before += answer
            answer = [said for said in turn if said["content"] or said.get("tool_calls") or said["role"] == "tool"]
        if not answer or answer[-1]["role"] == "tool" or not answer[-1]["content"]:
            return self.left_out(NO_ANSWER)
        if not any(message["role"] == "user" for message in before):
            return self.left_out(NO_PROMPT)
        if before[-1]["role"] in ("assistant", "tool"):
            return self.left_out(SECOND_ANSWER)
        return self.row(self.messages(before, name), self.messages(answer, name))

    def _with_system(self, prompt: list[Message], system: Any, column: str) -> list[Message]:
        """The messages after the system prompt of a column, unless they hold it already."""
        said = self.messages(system, column, "system")
        known = [message["content"].strip() for message in prompt if message["role"] == "system"]
        if not known and all(message["role"] == "system" for message in said):
            return said + prompt
        if [message["content"].strip() for message in said] == known:
            return prompt
        found = f"expected in {column!r} the system prompt of the messages, found another one."
        raise self.error(found, "Keep one, or set data.columns.system to a name that no column has.")

    def _given(self, record: Record, column: str) -> Any:
        given = value_at(record, column)
        return without_nulls(from_json_text(given, column, self.place)) if given else None


def system_column(record: Record, columns: Columns) -> str:
    """The column with the system prompt."""
    usual = columns.system == "system" and "system" not in record and "system_prompt" in record
    return "system_prompt" if usual else columns.system

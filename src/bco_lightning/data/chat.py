"""What the chat template makes of a row: its prompt, and what each turn of the completion adds to that."""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.bounded import TooLongError, clocked, ends
from bco_lightning.data.control_tokens import CLOSE, OPEN, ControlTokens, Conversation
from bco_lightning.data.images import IMAGES, as_told
from bco_lightning.data.joints import Joints, Piece
from bco_lightning.data.rows import RatedRow
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError

# What a prompt and a completion look like without any markup: for base models that have no chat format.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# A template is a small program, and a row can hold what it does not expect.
TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
)  # fmt: skip
_TEMPLATE = "<template>"  # as Jinja calls its code in tracebacks
# Stands for the last message while what the template writes after it is looked for.
_STAND_IN = OPEN + CLOSE

_DATE = "strftime_now"  # which transformers gives to templates
_DIRECTIVES = (*"aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZf", "-d", "-m", "-H", "-I", "-j")
_ENDING = {PLAIN_TEMPLATE}  # that were tried in this process


@dataclass
class ChatScript:
    """A row as the chat template renders it: its prompt, then what each turn of the completion adds, and who speaks."""

    row: FeedbackRow
    conversation: Conversation
    texts: list[str]
    speakers: list[bool]  # of each turn, whether it is the assistant's
    pieces: list[Piece]  # the texts, each with what decides how it goes on


class ChatTemplate:
    """Renders rows by a tokenizer's chat template, with user text kept apart from control tokens."""

    def __init__(self, tokenizer: Any, text: str, control: ControlTokens, joints: Joints, day: str | None) -> None:
        self._tokenizer, self._control, self._joints = tokenizer, control, joints
        # Some tokenizers have a template of its own for rows with tools, beside their default.
        templates = tokenizer.chat_template
        own = isinstance(templates, dict) and templates.get("default") == text
        with_tools = str(templates.get("tool_use", text)) if own else text
        self._text, self._text_with_tools = _dated(text, day), _dated(with_tools, day)
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {"messages", "self", *arguments, *tokenizer.special_tokens_map} - {"documents"}

    def scripts(self, rows: Sequence[RatedRow]) -> list[ChatScript | LeftOut | FeedbackRowError]:
        """Lets the template speak; the error of a row is that it fails on it, or rewrites the prompt after it."""
        try:
            first = next((row for row in rows if isinstance(row, FeedbackRow)), None)
            if first is not None and self._text not in _ENDING:
                if not ends(lambda: self._script(first)):
                    raise TooLongError
                _ENDING.add(self._text)
            with clocked():
                return [self._script(row) if isinstance(row, FeedbackRow) else row for row in rows]
        except TooLongError:
            raise LanguageModelError(
                "chat template",
                "expected one that renders rows in bounded time and memory, found that it goes on and on.",
            ) from None

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template prints lists of parts alone, as those of some models with images do."""
        if not re.search(r"['\"]type['\"]|\.type\b", self._text):
            return False
        tried, found = {"role": "user", "content": (word := "something")}, ["", ""]
        for number, message in enumerate((tried, as_told(tried))):
            with contextlib.suppress(*TEMPLATE_FAILURES):
                found[number] = self._tokenizer.apply_chat_template([message], chat_template=self._text, tokenize=False)
        # One that prints whatever it is given prints a list as Python writes it.
        return word in found[1] and word not in found[0]

    def render(self, conversation: Conversation, stop: int | None = None, *, asks_next: bool) -> str:
        """The messages up to ``stop`` as text; ``asks_next`` adds what comes before an answer."""
        messages = conversation.messages[:stop]
        # With transformers 5.20 a template prints None where a message is a call of tools alone.
        said = [{**each, "content": ""} if each.get("content", "") is None else each for each in messages]
        told = [as_told(each) if IMAGES in each or self._in_parts else each for each in said]
        text = self._text if conversation.tools is None else self._text_with_tools
        given = {"tools": conversation.tools, **conversation.options}
        return str(
            self._tokenizer.apply_chat_template(
                told, chat_template=text, tokenize=False, add_generation_prompt=asks_next, **given
            )
        )

    def after_last_message(self, conversation: Conversation, prompt: str, num_messages: int) -> str:
        """What the template writes after what is said last in the prompt, so that the assistant speaks."""
        messages = conversation.messages[:num_messages]
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        with contextlib.suppress(*TEMPLATE_FAILURES):  # a template may take the last message apart
            stood_in = replace(conversation, messages=[*messages[:-1], {**messages[-1], "content": _STAND_IN}])
            _, found, end = self.render(stood_in, asks_next=True).rpartition(_STAND_IN)
            if found and prompt.endswith(end + begun):
                return end + begun
        if begun:
            return prompt  # to be kept whole
        with contextlib.suppress(*TEMPLATE_FAILURES):  # or refuse one that is not answered
            unasked = self.render(conversation, num_messages, asks_next=False)
            return prompt[len(unasked) :] if prompt.startswith(unasked) else ""
        return ""

    def _script(self, row: FeedbackRow) -> ChatScript | FeedbackRowError:
        told = self._control.shield(Conversation(row.prompt + row.completion, row.tools, row.template_options))
        try:
            for name in self._reserved.intersection(row.template_options):
                raise FeedbackRowError(
                    row.place,
                    f"expected options that a chat template defines, found {name!r}, which is given to every template.",
                    "Remove it from the row's template options.",
                )
            stops = _turns(row)
            if row.prompt[-1]["role"] == "assistant":
                rendered = self._going_on(row, told, stops)
            else:
                rendered = [self.render(told, len(row.prompt), asks_next=True)]
                rendered += [self.render(told, stop, asks_next=not speaks) for stop, speaks in stops]
            texts = _added(rendered, row.place)
            return ChatScript(row, told, texts, [speaks for _, speaks in stops], self._joints.pieces(texts))
        except FeedbackRowError as error:
            return error
        except TEMPLATE_FAILURES as error:
            return FeedbackRowError(
                row.place,
                f"expected messages that the chat template takes, found that it refuses them ({self._words(error)}).",
            )

    def _going_on(self, row: FeedbackRow, told: Conversation, stops: list[tuple[int, bool]]) -> list[str]:
        """Renderings of a row whose completion goes on with the last message of the prompt: both are one message."""
        at = len(row.prompt) - 1
        begun, rest = told.messages[at : at + 2]
        others = {name: value for name, value in rest.items() if name not in ("content", "tool_calls")}
        message = {**rest, "content": f"{begun['content']}{_STAND_IN}{rest.get('content') or ''}"}
        joined = replace(told, messages=[*told.messages[:at], message, *told.messages[at + 2 :]])
        turns = [self.render(joined, stop - 1, asks_next=not speaks) for stop, speaks in stops]
        prompt, *ends = turns[0].split(_STAND_IN)
        whole = prompt.rstrip().endswith("".join(begun["content"].split()[-1:])) and len(ends) == 1
        if not whole or {**others, "content": begun["content"]} != begun:
            expected = "expected a completion that goes on with the assistant's message at the end of the prompt"
            found = "one with other fields, or a chat template that prints them in another way"
            raise FeedbackRowError(row.place, f"{expected}, found {found}.", "Let the prompt end with another message.")
        return [prompt, *(turn.replace(_STAND_IN, "") for turn in turns)]

    def _words(self, error: Exception) -> str:
        """What a template says of its own accord; other words may be those of the row, and are not shown."""
        words = str(error)
        if words and (words in self._text or words in self._text_with_tools):
            return words
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == _TEMPLATE), None)
        return type(error).__name__ + (f" in line {line} of the template" if line else "")


def chosen_template(tokenizer: Any, chat_template: str | None) -> str:
    """The Jinja text that ``data.chat_template`` means, or the tokenizer's own."""
    if chat_template == "plain":
        return PLAIN_TEMPLATE
    if chat_template is not None:
        try:
            path = Path(chat_template).expanduser()
            if not path.is_file():  # but a pipe, perhaps
                raise FileNotFoundError
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError):  # no file, no text, nobody's home
            raise ConfigError(
                "data.chat_template", f"expected 'plain' or the path of a Jinja file, found {chat_template!r}."
            ) from None
    templates = tokenizer.chat_template
    own = templates.get("default") if isinstance(templates, dict) else templates
    if not own:
        raise LanguageModelError(
            "tokenizer",
            f"expected a tokenizer with a chat template, found one without{' a default' if templates else ''}.",
            "Set data.chat_template to a Jinja file, or to 'plain' for a base model without a chat format.",
        )
    return str(own)


def told_by(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer, or one like it with the template of a run; where that is its default, it keeps its others."""
    own = tokenizer.chat_template
    if template is None or template == (own.get("default") if isinstance(own, dict) else own):
        return tokenizer
    other = copy(tokenizer)
    other.chat_template = template
    return other


def asks_for_date(tokenizer: Any, chat_template: str | None) -> bool:
    """Whether what a template writes hangs on the day; one of the tokenizer's own for tools counts, too."""
    return _DATE in f"{chosen_template(tokenizer, chat_template)}{tokenizer.chat_template}"


def today() -> str:
    """Today's day where this machine is, as the library takes it, as ``YYYY-MM-DD``."""
    return str(date.today())


def _dated(text: str, day: str | None) -> str:
    """A template to which it is that day, of today's if none is given: a macro stands before the library's function."""
    if _DATE not in text:
        return text
    moment = datetime.fromisoformat(day or today())
    values = {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    replaced = "".join(f".replace({directive!r}, {value!r})" for directive, value in values.items())
    return (
        f"{{%- macro {_DATE}(format) -%}}{{%- for part in format.split('%%') -%}}"
        f"{{{{ '' if loop.first else '%' }}}}{{{{ part{replaced} }}}}{{%- endfor -%}}{{%- endmacro %}}"
        # A line break after a tag is dropped, and white space at the front of a line before one is.
        + ("\n" if text[:1].isspace() else "")
        + text
    )


def _added(renderings: Sequence[str], place: str) -> list[str]:
    """The first rendering, and what each of the others adds to the one before."""
    for before, after in pairwise(renderings):
        if not after.startswith(before):
            raise FeedbackRowError(
                place,
                "expected a chat template that extends the prompt by the completion, found one that rewrites it.",
                "Set data.chat_template to one that only appends.",
            )
    return [renderings[0], *(after[len(before) :] for before, after in pairwise(renderings))]


def _turns(row: FeedbackRow) -> list[tuple[int, bool]]:
    """Where in the row each turn of the completion ends, and whether it is the assistant's.

    What stands between two assistant messages is one turn: templates put the results of several tools together.
    """
    start = len(row.prompt)
    speakers = [message["role"] == "assistant" for message in row.completion]
    if any(pair == (True, True) for pair in pairwise(speakers)):
        raise FeedbackRowError(row.place, "expected turns between assistant messages, found two in a row.")
    following = [*speakers[1:], not speakers[-1]]
    turns = zip(speakers, following, strict=True)
    return [(start + number, speaks) for number, (speaks, next_one) in enumerate(turns, 1) if speaks != next_one]

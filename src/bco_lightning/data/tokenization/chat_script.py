"""What the chat template makes of a row: its prompt, and what each turn of the completion adds to that."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.data.tokenization.conversation import CLOSE, OPEN, Conversation
from bco_lightning.data.tokenization.special_tokens import SpecialTokens
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


@dataclass
class ChatScript:
    """A row as the chat template renders it.

    Args:
        conversation: What the template was told.
        texts: The rendered prompt, then what each turn of the completion adds to it.
        speakers: For each turn of the completion, whether it is the assistant's.
        token_ids: The tokens of ``texts``.
    """

    conversation: Conversation
    texts: list[str]
    speakers: list[bool]
    token_ids: list[list[int]] = field(default_factory=list)


class ChatTemplate:
    """Renders rows by a tokenizer's chat template, with user text kept apart from control tokens.

    Args:
        tokenizer: A transformers tokenizer.
        text: The template.
        special: The tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, text: str, special: SpecialTokens) -> None:
        self._tokenizer, self._text, self._special = tokenizer, text, special
        self._text_with_tools = _text_with_tools(tokenizer, text)
        self._reserved = _reserved_names(tokenizer)
        self._render_plain = _plain_renderer(tokenizer, text)
        self._last_prompt: tuple[Any, str] = (None, "")

    def script(self, row: FeedbackRow) -> ChatScript:
        """Lets the template speak.

        Raises:
            FeedbackRowError: If the template fails on the row, or does not extend the prompt by the completion.
        """
        try:
            self._check_options(row)
            given = Conversation(row.prompt + row.completion, row.tools, row.template_options)
            conversation = self._shielded(given)
            stops = _turns(row)
            texts = self._texts(conversation, len(row.prompt), stops, row.place)
            return ChatScript(conversation, texts, [speaks for _, speaks in stops])
        except FeedbackRowError:
            raise
        except TEMPLATE_FAILURES as error:
            raise FeedbackRowError(
                row.place,
                f"expected messages that the chat template takes, found that it refuses them ({self._words(error)}).",
            ) from error

    def render(self, conversation: Conversation, stop: int | None = None, *, asks_next: bool) -> str:
        """The messages up to ``stop`` as text; ``asks_next`` adds what comes before an answer."""
        messages = conversation.messages[:stop]
        if self._render_plain is not None and conversation.is_plain:
            return self._render_plain(messages, asks_next)
        template = self._text if conversation.tools is None else self._text_with_tools
        return str(
            self._tokenizer.apply_chat_template(
                # Later versions of transformers do so too: many templates print a null, or fail on it.
                [{name: part for name, part in message.items() if part is not None} for message in messages],
                tools=conversation.tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=asks_next,
                **conversation.options,
            )
        )

    def after_last_message(self, conversation: Conversation, prompt: str, num_messages: int) -> str:
        """What the template writes after what is said last in the prompt, so that the assistant can speak.

        Args:
            conversation: What the template was told.
            prompt: What it made of the prompt.
            num_messages: Messages of the prompt.

        Returns:
            The end of ``prompt``; empty if the template writes nothing there.
        """
        last: Message = conversation.messages[num_messages - 1]
        messages = [*conversation.messages[: num_messages - 1], {**last, "content": _STAND_IN}]
        stood_in = Conversation(messages, conversation.tools, conversation.options)
        with contextlib.suppress(*TEMPLATE_FAILURES):  # a template may take the last message apart
            _, found, end = self.render(stood_in, asks_next=True).rpartition(_STAND_IN)
            if found and prompt.endswith(end):
                return end
        with contextlib.suppress(*TEMPLATE_FAILURES):  # or refuse one that is not answered
            unasked = self.render(conversation, num_messages, asks_next=False)
            return prompt[len(unasked) :] if prompt.startswith(unasked) else ""
        return ""

    def _words(self, error: Exception) -> str:
        """What a template says of its own accord; other words may be those of the row, and are not shown."""
        words = str(error)
        if words and (words in self._text or words in self._text_with_tools):
            return words
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == _TEMPLATE), None)
        return type(error).__name__ + (f" in line {line} of the template" if line else "")

    def _check_options(self, row: FeedbackRow) -> None:
        for name in row.template_options:
            if name in self._reserved:
                raise FeedbackRowError(
                    row.place,
                    f"expected options that a chat template defines, found {name!r}, which is given to every template.",
                    "Remove it from the row's template options.",
                )

    def _shielded(self, given: Conversation) -> Conversation:
        shielded = self._special.shield(given)
        if not self._special.may_join(given):
            return shielded
        whole = self._special.shield_whole(given)
        as_given, kept_apart = (self.render(known, asks_next=False) for known in (shielded, whole))
        return whole if self._special.count(as_given) > self._special.count(kept_apart) else shielded

    def _texts(
        self, conversation: Conversation, num_prompt: int, stops: list[tuple[int, bool]], place: str
    ) -> list[str]:
        texts = [before := self._prompt(conversation, num_prompt)]
        for stop, speaks in stops:
            after = self.render(conversation, stop, asks_next=not speaks)
            if not after.startswith(before):
                raise FeedbackRowError(
                    place,
                    "expected a chat template that extends the prompt by the completion, found one that rewrites it.",
                    "Set data.chat_template to one that only appends.",
                )
            texts.append(after[len(before) :])
            before = after
        return texts

    def _prompt(self, conversation: Conversation, num_prompt: int) -> str:
        # Rows of one prompt often stand together.
        told = (conversation.messages[:num_prompt], conversation.tools, conversation.options)
        known = self._last_prompt  # taken once, as another thread may put its own there
        if told != known[0]:
            known = self._last_prompt = (told, self.render(conversation, num_prompt, asks_next=True))
        return known[1]


def chosen_template(tokenizer: Any, chat_template: str | None) -> str:
    """The Jinja text that ``data.chat_template`` means.

    Args:
        tokenizer: A transformers tokenizer.
        chat_template: ``None`` for the tokenizer's own, ``plain`` for the bare texts one after the other, or the path
            of a Jinja file.

    Raises:
        LanguageModelError: If the tokenizer has no chat template and none is given.
        ConfigError: If the template file cannot be read.
    """
    if chat_template == "plain":
        return PLAIN_TEMPLATE
    if chat_template is not None:
        try:
            return Path(chat_template).expanduser().read_text(encoding="utf-8")
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


def _text_with_tools(tokenizer: Any, text: str) -> str:
    """The template for rows with tools; some tokenizers have one of its own beside their default."""
    templates = tokenizer.chat_template
    own = isinstance(templates, dict) and templates.get("default") == text
    return str(templates.get("tool_use", text)) if own else text


def _reserved_names(tokenizer: Any) -> frozenset[str]:
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters
    return frozenset({"messages", "self", *arguments, *tokenizer.special_tokens_map} - {"documents"})


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


def _plain_renderer(tokenizer: Any, text: str) -> Callable[[list[Message], bool], str] | None:
    """What the tokenizer does with messages of a role and a text, without its copies and checks of other kinds.

    Returns:
        A function of messages and of whether an answer is asked for; ``None`` if it does not do as the tokenizer does.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(text)
        known = {**template.globals, **tokenizer.special_tokens_map, "tools": None, "documents": None}

        def render(messages: list[Message], asks_next: bool) -> str:
            told = {**known, "messages": messages, "add_generation_prompt": asks_next}
            try:
                return "".join(template.root_render_func(template.new_context(told, shared=True)))
            except Exception:
                raise template.environment.handle_exception()  # noqa: B904 - it raises the same with lines of the template

        options = {"chat_template": text, "tokenize": False}
        same = all(
            render(probe[:stop], asks_next)
            == tokenizer.apply_chat_template(probe[:stop], add_generation_prompt=asks_next, **options)
            for stop, asks_next in ((1, True), (2, False))
        )
    except (ImportError, *TEMPLATE_FAILURES):
        return None
    return render if same else None

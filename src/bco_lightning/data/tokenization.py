"""Turn a feedback row into token ids: chat template, prompt and completion apart, limits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import TemplateError

from bco_lightning.batch import FeedbackRow, Message, TokenizedSample
from bco_lightning.data.special_tokens import ShieldedMessages, SpecialTokens
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError

TooLong = Literal["cut", "drop"]
# What a prompt and a completion look like without any markup: for base models that have no chat format.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


# A template is a small program, and a row can hold what it does not expect.
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, AttributeError, LookupError, RecursionError)
_Result = TypeVar("_Result")


@dataclass
class _Script:
    """A row as the chat template renders it: the prompt, then what each message of the completion adds."""

    texts: list[str]
    shielded: ShieldedMessages | None
    token_ids: list[list[int]] = field(default_factory=list)


@dataclass
class _Segment:
    """A run of tokens that carries loss, or does not."""

    token_ids: list[int]
    carries_loss: bool


class RowTokenizer:
    """Tokenizes rows with the tokenizer's chat template.

    Prompt and completion are rendered by the template and tokenized apart, so that no token spans their boundary. Only
    what the assistant said in the completion, and the end token after it, carries loss. The name of a special token in
    a message, such as a typed ``<|im_end|>``, comes out as ordinary tokens.

    Args:
        tokenizer: A transformers tokenizer.
        max_length: Limit of prompt and completion together, in tokens.
        too_long: ``cut`` shortens a row that is over the limit: first its prompt on the left (a leading system
            message and a BOS token stay), down to half of the limit; then its completion on the right, which then gets
            no end token. ``drop`` leaves the row out.
        chat_template: ``None`` for the tokenizer's own, ``plain`` for the bare texts one after the other, or the path
            of a Jinja file.

    Raises:
        LanguageModelError: If the tokenizer has no chat template and none is given.
        ConfigError: If the template file does not exist.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, too_long: TooLong = "cut", chat_template: str | None = None
    ) -> None:
        if max_length < 2:
            raise ConfigError("data.max_length", f"expected at least 2 tokens, found {max_length}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long = too_long
        self.chat_template = chosen_template(tokenizer, chat_template)
        self._special = SpecialTokens(tokenizer)
        self._last_prompt: tuple[list[Message], str] = ([], "")
        first = self._encode("a", add_special_tokens=True)[:1]
        self._own_bos = first if first == [tokenizer.bos_token_id] else []

    def render_prompt(self, prompt: list[Message]) -> str:
        """The prompt as text, up to where the assistant begins to speak."""
        return self._render(prompt, add_generation_prompt=True)

    def tokenize(self, row: FeedbackRow) -> TokenizedSample | None:
        """Tokenizes one row.

        Args:
            row: A validated row.

        Returns:
            The sample, or ``None`` if the row is over the limit and was to be dropped, or the limit leaves no room for
            tokens to learn from.

        Raises:
            FeedbackRowError: If the template fails on the row or does not extend the prompt by the completion, or
                nothing of the completion is left to learn from.
        """
        [outcome] = self.tokenize_batch([row])
        if isinstance(outcome, FeedbackRowError):
            raise outcome
        return outcome

    def tokenize_batch(self, rows: Sequence[FeedbackRow]) -> list[TokenizedSample | FeedbackRowError | None]:
        """Tokenizes rows together, which is faster; each outcome is what :meth:`tokenize` returns or raises."""
        scripts = [_outcome(self._script, row) for row in rows]
        ordinary = [script for script in scripts if isinstance(script, _Script) and script.shielded is None]
        # Rows of one prompt often stand together.
        texts = list(dict.fromkeys(text for script in ordinary for text in script.texts))
        token_ids = dict(zip(texts, self._encode_all(texts), strict=True))
        for script in ordinary:
            script.token_ids = [token_ids[text] for text in script.texts]
        return [
            script if isinstance(script, FeedbackRowError) else _outcome(self._sample, row, script)
            for row, script in zip(rows, scripts, strict=True)
        ]

    def _script(self, row: FeedbackRow) -> _Script:
        """Lets the chat template speak."""
        try:
            shielded = self._shielded(row)
            messages = shielded.messages if shielded else row.prompt + row.completion
            prompt, completion = messages[: len(row.prompt)], messages[len(row.prompt) :]
            return _Script(self._texts(prompt, completion, row.place), shielded)
        except FeedbackRowError:
            raise
        except _TEMPLATE_FAILURES as error:
            raise FeedbackRowError(
                row.place, f"expected messages that the chat template takes, found that it refuses them ({error})."
            ) from error

    def _shielded(self, row: FeedbackRow) -> ShieldedMessages | None:
        messages = row.prompt + row.completion
        shielded = self._special.shield(messages)
        if not self._special.may_join(messages):
            return shielded
        whole = self._special.shield_whole(messages)
        given, kept_apart = (
            self._render(known, add_generation_prompt=False)
            for known in (shielded.messages if shielded else messages, whole.messages)
        )
        return whole if self._special.count(given) > self._special.count(kept_apart) else shielded

    def _texts(self, prompt: list[Message], completion: list[Message], place: str) -> list[str]:
        """The rendered prompt, and what each message of the completion adds to it."""
        if prompt != self._last_prompt[0]:
            self._last_prompt = (prompt, self.render_prompt(prompt))
        texts = [before := self._last_prompt[1]]
        for number, message in enumerate(completion, 1):
            asks_next = number < len(completion) and completion[number]["role"] == "assistant"
            if asks_next and message["role"] == "assistant":
                raise FeedbackRowError(place, "expected turns between assistant messages, found two in a row.")
            after = self._render(prompt + completion[:number], add_generation_prompt=asks_next)
            if not after.startswith(before):
                raise FeedbackRowError(
                    place,
                    "expected a chat template that extends the prompt by the completion, found one that rewrites it.",
                    "Set data.chat_template to one that only appends.",
                )
            texts.append(after[len(before) :])
            before = after
        return texts

    def _sample(self, row: FeedbackRow, script: _Script) -> TokenizedSample | None:
        if script.shielded is not None:
            script.token_ids = [self._encode_shielded(text, script.shielded, row.place) for text in script.texts]
        prompt_ids, *turns = script.token_ids
        if self.chat_template == PLAIN_TEMPLATE:
            prompt_ids = self._own_bos + prompt_ids
        segments = self._segments(row, turns)
        completion_ids = [token for segment in segments for token in segment.token_ids]
        mask = [segment.carries_loss for segment in segments for _ in segment.token_ids]
        sample = self._within_limit(row, script, prompt_ids, completion_ids, mask)
        # The first token of all is predicted from nothing, so it cannot carry loss.
        return sample if sample is not None and any(sample.completion_mask[1:]) else None

    def _segments(self, row: FeedbackRow, turns: list[list[int]]) -> list[_Segment]:
        segments: list[_Segment] = []
        num_said = 0
        for number, (message, turn) in enumerate(zip(row.completion, turns, strict=True), 1):
            if message["role"] == "assistant":
                segments += self._assistant_segments(turn, number == len(turns))
                num_said += len(turn) - sum(token in self._special.ids for token in turn)
            else:
                segments.append(_Segment(turn, False))
        if not num_said:
            raise FeedbackRowError(
                row.place,
                "expected a completion of which the chat template leaves tokens to learn from, found none.",
                "Remove the row, or set data.chat_template to one that prints what the assistant says.",
            )
        return segments

    def _within_limit(
        self, row: FeedbackRow, script: _Script, prompt_ids: list[int], completion_ids: list[int], mask: list[bool]
    ) -> TokenizedSample | None:
        excess = len(prompt_ids) + len(completion_ids) - self.max_length
        if excess <= 0:
            return TokenizedSample(prompt_ids + completion_ids, [False] * len(prompt_ids) + mask)
        if self.too_long == "drop":
            return None
        prompt_room = max(self.max_length - len(completion_ids), self.max_length // 2)
        cut_prompt = self._cut_left(row, script, prompt_ids, prompt_room)
        if cut_prompt is None:
            return None
        completion_room = self.max_length - len(cut_prompt)
        return TokenizedSample(
            cut_prompt + completion_ids[:completion_room],
            [False] * len(cut_prompt) + mask[:completion_room],
            prompt_cut=len(cut_prompt) < len(prompt_ids),
            completion_cut=excess > len(prompt_ids) - len(cut_prompt),
        )

    def _cut_left(self, row: FeedbackRow, script: _Script, prompt_ids: list[int], room: int) -> list[int] | None:
        if len(prompt_ids) <= room:
            return prompt_ids
        kept = self._own_bos if prompt_ids[:1] == self._own_bos else []
        if row.prompt[0]["role"] == "system" and len(row.prompt) > 1:
            with contextlib.suppress(*_TEMPLATE_FAILURES):  # some templates refuse a system message alone
                system_ids = self._system_ids(row, script)
                kept = system_ids if prompt_ids[: len(system_ids)] == system_ids else kept
        if len(kept) >= room:
            return None
        return kept + prompt_ids[len(prompt_ids) - (room - len(kept)) :]

    def _system_ids(self, row: FeedbackRow, script: _Script) -> list[int]:
        messages = script.shielded.messages if script.shielded else row.prompt
        text = self._render(messages[:1], add_generation_prompt=False)
        return self._encode_shielded(text, script.shielded, row.place) if script.shielded else self._encode(text)

    def _assistant_segments(self, token_ids: list[int], last: bool) -> list[_Segment]:
        end = self._end_of_turn(token_ids)
        if end is None:
            return [_Segment([*token_ids, self.tokenizer.eos_token_id] if last else token_ids, True)]
        # Templates write a line break after the end token; the model never has to produce it.
        return [_Segment(token_ids[:end], True)] + ([] if last else [_Segment(token_ids[end:], False)])

    def _end_of_turn(self, token_ids: list[int]) -> int | None:
        """Length up to and including the special token that closes the turn, if the template wrote one."""
        last = next((place for place in reversed(range(len(token_ids))) if token_ids[place] in self._special.ids), None)
        if last is None or self.tokenizer.decode(token_ids[last + 1 :]).strip():
            return None
        return last + 1

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not texts or backend is None or not self.tokenizer.is_fast:
            return [self._encode(text) for text in texts]
        self._encode("")  # takes back the truncation and padding of an earlier call, which stay with the tokenizer
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_shielded(self, text: str, shielded: ShieldedMessages, place: str) -> list[int]:
        try:
            return self._special.encode(text, shielded)
        except ValueError as error:
            raise FeedbackRowError(place, f"expected text, {error}.", "Remove the row or the name in it.") from error


def _outcome(function: Callable[..., _Result], *arguments: Any) -> _Result | FeedbackRowError:
    try:
        return function(*arguments)
    except FeedbackRowError as error:
        return error.without_cause()


def chosen_template(tokenizer: Any, chat_template: str | None) -> str:
    """The Jinja text that ``data.chat_template`` means; what it raises is what :class:`RowTokenizer` raises."""
    if chat_template == "plain":
        return PLAIN_TEMPLATE
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise ConfigError(
                "data.chat_template", f"expected 'plain' or the path of a Jinja file, found {chat_template!r}."
            )
        return path.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise LanguageModelError(
            "tokenizer",
            "expected a tokenizer with a chat template, found one without.",
            "Set data.chat_template to a Jinja file, or to 'plain' for a base model without a chat format.",
        )
    return str(tokenizer.chat_template)

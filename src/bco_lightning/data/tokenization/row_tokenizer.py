"""Turn a feedback row into token ids: chat template, prompt and completion apart, limits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, TypeVar

from bco_lightning.batch import FeedbackRow, LeftOut, Message, TokenizedSample
from bco_lightning.data.tokenization.chat_script import (
    PLAIN_TEMPLATE,
    TEMPLATE_FAILURES,
    ChatScript,
    ChatTemplate,
    chosen_template,
)
from bco_lightning.data.tokenization.conversation import Conversation
from bco_lightning.data.tokenization.length_limits import (
    COMPLETION_TOO_LONG,
    NO_ROOM_FOR_COMPLETION,
    NO_ROOM_FOR_PROMPT,
    LengthLimits,
)
from bco_lightning.data.tokenization.special_tokens import SpecialTokens
from bco_lightning.data.tokenization.word_tokens import WordTokens
from bco_lightning.errors import FeedbackRowError

__all__ = ["LengthLimits", "RowTokenizer", "chosen_template"]

_Result = TypeVar("_Result")


class RowTokenizer:
    """Tokenizes rows with the tokenizer's chat template.

    Prompt and completion are rendered by the template and tokenized apart, so that no token spans their boundary. Only
    what the assistant said in the completion, tool calls included, and the end token after it, carries loss. The name
    of a special token in what the template is told, such as a typed ``<|im_end|>``, comes out as ordinary tokens.

    Args:
        tokenizer: A transformers tokenizer.
        limits: How long a row may be, and what becomes of longer ones.
        chat_template: ``None`` for the tokenizer's own, ``plain`` for the bare texts one after the other, or the path
            of a Jinja file.

    Raises:
        LanguageModelError: If the tokenizer has no chat template and none is given.
        ConfigError: If the template file does not exist.
    """

    def __init__(self, tokenizer: Any, limits: LengthLimits, chat_template: str | None = None) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.chat_template = chosen_template(tokenizer, chat_template)
        self._special = SpecialTokens(tokenizer)
        self._template = ChatTemplate(tokenizer, self.chat_template, self._special)
        self._is_blank = lru_cache(maxsize=64)(lambda token_ids: not tokenizer.decode(token_ids).strip())
        first = self._encode("a", add_special_tokens=True)[:1]
        self._own_bos = first if first == [tokenizer.bos_token_id] else []
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._words = WordTokens.of(backend, type(tokenizer).__name__) if backend is not None else None

    def render_prompt(self, prompt: list[Message]) -> str:
        """The prompt as text, up to where the assistant begins to speak."""
        return self._template.render(Conversation(prompt), asks_next=True)

    def tokenize(self, row: FeedbackRow) -> TokenizedSample | LeftOut:
        """Tokenizes one row.

        Args:
            row: A validated row.

        Returns:
            The sample, or why the row is left out: it is over a limit and was to be dropped, or the limits leave no
            room for tokens to learn from.

        Raises:
            FeedbackRowError: If the template fails on the row, does not extend the prompt by the completion or prints
                nothing of it, or the row names an option that is not a template's own.
        """
        [outcome] = self.tokenize_batch([row])
        if isinstance(outcome, FeedbackRowError):
            raise outcome
        return outcome

    def tokenize_batch(self, rows: Sequence[FeedbackRow]) -> list[TokenizedSample | LeftOut | FeedbackRowError]:
        """Tokenizes rows together, which is faster; each outcome is what :meth:`tokenize` returns or raises."""
        scripts = [_outcome(self._template.script, row) for row in rows]
        ordinary = [script for script in scripts if isinstance(script, ChatScript) and not script.conversation.literals]
        # Rows of one prompt often stand together.
        texts = list(dict.fromkeys(text for script in ordinary for text in script.texts))
        token_ids = dict(zip(texts, self._encode_all(texts), strict=True))
        for script in ordinary:
            script.token_ids = [token_ids[text] for text in script.texts]
        return [
            script if isinstance(script, FeedbackRowError) else _outcome(self._sample, row, script)
            for row, script in zip(rows, scripts, strict=True)
        ]

    def _sample(self, row: FeedbackRow, script: ChatScript) -> TokenizedSample | LeftOut:
        if script.conversation.literals:
            script.token_ids = [self._encode_apart(text, script, row.place) for text in script.texts]
        prompt_ids, *turns = script.token_ids
        if self.chat_template == PLAIN_TEMPLATE:
            prompt_ids = self._own_bos + prompt_ids
        completion_ids, mask = self._completion(turns, script.speakers)
        if not self._says_something(completion_ids, mask):
            raise FeedbackRowError(
                row.place,
                "expected a completion of which the chat template leaves tokens to learn from, found none.",
                "Remove the row, or set data.chat_template to one that prints what the assistant says.",
            )
        return self._within_limits(row, script, prompt_ids, completion_ids, mask)

    def _completion(self, turns: list[list[int]], speakers: list[bool]) -> tuple[list[int], list[bool]]:
        """Tokens of the completion, and which of them carry loss."""
        token_ids: list[int] = []
        mask: list[bool] = []
        for number, (turn, speaks) in enumerate(zip(turns, speakers, strict=True), 1):
            said, rest = self._said(turn, number == len(turns)) if speaks else ([], turn)
            token_ids += said
            token_ids += rest
            mask += [True] * len(said)
            mask += [False] * len(rest)
        return token_ids, mask

    def _said(self, turn: list[int], last: bool) -> tuple[list[int], list[int]]:
        """What the assistant says in its turn, and what the template writes after that."""
        end = self._end_of_turn(turn)
        if end is None:
            return [*turn, self.tokenizer.eos_token_id] if last else turn, []
        # Templates write a line break after the end token; the model never has to produce it.
        return turn[:end], [] if last else turn[end:]

    def _end_of_turn(self, turn: list[int]) -> int | None:
        """Length up to and including the special token that closes the turn, if the template wrote one."""
        special = self._special.ids
        end = next((place for place in range(len(turn), 0, -1) if turn[place - 1] in special), None)
        return end if end is not None and self._is_blank(tuple(turn[end:])) else None

    def _says_something(self, token_ids: Sequence[int], mask: Sequence[bool]) -> bool:
        """Whether a token carries loss that is not merely markup."""
        return not self._special.ids.issuperset(compress(token_ids, mask))

    def _within_limits(
        self, row: FeedbackRow, script: ChatScript, prompt_ids: list[int], completion_ids: list[int], mask: list[bool]
    ) -> TokenizedSample | LeftOut:
        num_prompt, num_completion = len(prompt_ids), len(completion_ids)
        prompt_room = self.limits.prompt_room(num_completion)
        if num_prompt > prompt_room:
            if self.limits.long_prompts == "drop":
                return LeftOut(row.place, self.limits.prompt_reason)
            prompt_ids = self._cut(row, script, prompt_ids, prompt_room)
            if not prompt_ids:
                return LeftOut(row.place, NO_ROOM_FOR_PROMPT)
        room = self.limits.max_length - len(prompt_ids)
        if num_completion > room and self.limits.long_completions == "drop":
            return LeftOut(row.place, COMPLETION_TOO_LONG)
        # The first token of all is predicted from nothing, so there is nothing to learn from it.
        first = 0 if prompt_ids else 1
        is_whole = num_completion <= room and not first
        if not is_whole and not self._says_something(completion_ids[first:room], mask[first:room]):
            return LeftOut(row.place, NO_ROOM_FOR_COMPLETION)
        return TokenizedSample(
            prompt_ids + completion_ids[:room],
            [False] * len(prompt_ids) + mask[:room],
            prompt_cut=len(prompt_ids) < num_prompt,
            completion_cut=num_completion > room,
            prompt_length=num_prompt,
            completion_length=num_completion,
        )

    def _cut(self, row: FeedbackRow, script: ChatScript, prompt_ids: list[int], room: int) -> list[int]:
        """So many tokens of a longer prompt; none if what has to stay leaves no room for others."""
        keep_end = self.limits.long_prompts == "keep_end"
        kept = self._head(row, script, prompt_ids) if keep_end else self._tail(row, script)
        others = room - len(kept)
        if others <= 0:
            return []
        return kept + prompt_ids[len(prompt_ids) - others :] if keep_end else prompt_ids[:others] + kept

    def _head(self, row: FeedbackRow, script: ChatScript, prompt_ids: list[int]) -> list[int]:
        """A leading system message or BOS token."""
        if row.prompt[0]["role"] == "system" and len(row.prompt) > 1:
            with contextlib.suppress(*TEMPLATE_FAILURES):  # some templates refuse a system message alone
                system = self._template.render(script.conversation, 1, asks_next=False)
                system_ids = self._encode_apart(system, script, row.place)
                if prompt_ids[: len(system_ids)] == system_ids:
                    return system_ids
        return self._own_bos if prompt_ids[:1] == self._own_bos else []

    def _tail(self, row: FeedbackRow, script: ChatScript) -> list[int]:
        """What lets the assistant speak after the last message."""
        tail = self._template.after_last_message(script.conversation, script.texts[0], len(row.prompt))
        return self._encode_apart(tail, script, row.place)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not texts or backend is None or not self.tokenizer.is_fast:
            return [self._encode(text) for text in texts]
        self._encode("")  # takes back the truncation and padding of an earlier call, which stay with the tokenizer
        if self._words is not None:
            return self._words.encode_all(texts)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_apart(self, text: str, script: ChatScript, place: str) -> list[int]:
        """Token ids of a rendered text, with what was typed kept apart from control tokens."""
        if not script.conversation.literals:
            return self._encode(text)
        try:
            return self._special.encode(text, script.conversation)
        except ValueError as error:
            raise FeedbackRowError(place, f"expected text, {error}.", "Remove the row or the name in it.") from error


def _outcome(function: Callable[..., _Result], *arguments: Any) -> _Result | FeedbackRowError:
    try:
        return function(*arguments)
    except FeedbackRowError as error:
        return error.without_cause()

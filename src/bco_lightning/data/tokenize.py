"""From a row to token ids: prompt and completion apart, what carries loss, and limits of length."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any, Literal, TypeVar, get_args

from bco_lightning.batch import FeedbackRow, LeftOut, Message, TokenizedSample
from bco_lightning.data.chat import PLAIN_TEMPLATE, TEMPLATE_FAILURES, ChatScript, ChatTemplate, chosen_template
from bco_lightning.data.control_tokens import CannotBeTextError, ControlTokens, Conversation
from bco_lightning.errors import ConfigError, FeedbackRowError, check_choice

LongPrompts = Literal["keep_end", "keep_start", "drop"]
LongCompletions = Literal["cut", "drop"]

# Reasons for which a row is left out; rows are counted under them.
PROMPT_OVER_ITS_LIMIT = "prompt over data.max_prompt_length"
PROMPT_TOO_LONG = "prompt too long (data.max_length)"
COMPLETION_TOO_LONG = "completion too long (data.max_length)"
NO_ROOM_FOR_PROMPT = "no room for a prompt"
NO_ROOM_FOR_COMPLETION = "no room for a completion"
CANNOT_BE_TEXT = "name of a control token that cannot be written as text"

# Rows that are tokenized together, and batches of them that wait for their token ids while the next one is read.
_BATCH_ROWS, _BATCH_CHARACTERS, _AHEAD = 256, 2**20, 3

Row = FeedbackRow | LeftOut | FeedbackRowError
Outcome = TokenizedSample | LeftOut | FeedbackRowError
Scripts = list[ChatScript | FeedbackRowError]
TokenIds = dict[str, list[int]]
Known = TypeVar("Known")


@dataclass(frozen=True)
class LengthLimits:
    """Limits of a row in tokens, and what becomes of what is over them.

    Args:
        max_length: Limit of prompt and completion together.
        max_prompt_length: Limit of the prompt; if left out, what the completion leaves of ``max_length``, and at least
            half of it.
        long_prompts: ``keep_end`` cuts a prompt over its limit on the left, where a leading system message and a BOS
            token stay; ``keep_start`` cuts it on the right, where what the template writes for the assistant to answer
            stays; ``drop`` leaves the row out.
        long_completions: ``cut`` cuts a completion over what the prompt leaves on the right, so that it has no end
            token; ``drop`` leaves the row out.

    Raises:
        ConfigError: If the limits leave no room for a prompt and a completion, or a policy is unknown.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    long_prompts: LongPrompts = "keep_end"
    long_completions: LongCompletions = "cut"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError("data.max_length", f"expected at least 2 tokens, found {self.max_length}.")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ConfigError(
                "data.max_prompt_length",
                f"expected at least 1 token and fewer than data.max_length ({self.max_length}), "
                f"found {self.max_prompt_length}.",
            )
        check_choice("data.long_prompts", self.long_prompts, get_args(LongPrompts))
        check_choice("data.long_completions", self.long_completions, get_args(LongCompletions))

    def prompt_room(self, completion_length: int) -> int:
        """Tokens that a prompt may have beside a completion of so many.

        Example:
            >>> LengthLimits(max_length=100).prompt_room(30), LengthLimits(max_length=100).prompt_room(80)
            (70, 50)
            >>> LengthLimits(max_length=100, max_prompt_length=20).prompt_room(30)
            20
        """
        if self.max_prompt_length is not None:
            return self.max_prompt_length
        return max(self.max_length - completion_length, self.max_length // 2)

    @property
    def prompt_reason(self) -> str:
        """Why a row is left out whose prompt is over its room."""
        return PROMPT_TOO_LONG if self.max_prompt_length is None else PROMPT_OVER_ITS_LIMIT


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
        self.tokenizer, self.limits, self._given_template = tokenizer, limits, chat_template
        self.chat_template = chosen_template(tokenizer, chat_template)
        self._control = ControlTokens(tokenizer)
        self._template = ChatTemplate(tokenizer, self.chat_template, self._control)
        self._is_blank = lru_cache(maxsize=64)(lambda token_ids: not tokenizer.decode(token_ids).strip())
        first = self._encode("a", add_special_tokens=True)[:1]
        self._own_bos = first if first == [tokenizer.bos_token_id] else []

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTokenizer, (self.tokenizer, self.limits, self._given_template)  # to loader workers of a stream

    def render_prompt(self, prompt: list[Message]) -> str:
        """The prompt as text, up to where the assistant begins to speak."""
        return self._template.render(Conversation(prompt), asks_next=True)

    def tokenize(self, row: FeedbackRow) -> TokenizedSample | LeftOut:
        """Tokenizes one row.

        Args:
            row: A validated row.

        Returns:
            The sample, or why the row is left out: it is over a limit and was to be dropped, the limits leave no room
            for tokens to learn from, or it holds the name of a control token that cannot be written as text.

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
        scripts = self._scripts(rows)
        return self._outcomes(rows, scripts, self._encode_all(scripts))

    def tokenize_all(self, items: Iterable[tuple[Row, Known]]) -> Iterator[tuple[Row, Known, Outcome]]:
        """Tokenizes rows that come one by one, each with what is known of it, in their order.

        The tokenizer leaves the interpreter free, so the next rows are read and rendered meanwhile. What is no row is
        its own outcome.
        """
        with ThreadPoolExecutor(max_workers=2) as threads:
            waiting: deque[tuple[list[tuple[Row, Known]], Sequence[FeedbackRow], Scripts, Future[TokenIds]]] = deque()
            for batch in _batches(items):
                rows = [row for row, _ in batch if isinstance(row, FeedbackRow)]
                scripts = self._scripts(rows)
                waiting.append((batch, rows, scripts, threads.submit(self._encode_all, scripts)))
                if len(waiting) > _AHEAD:
                    yield from self._finished(*waiting.popleft())
            while waiting:
                yield from self._finished(*waiting.popleft())

    def _scripts(self, rows: Sequence[FeedbackRow]) -> Scripts:
        self._encode("")  # takes back the truncation and padding of an earlier call, which stay with the tokenizer
        return self._template.scripts(rows)

    def _finished(
        self, batch: list[tuple[Row, Known]], rows: Sequence[FeedbackRow], scripts: Scripts, token_ids: Future[TokenIds]
    ) -> Iterator[tuple[Row, Known, Outcome]]:
        outcomes = iter(self._outcomes(rows, scripts, token_ids.result()))
        for row, known in batch:
            yield row, known, next(outcomes) if isinstance(row, FeedbackRow) else row

    def _outcomes(self, rows: Sequence[FeedbackRow], scripts: Scripts, token_ids: TokenIds) -> list[Outcome]:
        return [
            script if isinstance(script, FeedbackRowError) else self._outcome(row, script, token_ids)
            for row, script in zip(rows, scripts, strict=True)
        ]

    def _outcome(self, row: FeedbackRow, script: ChatScript, known: TokenIds) -> Outcome:
        try:
            apart = known if not script.conversation.literals else {}
            token_ids = [apart[text] if text in apart else self._encode_apart(text, script) for text in script.texts]
            return self._sample(row, script, token_ids)
        except CannotBeTextError:
            return LeftOut(row.place, CANNOT_BE_TEXT)
        except FeedbackRowError as error:
            return error

    def _sample(self, row: FeedbackRow, script: ChatScript, token_ids: list[list[int]]) -> TokenizedSample | LeftOut:
        prompt_ids, *turns = token_ids
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
        special = self._control.ids
        end = next((place for place in range(len(turn), 0, -1) if turn[place - 1] in special), None)
        return end if end is not None and self._is_blank(tuple(turn[end:])) else None

    def _says_something(self, token_ids: Sequence[int], mask: Sequence[bool]) -> bool:
        """Whether a token carries loss that is not merely markup."""
        return not self._control.ids.issuperset(compress(token_ids, mask))

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
                system_ids = self._encode_apart(system, script)
                if prompt_ids[: len(system_ids)] == system_ids:
                    return system_ids
        return self._own_bos if prompt_ids[:1] == self._own_bos else []

    def _tail(self, row: FeedbackRow, script: ChatScript) -> list[int]:
        """What lets the assistant speak after the last message."""
        tail = self._template.after_last_message(script.conversation, script.texts[0], len(row.prompt))
        return self._encode_apart(tail, script)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encode_all(self, scripts: Scripts) -> TokenIds:
        """Token ids of the texts in which nothing is to be kept apart; of a slow tokenizer, for one thread, none."""
        ordinary = [script for script in scripts if isinstance(script, ChatScript) and not script.conversation.literals]
        texts = list(dict.fromkeys(text for script in ordinary for text in script.texts))  # several rows of one prompt
        if not texts or not self.tokenizer.is_fast:
            return {}
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}

    def _encode_apart(self, text: str, script: ChatScript) -> list[int]:
        """Token ids of a rendered text, with what was typed kept apart from control tokens."""
        if not script.conversation.literals:
            return self._encode(text)
        return self._control.encode(text, script.conversation)


def _batches(items: Iterable[tuple[Row, Known]]) -> Iterator[list[tuple[Row, Known]]]:
    pending: list[tuple[Row, Known]] = []
    characters = 0
    for item in items:
        pending.append(item)
        if isinstance(item[0], FeedbackRow):
            messages = (*item[0].prompt, *item[0].completion)
            characters += sum([len(message.get("content") or "") for message in messages])
        if len(pending) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield pending
            pending, characters = [], 0
    if pending:
        yield pending

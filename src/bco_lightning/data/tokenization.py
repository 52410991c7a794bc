"""Turn a feedback row into token ids: chat template, prompt and completion apart, limits."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from bco_lightning.batch import FeedbackRow, Message, TokenizedSample
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError

TooLong = Literal["cut", "drop"]
# What a prompt and a completion look like without any markup: for base models that have no chat format.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass
class _Segment:
    """A run of tokens that carries loss, or does not."""

    token_ids: list[int]
    carries_loss: bool


class RowTokenizer:
    """Tokenizes rows with the tokenizer's chat template.

    Prompt and completion are rendered by the template and tokenized apart, so that no token spans their boundary. Only
    what the assistant said in the completion, and the end token after it, carries loss.

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
        self.chat_template = _chosen_template(tokenizer, chat_template)
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
            The sample, or ``None`` if the row is over the limit and was to be dropped, or has a system message that
            leaves no room.

        Raises:
            FeedbackRowError: If the template fails on the row or does not extend the prompt by the completion.
        """
        try:
            prompt_ids = self._encode(self.render_prompt(row.prompt))
            segments = self._completion_segments(row)
        except TemplateError as error:
            raise FeedbackRowError(
                row.place, f"expected messages that the chat template takes, found that it refuses them ({error})."
            ) from error
        if self.chat_template == PLAIN_TEMPLATE:
            prompt_ids = self._own_bos + prompt_ids
        completion_ids = [token for segment in segments for token in segment.token_ids]
        mask = [segment.carries_loss for segment in segments for _ in segment.token_ids]
        excess = len(prompt_ids) + len(completion_ids) - self.max_length
        if excess <= 0:
            return TokenizedSample(prompt_ids + completion_ids, [False] * len(prompt_ids) + mask)
        if self.too_long == "drop":
            return None
        prompt_room = max(self.max_length - len(completion_ids), self.max_length // 2)
        cut_prompt = self._cut_left(row, prompt_ids, prompt_room)
        if cut_prompt is None:
            return None
        completion_room = self.max_length - len(cut_prompt)
        completion_ids, mask = completion_ids[:completion_room], mask[:completion_room]
        return TokenizedSample(
            cut_prompt + completion_ids,
            [False] * len(cut_prompt) + mask,
            prompt_cut=len(cut_prompt) < len(prompt_ids),
            completion_cut=excess > len(prompt_ids) - len(cut_prompt),
        )

    def _cut_left(self, row: FeedbackRow, prompt_ids: list[int], room: int) -> list[int] | None:
        if len(prompt_ids) <= room:
            return prompt_ids
        kept = self._own_bos if prompt_ids[:1] == self._own_bos else []
        if row.prompt[0]["role"] == "system" and len(row.prompt) > 1:
            with contextlib.suppress(TemplateError):  # some templates refuse a system message alone
                system_ids = self._encode(self._render(row.prompt[:1], add_generation_prompt=False))
                kept = system_ids if prompt_ids[: len(system_ids)] == system_ids else kept
        if len(kept) >= room:
            return None
        return kept + prompt_ids[len(prompt_ids) - (room - len(kept)) :]

    def _completion_segments(self, row: FeedbackRow) -> list[_Segment]:
        segments: list[_Segment] = []
        before = self.render_prompt(row.prompt)
        for number, message in enumerate(row.completion, 1):
            messages = row.prompt + row.completion[:number]
            last = number == len(row.completion)
            asks_next = not last and row.completion[number]["role"] == "assistant"
            after = self._render(messages, add_generation_prompt=asks_next)
            if not after.startswith(before):
                raise FeedbackRowError(
                    row.place,
                    "expected a chat template that extends the prompt by the completion, found one that rewrites it.",
                    "Set data.chat_template to one that only appends.",
                )
            spoken = message["role"] == "assistant"
            if spoken and asks_next:
                raise FeedbackRowError(row.place, "expected turns between assistant messages, found two in a row.")
            token_ids = self._encode(after[len(before) :])
            segments += self._assistant_segments(token_ids, last) if spoken else [_Segment(token_ids, False)]
            before = after
        return segments

    def _assistant_segments(self, token_ids: list[int], last: bool) -> list[_Segment]:
        end = self._end_of_turn(token_ids)
        if end is None:
            return [_Segment([*token_ids, self.tokenizer.eos_token_id] if last else token_ids, True)]
        # Templates write a line break after the end token; the model never has to produce it.
        return [_Segment(token_ids[:end], True)] + ([] if last else [_Segment(token_ids[end:], False)])

    def _end_of_turn(self, token_ids: list[int]) -> int | None:
        """Length up to and including the special token that closes the turn, if the template wrote one."""
        special = set(self.tokenizer.all_special_ids)
        end = max((place + 1 for place, token in enumerate(token_ids) if token in special), default=None)
        return end if end is not None and not self.tokenizer.decode(token_ids[end:]).strip() else None

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


def _chosen_template(tokenizer: Any, chat_template: str | None) -> str:
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

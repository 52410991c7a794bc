"""From a row to token ids: prompt and completion apart, what carries loss, and limits of length."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, compress, repeat
from typing import Any, TypeVar

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.chat import PLAIN_TEMPLATE, TEMPLATE_FAILURES, ChatScript, ChatTemplate, chosen_template
from bco_lightning.data.control_tokens import CannotBeTextError, ControlTokens
from bco_lightning.data.images import IMAGES, TOO_LONG_WITH_IMAGES, WITH_IMAGE, ImageInputs, pictures_of
from bco_lightning.data.joints import Joints, NoEdgeError, Piece
from bco_lightning.data.options import DataOptions
from bco_lightning.data.rows import RatedRow
from bco_lightning.errors import FeedbackRowError, LanguageModelError

# Reasons for which a row is left out; rows are counted under them.
PROMPT_OVER_ITS_LIMIT = "prompt over data.max_prompt_length"
PROMPT_TOO_LONG = "prompt too long (data.max_length)"
COMPLETION_TOO_LONG = "completion too long (data.max_length)"
NO_ROOM_FOR_PROMPT = "no room for a prompt"
NO_ROOM_FOR_COMPLETION = "no room for a completion"
CANNOT_BE_TEXT = "name of a control token that cannot be written as text"
NO_EDGE = "a token that spans the end of the prompt and the beginning of the completion"

# Rows that are tokenized together, and batches of them that wait for their token ids while the next one is read.
_BATCH_ROWS, _BATCH_CHARACTERS, _AHEAD = 128, 2**20, 2
_READ_AGAIN = 8  # rows at the start

Row = TypeVar("Row", bound=RatedRow)
Outcome = TokenizedSample | LeftOut | FeedbackRowError
Script = ChatScript | LeftOut | FeedbackRowError
TokenIds = dict[str, list[int]]


class RowTokenizer:
    """Tokenizes rows with the tokenizer's chat template.

    Prompt and completion are rendered by the template and tokenized apart, so that no token spans their boundary, and
    the completion as what goes on: the tokens are those of the whole text, unless one of them spans the boundary. Only
    what the assistant said in the completion, tool calls included, and the end token after it, carries loss. The name
    of a special token in what the template is told, such as a typed ``<|im_end|>``, comes out as ordinary tokens.
    """

    def __init__(self, tokenizer: Any, options: DataOptions) -> None:
        require_end_token(tokenizer, tokenizer.name_or_path or "tokenizer")
        self.tokenizer, self._options = tokenizer, options
        self.chat_template = chosen_template(tokenizer, options.chat_template)
        self._control, self._joints = ControlTokens(tokenizer), Joints(tokenizer, self._encode)
        self._to_read_again, self._inputs = _READ_AGAIN, ImageInputs(tokenizer)
        self._template = ChatTemplate(tokenizer, self.chat_template, self._control, self._joints, options.template_date)
        unknown = tokenizer.unk_token_id  # which is special, too; with some tokenizers a line break is
        self._is_blank = lru_cache(maxsize=64)(
            lambda token_ids: not tokenizer.decode([token for token in token_ids if token != unknown]).strip()
        )
        self._closing = self._control.ids - {unknown} | {tokenizer.eos_token_id}
        first = self._encode("a", add_special_tokens=True)[:1]
        self._own_bos = first if first == [tokenizer.bos_token_id] else []

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTokenizer, (self.tokenizer, self._options)  # to loader workers of a stream

    def tokenize(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Outcome]]:
        """Each row with its tokens, why it is left out, or what is wrong with it; what is no row is its own outcome.

        The tokenizer leaves the interpreter free, so the next rows are read and rendered meanwhile.
        """
        with ThreadPoolExecutor(max_workers=1) as thread:
            waiting: deque[tuple[list[Row], list[Script], Future[TokenIds]]] = deque()
            for batch in chain(_batches(rows), repeat([], _AHEAD)):
                self._encode("")  # takes back truncation and padding of an earlier call, which stay with the tokenizer
                scripts = self._template.scripts(batch)
                waiting.append((batch, scripts, thread.submit(self._encode_all, scripts)))
                if len(waiting) > _AHEAD:
                    batch, scripts, token_ids = waiting.popleft()
                    known = token_ids.result()
                    for row, script in zip(batch, scripts, strict=True):
                        yield row, self._outcome(script, known) if isinstance(script, ChatScript) else script

    def seen(self, row: RatedRow) -> RatedRow:
        """A row, or that it is left out since it has images and the model sees none."""
        if isinstance(row, FeedbackRow) and pictures_of(row) and self._inputs.processor is None:
            return LeftOut(row.place, f"{WITH_IMAGE}, and a model that sees none")
        return row

    def _outcome(self, script: ChatScript, known: TokenIds) -> Outcome:
        row, pictures = script.row, pictures_of(script.row)
        try:
            if pictures:
                texts = self._inputs.expanded(script.texts, pictures, row.place)
                script = replace(script, texts=texts, pieces=self._joints.pieces(texts))
            token_ids = self._encode_pieces(script, script.pieces, known)
            prompt_ids = self._own_bos * (self.chat_template == PLAIN_TEMPLATE) + token_ids[0]
            completion_ids, mask = self._completion(token_ids[1:], script.speakers)
            if not self._says_something(completion_ids, mask):
                return FeedbackRowError(
                    row.place,
                    "expected a completion of which the chat template leaves tokens to learn from, found none.",
                    "Remove the row, or set data.chat_template to one that prints what the assistant says.",
                )
            sample = self._within_limits(script, prompt_ids, completion_ids, mask)
        except CannotBeTextError:
            return LeftOut(row.place, CANNOT_BE_TEXT)
        except NoEdgeError:
            return LeftOut(row.place, NO_EDGE)
        except FeedbackRowError as error:
            return error
        if self._to_read_again and not script.conversation.literals:
            self._to_read_again -= 1
            if not self._joints.hold(script.texts, token_ids):
                raise FeedbackRowError(
                    row.place,
                    "expected token ids that read as the text that the chat template makes of the row, found others.",
                    "Set data.chat_template to one that ends prompts with a control token.",
                )
        if pictures and isinstance(sample, TokenizedSample):
            if sample.prompt_cut or sample.completion_cut:
                return LeftOut(row.place, TOO_LONG_WITH_IMAGES)
            first = sum(len(message.get(IMAGES, ())) for message in script.row.prompt)
            return replace(sample, images=tuple(picture.stored for picture in pictures), prompt_images=first)
        return sample

    def _completion(self, turns: list[list[int]], speakers: list[bool]) -> tuple[list[int], list[bool]]:
        """Tokens of the completion, and which of them carry loss: what the assistant says, and that its turn ends."""
        token_ids: list[int] = []
        mask: list[bool] = []
        for number, (turn, speaks) in enumerate(zip(turns, speakers, strict=True), 1):
            last, said = number == len(turns), len(turn) if speaks else 0
            # The special token that closes the turn, if the template wrote one.
            end = next((place for place in range(said, 0, -1) if turn[place - 1] in self._closing), 0)
            if end and self._is_blank(tuple(turn[end:])):
                # Templates write a line break after it; the model never has to produce it.
                turn, said = turn[:end] if last else turn, end
            elif speaks and last:
                turn, said = [*turn, self.tokenizer.eos_token_id], said + 1
            token_ids += turn
            mask += [True] * said + [False] * (len(turn) - said)
        return token_ids, mask

    def _says_something(self, token_ids: Sequence[int], mask: Sequence[bool]) -> bool:
        """Whether a token carries loss that is not merely markup."""
        return not self._control.ids.issuperset(compress(token_ids, mask))

    def _within_limits(
        self, script: ChatScript, prompt_ids: list[int], completion_ids: list[int], mask: list[bool]
    ) -> TokenizedSample | LeftOut:
        num_prompt, num_completion, place = len(prompt_ids), len(completion_ids), script.row.place
        most, options = self._options.max_length, self._options
        # What the completion leaves, and at least half.
        prompt_room = options.max_prompt_length or max(most - num_completion, most // 2)
        if num_prompt > prompt_room:
            if options.long_prompts == "drop":
                return LeftOut(place, PROMPT_OVER_ITS_LIMIT if options.max_prompt_length else PROMPT_TOO_LONG)
            prompt_ids = self._cut(script, prompt_ids, prompt_room)
            if not prompt_ids:
                return LeftOut(place, NO_ROOM_FOR_PROMPT)
        room = most - len(prompt_ids)
        if num_completion > room and options.long_completions == "drop":
            return LeftOut(place, COMPLETION_TOO_LONG)
        # The first token of all is predicted from nothing, so there is nothing to learn from it.
        first = 0 if prompt_ids else 1
        is_whole = num_completion <= room and not first
        if not is_whole and not self._says_something(completion_ids[first:room], mask[first:room]):
            return LeftOut(place, NO_ROOM_FOR_COMPLETION)
        return TokenizedSample(
            prompt_ids + completion_ids[:room],
            [False] * len(prompt_ids) + mask[:room],
            prompt_cut=len(prompt_ids) < num_prompt,
            completion_cut=num_completion > room,
            prompt_length=num_prompt,
            completion_length=num_completion,
        )

    def _cut(self, script: ChatScript, prompt_ids: list[int], room: int) -> list[int]:
        """So many tokens of a longer prompt; none if what has to stay leaves no room for others."""
        keep_end = self._options.long_prompts == "keep_end"
        kept = self._head(script, prompt_ids) if keep_end else self._tail(script)
        others = room - len(kept)
        if others <= 0:
            return []
        return kept + prompt_ids[len(prompt_ids) - others :] if keep_end else prompt_ids[:others] + kept

    def _head(self, script: ChatScript, prompt_ids: list[int]) -> list[int]:
        """A leading system message or BOS token."""
        if script.row.prompt[0]["role"] == "system" and len(script.row.prompt) > 1:
            with contextlib.suppress(*TEMPLATE_FAILURES):  # some templates refuse a system message alone
                system = self._template.render(script.conversation, 1, asks_next=False)
                system_ids = self._encode_apart(system, script, {})
                if prompt_ids[: len(system_ids)] == system_ids:
                    return system_ids
        return self._own_bos if prompt_ids[:1] == self._own_bos else []

    def _tail(self, script: ChatScript) -> list[int]:
        """What lets the assistant speak after the last message."""
        prompt = script.texts[0]
        tail = self._template.after_last_message(script.conversation, prompt, len(script.row.prompt))
        pieces = self._joints.pieces([prompt[: len(prompt) - len(tail)], tail])
        return self._encode_pieces(script, pieces[1:], {})[0]

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encode_all(self, scripts: Sequence[Script]) -> TokenIds:
        """Token ids of the texts in which nothing is to be kept apart; of a slow tokenizer, for one thread, none."""
        ordinary = [script for script in scripts if isinstance(script, ChatScript) and not script.conversation.literals]
        pieces = dict.fromkeys(piece for script in ordinary for piece in script.pieces)  # several rows of one prompt
        texts = list(dict.fromkeys(chain.from_iterable((end, end + text) if end else (text,) for end, text in pieces)))
        if not texts or not self.tokenizer.is_fast:
            return {}
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}

    def _encode_pieces(self, script: ChatScript, pieces: Sequence[Piece], known: TokenIds) -> list[list[int]]:
        """Token ids of rendered texts that go on, of which some are known."""
        encode = partial(self._encode_apart, script=script, known=known)
        return [self._joints.token_ids(piece, encode) for piece in pieces]

    def _encode_apart(self, text: str, script: ChatScript, known: TokenIds) -> list[int]:
        """Token ids of a rendered text, with what was typed kept apart from control tokens."""
        if script.conversation.literals:
            return self._control.encode(text, script.conversation)
        return known[text] if text in known else self._encode(text)


def require_end_token(tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer by which no completion could say that it is over."""
    if tokenizer.eos_token_id is None:
        problem = "expected a tokenizer with an end-of-sequence token, found one without."
        raise LanguageModelError(name, problem, "Set eos_token, in Python or in tokenizer_config.json.")


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    pending: list[Row] = []
    characters = 0
    for row in rows:
        pending.append(row)
        if isinstance(row, FeedbackRow):
            characters += sum([len(message.get("content") or "") for message in (*row.prompt, *row.completion)])
        if len(pending) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield pending
            pending, characters = [], 0
    yield pending

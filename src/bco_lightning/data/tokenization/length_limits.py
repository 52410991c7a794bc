"""How long a row may be, and what happens to one that is longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bco_lightning.errors import ConfigError, check_choice

LongPrompts = Literal["keep_end", "keep_start", "drop"]
LongCompletions = Literal["cut", "drop"]

# Reasons for which a row is left out; rows are counted under them.
PROMPT_OVER_ITS_LIMIT = "prompt over data.max_prompt_length"
PROMPT_TOO_LONG = "prompt too long (data.max_length)"
COMPLETION_TOO_LONG = "completion too long (data.max_length)"
NO_ROOM_FOR_PROMPT = "no room for a prompt"
NO_ROOM_FOR_COMPLETION = "no room for a completion"


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

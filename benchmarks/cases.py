"""What is compared with what, and what is demanded of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Rival = Literal["trl_bco", "trl_kto", "unwatched"]


@dataclass(frozen=True)
class Case:
    """One comparison: ours and a rival, or ours with nothing to see, on the same rows of SmolLM2-135M, turn by turn.

    Args:
        name: What ``--cases`` calls it.
        batch_size: Rows of an optimizer step.
        completions_per_prompt: Rows that share a prompt; more than 1 turns ``data.group_by_prompt`` on.
        lora: Adapters (r 16, alpha 32, all linear layers) on both sides instead of full fine-tuning.
        reference: ``model.reference_log_probs`` of ours.
        compiled: ``model.compile`` of ours.
        bf16: ``full``: autocast on both sides. ``lora``: ours loads the frozen base in bfloat16, TRL autocasts.
        rival: Environment and trainer of the other side. ``unwatched`` is ours without loggers, monitors and progress
            bar; our own side has all of them then, and logs every step.
        rival_precompute: Whether TRL computes its reference log-probs before the first step too.
        dropped: First steps that do not count.
        min_speed: Demanded tokens/s, as a multiple of the rival's.
        max_memory: Demanded peak memory, as a multiple of the rival's.
        min_share: Demanded share of the machine's matmul ceiling.
    """

    name: str
    batch_size: int
    completions_per_prompt: int = 1
    lora: bool = False
    reference: Literal["before", "online"] = "before"
    compiled: bool = False
    bf16: bool = False
    rival: Rival = "trl_bco"
    rival_precompute: bool = False
    dropped: int = 2
    min_speed: float | None = None
    max_memory: float | None = None
    min_share: float | None = None

    @property
    def products(self) -> str:
        """Data type of the matrix products."""
        return "bfloat16" if self.bf16 else "float32"


FULL_B4 = Case("full-b4-cached", 4, min_speed=1.8, max_memory=0.72, min_share=0.65)
FULL_B8 = Case("full-b8-cached", 8, min_speed=2.7, max_memory=0.5, min_share=0.7)
TWO = replace(FULL_B8, name="full-b8-two", completions_per_prompt=2, min_speed=4.0)
FOUR = replace(FULL_B8, name="full-b8-four", completions_per_prompt=4, min_speed=4.4, max_memory=0.42)
LORA_B4 = Case("lora-b4-float32", 4, lora=True, min_speed=1.8)
WATCHED = Case("watched", 4, lora=True, bf16=True, rival="unwatched", min_speed=1 / 1.02)
LORA_PAIRS = Case("lora-b8-bf16-two", 8, completions_per_prompt=2, lora=True, bf16=True, min_speed=4.5, max_memory=0.35)

CASES = {
    case.name: case
    for case in (
        replace(FULL_B4, name="full-b4-online", reference="online", min_speed=1.4, max_memory=None, min_share=None),
        FULL_B4,
        replace(FULL_B4, name="full-b4-cached-compile", compiled=True, dropped=3, min_speed=2.0),
        replace(FULL_B4, name="full-b4-precompute", rival_precompute=True, min_speed=1.4, max_memory=None),
        replace(FULL_B4, name="full-b4-kto", rival="trl_kto", min_speed=None, max_memory=None),
        replace(FULL_B4, name="full-b4-bf16", bf16=True, min_speed=None, max_memory=None, min_share=None),
        FULL_B8,
        replace(FULL_B8, name="full-b8-cached-compile", compiled=True, dropped=3),
        replace(FULL_B8, name="full-b8-online", reference="online", min_speed=1.9, min_share=None),
        TWO,
        replace(TWO, name="full-b8-two-compile", compiled=True, dropped=3),
        FOUR,
        replace(FOUR, name="full-b8-four-compile", compiled=True, dropped=3, min_speed=5.0),
        LORA_B4,
        replace(LORA_B4, name="lora-b4-bf16", bf16=True, min_speed=2.2),
        WATCHED,
        LORA_PAIRS,
        replace(LORA_PAIRS, name="lora-b8-bf16-two-compile", compiled=True, dropped=3),
    )
}

GROUPS = {
    "all": list(CASES),
    "bars": [
        "full-b8-cached",
        "full-b8-cached-compile",
        "full-b8-online",
        "full-b8-two",
        "full-b8-four",
        "lora-b4-bf16",
        "lora-b8-bf16-two",
        "lora-b8-bf16-two-compile",
    ],
}


def chosen_cases(names: Sequence[str]) -> list[Case]:
    """The cases that the words after ``--cases`` mean, each once.

    Args:
        names: Names of cases and groups.

    Raises:
        SystemExit: If a name is neither.
    """
    unknown = [name for name in names if name not in CASES and name not in GROUPS]
    if unknown:
        raise SystemExit(f"--cases: expected {', '.join([*GROUPS, *CASES])}; found {', '.join(unknown)}.")
    return [CASES[case] for case in dict.fromkeys(case for name in names for case in GROUPS.get(name, [name]))]

"""One point of a growth curve: forward and backward of the log-probs of one batch, in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from workers.turn_taking import memory_mib

HIDDEN = 512
THREADS = 2
REPEATS = 2


def main() -> None:
    """Measures the point on the command line and prints it as JSON."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    point = json.loads(sys.argv[1])
    head_only = point["curve"] == "head"
    step, trained, gradients_mib = (_head_step if head_only else _model_step)(point)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    extra = memory_mib("VmHWM") - before
    seconds = []
    for _ in range(REPEATS):
        for parameter in trained:
            parameter.grad = None
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(seconds), "extra_mib": extra, "net_mib": extra - gradients_mib}))


def _head_step(point: dict[str, Any]) -> tuple[Callable[[], None], list[Tensor], float]:
    """From hidden states to log-probs, both of which and the head's weight get a gradient."""
    num, vocabulary = point["batch"] * point["length"], point["vocabulary"]
    hidden_NH = torch.randn(num, HIDDEN, requires_grad=True)
    weight_VH = (torch.randn(vocabulary, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (num,))

    def step() -> None:
        if point["design"] == "ours":
            from bco_lightning.models.log_probs import token_log_probs

            log_probs_N = token_log_probs(hidden_NH, targets_N, weight_VH)
        else:
            log_probs_N = _gathered((hidden_NH @ weight_VH.T)[None], targets_N[None])[0]
        _loss(log_probs_N.sum()[None]).backward()

    return step, [hidden_NH, weight_VH], vocabulary * HIDDEN * 4 / 2**20


def _model_step(point: dict[str, Any]) -> tuple[Callable[[], None], list[Tensor], float]:
    """From token ids to the log-probs of completions, through a random model."""
    config = LlamaConfig(
        vocab_size=point["vocabulary"],
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    samples = _samples(point)
    step = _our_step(model, samples) if point["design"] == "ours" else _full_logits_step(model, samples)
    # A weight that is embedding and head gets a gradient from each, which are there together for a moment.
    return step, list(model.parameters()), 2 * point["vocabulary"] * HIDDEN * 4 / 2**20


def _samples(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of random tokens: the first as long as the point says, the others from 40 % of it on; half is completion."""
    random = np.random.default_rng(0)
    lengths = [point["length"], *random.integers(int(0.4 * point["length"]), point["length"], point["batch"] - 1)]
    return [
        {
            "input_ids": random.integers(point["vocabulary"], size=length).tolist(),
            "completion_mask": [place >= length // 2 for place in range(length)],
            "thumbs_up": number % 2 == 0,
            "row_id": number,
        }
        for number, length in enumerate(lengths)
    ]


def _our_step(model: LlamaForCausalLM, samples: list[dict[str, Any]]) -> Callable[[], None]:
    from bco_lightning.data.collate import collate
    from bco_lightning.models.fused_layers import fuse_layers
    from bco_lightning.models.layout import set_layout
    from bco_lightning.models.log_probs import completion_log_probs

    set_layout(model, "packed")
    fuse_layers(model.modules())
    batch = collate(samples)
    return lambda: _loss(completion_log_probs(model, batch)).backward()


def _full_logits_step(model: LlamaForCausalLM, samples: list[dict[str, Any]]) -> Callable[[], None]:
    """What TRL 1.13's BCOTrainer computes, in the order in which it does, without its reference."""
    shape = (len(samples), max(len(sample["input_ids"]) for sample in samples))
    ids_BT, attended_BT, mask_BT = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids_BT[row, :length] = torch.tensor(sample["input_ids"])
        attended_BT[row, :length] = 1
        mask_BT[row, :length] = torch.tensor(sample["completion_mask"])
    up = [row for row, sample in enumerate(samples) if sample["thumbs_up"]]
    down = [row for row, sample in enumerate(samples) if not sample["thumbs_up"]]

    def step() -> None:
        logits_BTV = model(ids_BT, attention_mask=attended_BT).logits
        log_probs_BT = _gathered(logits_BTV[:, :-1], ids_BT[:, 1:])
        log_probs_B = (log_probs_BT * mask_BT[:, 1:]).sum(-1)
        # It copies the logits of both classes, for the metrics.
        halves = [(log_probs_B[rows], logits_BTV[rows]) for rows in (up, down)]
        loss = _loss(torch.cat([log_probs for log_probs, _ in halves]))
        for _, logits in halves:
            logits.nansum().item()
        loss.backward()

    return step


def _gathered(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """TRL's ``selective_log_softmax`` in float32."""
    chosen_BT = logits_BTV.gather(-1, targets_BT[..., None])[..., 0]
    # A row at a time, which saves memory.
    return chosen_BT - torch.stack([logits_TV.logsumexp(-1) for logits_TV in logits_BTV])


def _loss(log_probs_B: Tensor) -> Tensor:
    return -logsigmoid(0.1 * (log_probs_B - log_probs_B.detach())).mean()


if __name__ == "__main__":
    main()

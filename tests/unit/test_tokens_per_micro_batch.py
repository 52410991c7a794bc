"""Micro-batches counted in tokens: the same rows and gradients in every step, however many tokens they may have."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.batch import micro_batches_of
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.callbacks.step_callback import StepCallback
from bco_lightning.cli.plan import plan_command
from bco_lightning.data.collate import collate_cut
from bco_lightning.data.order import cut
from bco_lightning.errors import ConfigError
from bco_lightning.models.memory import PlanOptions, memory_of, tokens_within
from tests.distributed.runs import Gradients
from tests.reliability.tiny_run import assert_same, make_model, tiny_fit

TOKENS = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model of 30,000 weights; 24 rows of 8 prompts, three answers each, a third of them thumbs-down."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = [
        {"prompt": f"question {n // 3}", "completion": "ab " * (1 + 5 * n % 13) + str(n), "label": n % 3 != 0}
        for n in range(24)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_model(folder / "model"), str(folder / "log.jsonl")


class Micro(Gradients):
    """Keeps gradients, and tokens that were computed at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.computed += [part.num_computed for part in micro_batches_of(batch)]


def run(files: tuple[str, str], steps: int = 3, keep: Any = (), resume: Any = None, **options: Any) -> Any:
    seen = Micro()
    names = ("tokens_per_micro_batch", "group_by_prompt", "validation_files")
    of_data = {name: options.pop(name) for name in names if name in options}
    trainer = {"max_steps": steps, "max_epochs": -1, **options.pop("trainer", {})}
    how = {"trainer_options": trainer, "module_options": options, "data_options": of_data}
    state = tiny_fit(*files, callbacks=[seen, *keep], ckpt_path=resume, **how)
    return seen, state


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    most=st.integers(1, 30),
    padded=st.booleans(),
    at_once=st.sampled_from([1, 2, 3]),
)
def test_a_cut_takes_rows_in_order_as_many_as_fit_and_a_longer_one_alone(
    lengths: list[int], most: int, padded: bool, at_once: int
) -> None:
    ends = sorted({*range(at_once, len(lengths), at_once), len(lengths)})

    def computed(some: list[int]) -> int:
        return len(some) * max(some) if padded else sum(some)

    parts = cut(lengths, most, padded=padded, ends=np.array(ends))
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        assert part.stop in ends
        is_one = part.stop == next(end for end in ends if end > part.start)
        assert computed(lengths[part]) <= most or is_one
        if part.stop < len(lengths):
            following = next(end for end in ends if end > part.stop)
            assert computed(lengths[part.start : following]) > most


def test_shared_prompts_count_once_pairs_and_prompts_stay_together() -> None:
    def rows(*prompts: int) -> list[dict[str, Any]]:
        return [
            {
                "input_ids": [prompt] * 6 + [9, number], "completion_mask": [False] * 6 + [True] * 2,
                "thumbs_up": number % 2 == 0, "row_id": number, "prompt_key": prompt,
            }
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip

    def cut_of(samples: Any, most: int, **options: Any) -> list[list[int]]:
        usual = {"padded": False, "whole_prompts": False, "share_prompts": True, "paired": False}
        parts = collate_cut(samples, most_tokens=most, **{**usual, **options})
        return [part.row_ids_B.tolist() for part in parts], [part.num_computed for part in parts]

    samples = rows(1, 1, 1, 2, 2, 3)
    assert cut_of(samples, 12) == ([[0, 1, 2], [3, 4], [5]], [12, 10, 8])
    assert cut_of(samples, 20) == ([[0, 1, 2, 3], [4, 5]], [20, 16])
    assert cut_of(samples, 20, whole_prompts=True) == ([[0, 1, 2], [3, 4, 5]], [12, 18])
    assert cut_of(samples, 20, share_prompts=False) == ([[0, 1], [2, 3], [4, 5]], [16, 16, 16])
    assert cut_of(samples, 24, share_prompts=False, paired=True) == ([[0, 1], [2, 3], [4, 5]], [16, 16, 16])
    assert cut_of(samples, 5, paired=True)[0] == [[0, 1], [2, 3], [4, 5]]  # a longer pair is alone
    halves = cut_of([*samples, *samples[1:], samples[0]], 20, with_unrelated=True)
    assert halves == cut_of(samples, 20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "padded"},
        {"objective": "kto"},
        {"objective": "dpo"},
        {"reward_shift": "per_prompt", "group_by_prompt": True},
        {"trainer": {"precision": "bf16-mixed"}},
    ],
    ids=str,
)
def test_gradients_and_weights_are_those_of_steps_that_are_not_cut(
    options: dict[str, Any], files: tuple[str, str], tmp_path: Path
) -> None:
    if options.get("objective") == "dpo":
        rows = [{"prompt": f"q{n}", "chosen": "yes " * (n % 5 + 1), "rejected": "no " * (n % 4 + 2)} for n in range(12)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = files[0], str(tmp_path / "pairs.jsonl")
    (whole, then), (parts, now) = run(files, **options), run(files, **options, tokens_per_micro_batch=TOKENS)
    assert len(whole.computed) == 3 < len(parts.computed)
    assert max(parts.computed) <= TOKENS
    assert {step: sorted(rows) for step, rows in now["rows"].items()} == {
        step: sorted(rows) for step, rows in then["rows"].items()
    }
    rounding = 5e-2 if "trainer" in options else 1e-5
    for one, other in zip(whole.of_step, parts.of_step, strict=True):
        for name in one:
            assert float((one[name] - other[name]).norm()) <= rounding * max(1e-3, float(one[name].norm())), name
    assert now["shift"]["value"] == pytest.approx(then["shift"]["value"], rel=1e-2 if "trainer" in options else 1e-4)


def test_the_gradient_of_a_cut_step_is_that_of_the_loss_in_float64(files: tuple[str, str]) -> None:
    seen, state = run(files, steps=1, lora=None, tokens_per_micro_batch=TOKENS)
    module, model = BCOModule(files[0], lora=None), AutoModelForCausalLM.from_pretrained(files[0]).double()
    log, tokenizer = [json.loads(line) for line in Path(files[1]).read_text().splitlines()], module.tokenizer
    for number in state["rows"][0]:
        prompt = [{"role": "user", "content": log[number]["prompt"]}]
        chat = [*prompt, {"role": "assistant", "content": log[number]["completion"]}]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n"))["input_ids"]
        first = len(tokenizer(start)["input_ids"])
        log_probs = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
        log_prob = log_probs.gather(-1, torch.tensor(ids[first:])[:, None]).sum()
        sign, weight = (1, 24 / 16) if log[number]["label"] else (-1, 24 / 8)
        reward = module.beta * (log_prob - log_prob.detach())
        (-weight * torch.nn.functional.logsigmoid(sign * reward) / 8).backward()
    [gradient] = seen.of_step
    exact = {name: p.grad for name, p in model.named_parameters()}
    for name, found in gradient.items():
        expected = exact[name.removeprefix("_policy.")]
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-5, name


def test_a_run_on_another_device_goes_on_to_the_bit_with_the_tokens_that_auto_took_before(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(BCOModule, "tokens_that_fit", lambda _: 90)
    keeper = RunCheckpoint(every_n_steps=2, keep=5)
    keeper.run_folder = str(tmp_path)
    _, straight = run(files, steps=4, keep=[keeper], tokens_per_micro_batch="auto")
    assert "at the peak of a step of at most 90 tokens a micro-batch" in caplog.text
    monkeypatch.setattr(BCOModule, "tokens_that_fit", lambda _: 9999)
    resume = str(tmp_path / "checkpoints" / "step-00000002")
    seen, resumed = run(files, steps=4, resume=resume, tokens_per_micro_batch="auto")
    assert max(seen.computed) <= 90
    assert_same(resumed["weights"], straight["weights"])
    assert_same(resumed["moments"], straight["moments"])
    seen, other = run(files, steps=4, resume=resume, tokens_per_micro_batch=120)  # that is said, and allowed
    assert 90 < max(seen.computed) <= 120
    assert "data.tokens_per_micro_batch: 90 then, 120 now" in caplog.text
    assert all(torch.allclose(other["weights"][name], value, atol=1e-4) for name, value in straight["weights"].items())


def test_longer_rows_are_told_once_and_held_out_rows_are_scored_as_in_whole_micro_batches(
    files: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    validating = {"trainer": {"val_check_interval": 1}, "validation_files": files[1]}
    (_, whole), (seen, cut_up) = (run(files, steps=1, **validating, tokens_per_micro_batch=n) for n in (None, 60))
    longer = [tokens for tokens in seen.computed if tokens > 60]
    assert longer
    [told] = re.findall(r"at most 60 tokens a micro-batch \((\d+) rows are longer, and alone\)", caplog.text)
    assert len(longer) <= int(told) < 24
    assert cut_up["values"][1]["val/loss"] == pytest.approx(whole["values"][1]["val/loss"], rel=1e-5)
    assert cut_up["values"][1]["val/auroc"] == pytest.approx(whole["values"][1]["val/auroc"], abs=1e-3)


class Waits(StepCallback):
    """Counts what would wait for a GPU from the moment that a batch is there until the optimizer moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_step: list[list[str]] = []
        waits = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if call in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                    waits.of_step[-1].append(str(call))  # item(), bool(), int(), choosing by a mask
                return call(*args, **(kwargs or {}))

        self.mode: Any = Mode
        for name in ("cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        self.entered: Any = None

    def counted(self, name: str, act: Any) -> Any:
        def counting(tensor: Any, *args: Any) -> Any:
            if self.entered is not None:
                self.of_step[-1].append(name)
            return act(tensor, *args)

        return counting

    def on_train_batch_start(self, *_: Any) -> None:
        self.of_step.append([])
        self.entered = self.mode()
        self.entered.__enter__()

    def on_before_step(self, *_: Any) -> None:
        self.entered.__exit__(None, None, None)
        self.entered = None


@pytest.mark.parametrize("options", [{"lora": LoraSettings(r=4, alpha=8)}, {"objective": "kto"}], ids=str)
def test_a_step_waits_for_the_device_once_however_many_micro_batches_it_has(
    options: dict[str, Any], files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits(monkeypatch)
    run(files, steps=1, keep=[waits], tokens_per_micro_batch=TOKENS, **options)
    [found] = waits.of_step
    assert found[0] == "cpu"  # the sums of a step come to the host; what follows makes numbers of them there
    assert found.count("cpu") == 1


def test_auto_fits_the_memory_by_the_formula_of_plan(
    files: tuple[str, str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PlanOptions(files[0], 1, "ddp", max_length=64)
    room = sum(memory_of(PlanOptions(files[0], 1, "ddp", max_length=64, batch_size=20)).values())
    assert tokens_within(room, options) == 20 * 64
    assert tokens_within(room - 1, options) == 19 * 64
    assert tokens_within(0, options) == 0
    plan_command(model=files[0], max_length=64, gpu_memory=1.25 * room / 2**30, strategy="ddp")
    assert "(data.tokens_per_micro_batch: auto): 1,280" in capsys.readouterr().out
    caplog.set_level(logging.INFO)
    run(files, steps=1, tokens_per_micro_batch="auto")
    assert "at the peak of a step of at most 4,096 tokens a micro-batch" in caplog.text


def test_accumulation_beside_it_is_refused_with_the_rows_to_ask_for(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"expected 1 with data\.tokens_per_micro_batch.*Set data\.batch_size: 32"):
        run(files, tokens_per_micro_batch=64, trainer={"accumulate_grad_batches": 4})

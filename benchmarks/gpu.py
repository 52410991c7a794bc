"""One GPU, at most eight minutes: are the numbers right there, and how fast is it?

    python benchmarks/gpu.py                        # an H100 or H200; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny                 # the same paths on a CPU, in a minute or two
    python benchmarks/gpu.py --parts numerics LoRA  # some of them

No model file and no network is needed: models are random, in the shapes of Llama 3. What fails is noted and the rest
goes on; what is found is on disk at once, the most wanted first. Tokens count once for each row; MFU is of
`UsefulFlops`, against what the data sheet of an H100 or H200 says of dense bfloat16. Where TRL 1.16 is installed, its
KTO trainer runs too, on rows that are tokens already.
"""

# ruff: noqa: E402 - what the environment says has to stand before torch is imported

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

began = time.time()  # imports count too
os.environ.update({"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"})
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one process, perhaps without a network
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from tests.reliability.tiny_run import assert_same, byte_tokenizer, make_log, make_model, tiny_fit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from bco_lightning.batch import FeedbackBatch
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.data.collate import collate
from bco_lightning.models import attention, build
from bco_lightning.models.layout import set_layout
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import prepare
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.module import BCOModule
from bco_lightning.options import LoraSettings
from bco_lightning.reference.model import Reference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200": 989e12}
PEAK = PEAKS.get(torch.cuda.get_device_name().removeprefix("NVIDIA ") if CUDA else "")
SHAPES = {  # hidden size, feed-forward size, layers, heads, heads of keys, vocabulary, tied
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "small": (1024, 2816, 6, 16, 4, 32000, False),
    "tiny": (64, 160, 2, 8, 2, 512, False),
}
WARM = 3  # steps that do not count
TRL = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else ""
STEP, KTO = "TRL 1.13's step", f"TRL {TRL}'s KTO"
results: dict[str, dict[str, Any]] = {}


def note(name: str, **values: Any) -> None:
    """Prints a figure and writes all there are."""
    results[name] = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    print(f"[{time.time() - began:4.0f} s] {name}: {results[name]}", flush=True)
    Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def require_time() -> None:
    """Refuses to begin anything once time is up."""
    if time.time() - began > 60 * arguments.minutes:
        raise TimeoutError("no time left")


def now() -> float:
    """Seconds, when everything that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


# --- models and rows


def random_model(shape: str, dtype: torch.dtype, lora: bool = False, device: torch.device = DEVICE) -> Any:
    """A random Llama; with adapters in float32, as PEFT makes them."""
    hidden, wide, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=16384,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    if lora:
        model = get_peft_model(model, adapters())
    return model.to(device).eval()


def adapters() -> LoraConfig:
    """The adapters of every side."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def made_rows(lengths: Sequence[int], shape: str, seed: int, per_prompt: int = 1) -> list[dict[str, Any]]:
    """Rows of random tokens, a quarter to a half of each its completion; so many neighbours have one prompt."""
    drawn, rows, prompt, vocabulary = torch.Generator().manual_seed(seed), [], [], SHAPES[shape][5]
    for number, length in enumerate(lengths):
        answer = max(2, int(length * (0.25 + 0.25 * torch.rand(1, generator=drawn).item())))
        if number % per_prompt == 0:
            prompt = torch.randint(5, vocabulary, (max(2, length - answer),), generator=drawn).tolist()
        ids = prompt + torch.randint(5, vocabulary, (answer,), generator=drawn).tolist()
        mask = [False] * len(prompt) + [True] * answer
        rows.append({"input_ids": ids, "completion_mask": mask, "thumbs_up": number % 2 == 0, "row_id": number})
    return rows


def varied(longest: int, count: int, seed: int, least: float = 0.25) -> list[int]:
    """Lengths, by default from a quarter of the longest on."""
    shares = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [max(8, int(longest * share)) for share in (least + (1 - least) * shares).tolist()]


@contextmanager
def row_by_row() -> Iterator[None]:
    """Attention as it is where there is no kernel for all rows."""
    before = attention._has_kernel_for_all
    attention._has_kernel_for_all = lambda *heads: False
    try:
        yield
    finally:
        attention._has_kernel_for_all = before


# --- is it right?


def environment() -> None:
    """What the machine is, its matrix products, and what a length costs that attention has not seen before."""
    device: dict[str, Any] = {"device": "CPU"}
    if CUDA:
        sizes = torch.cuda.get_device_properties(DEVICE)
        device = {"device": sizes.name, "gib": sizes.total_memory / 2**30, "cudnn": torch.backends.cudnn.version()}
    libraries = ("transformers", "peft", "lightning", *(("trl",) if TRL else ()))
    note("environment", **device, torch=torch.__version__, **{n: importlib.metadata.version(n) for n in libraries})
    side = 8192 if CUDA else 512
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    for repeats in (3, 20):
        start = now()
        for _ in range(repeats):
            a @ a
        rate = 2 * side**3 * repeats / (now() - start)
    note(f"matrix product {side}", tflops=rate / 1e12)
    for backend in (True, False) if CUDA else ():
        kernels = [SDPBackend.CUDNN_ATTENTION] if backend else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        first, again = [], []
        for length in range(301, 309):
            q = torch.randn(1, 4096 + length, 32, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            q = q[:, :, :length].requires_grad_()
            for times in (first, again):
                start = now()
                with sdpa_kernel(kernels):
                    scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
                times.append(1e3 * (now() - start))
        found = {"first_ms": sorted(first)[4], "again_ms": sorted(again)[4]}
        note(f"SDPA of one row, {'with' if backend else 'without'} cuDNN", **found)


def alone(model: Any, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Log-probs from whole logits, one row at a time."""
    found = []
    for row in rows:
        ids, mask = (torch.tensor(row[key], device=DEVICE) for key in ("input_ids", "completion_mask"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append((logits.gather(1, ids[1:, None])[:, 0] - logits.logsumexp(-1))[mask[1:]].sum())
    return torch.stack(found)


def gradient_of(model: Any, log_probs_B: Tensor) -> Tensor:
    """Of a sum of log-probs, in all that is trained."""
    model.zero_grad()
    weights_B = torch.linspace(-1, 1, len(log_probs_B), device=DEVICE, dtype=torch.float64)
    (log_probs_B.double() * weights_B).sum().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def numerics(shape: str, longest: int) -> None:
    """Against float64. Expected of float32: 5e-4 and 1e-4; of packed bfloat16: no worse than rows alone.

    ``prepared`` is what a run does: fused layers and adapters, and the layout that its check at the start leaves.
    """
    for per_prompt, lora, dtype in product((1, 2), (False, True), (torch.float32, torch.bfloat16)):
        rows = made_rows(varied(longest, 8, 1), shape, 1, per_prompt)
        batch = collate(rows).to(DEVICE)
        model = random_model(shape, dtype, lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # at 0 the gradient would be that of half the adapter
                torch.nn.init.normal_(weight, std=0.02)
        exact = copy.deepcopy(model).double()
        wanted_B = alone(exact, rows)
        wanted = gradient_of(exact, wanted_B)
        kind = f"{str(dtype)[6:]}{', LoRA' if lora else ''}{', shared prompts' if per_prompt > 1 else ''}"
        for layout in ("alone", "padded", "row by row", "packed", "prepared"):
            try:
                if layout == "prepared":
                    layout += f" ({prepare(model).layout})"
                else:
                    set_layout(model, layout if layout in ("alone", "padded") else "packed")
                with row_by_row() if layout == "row by row" else nullcontext():
                    found_B = alone(model, rows) if layout == "alone" else completion_log_probs(model, batch)
                    found = gradient_of(model, found_B)
                note(
                    f"{kind}, {layout}",
                    log_prob_rms=float((found_B.double() - wanted_B).square().mean().sqrt()),
                    gradient=float((found - wanted).norm() / wanted.norm()),
                )
            except Exception as error:
                note(f"{kind}, {layout}", failed=f"{type(error).__name__}: {str(error)[:200]}")


def first_reward(shape: str, longest: int) -> None:
    """Policy and reference are equal at first: the log-ratio is 0 to the bit; in other batches it is rounding."""
    rows = made_rows(varied(longest, 8, 2), shape, 2, 2)
    batch, *halves = (collate(part).to(DEVICE) for part in (rows, rows[:4], rows[4:]))
    kinds = (("LoRA bfloat16", True, torch.bfloat16, False), ("LoRA bf16-mixed", True, torch.float32, True),
             ("LoRA bfloat16 under bf16-mixed", True, torch.bfloat16, True))  # fmt: skip
    for kind, lora, dtype, mixed in (*kinds, ("full bf16-mixed", False, torch.float32, True)):
        with random_policy(shape, dtype, lora):
            module = our_module(shape, lora, dtype)
            module.reference.own_model = None if lora else copy.deepcopy(module.policy).requires_grad_(False)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
                rows_B = module(batch)[1]
                cut_B = torch.cat([module(half)[1].policy_log_probs_B for half in halves])
        note(
            f"first log-ratio, {kind}",
            same_batch=float((rows_B.policy_log_probs_B - rows_B.reference_log_probs_B).abs().max()),
            other_batches_rms=float((rows_B.policy_log_probs_B - cut_B).square().mean().sqrt()),
        )


def resume() -> None:
    """A run that is cut ends with the weights, moments and shift of one that is not, to the bit."""
    for precision in ("32-true", "bf16-mixed"):
        place = Path(tempfile.mkdtemp())
        model, log = make_model(place / "model"), make_log(place / "log.jsonl")
        options = {"accelerator": DEVICE.type, "default_root_dir": str(place), "precision": precision}
        try:
            whole = tiny_fit(model, log, callbacks=[RunCheckpoint(every_n_steps=7, keep=10)], trainer_options=options)
            step = next(path for path in sorted(place.rglob("*")) if path.is_dir() and path.name.endswith("0000007"))
            options["default_root_dir"] = str(place / "again")
            again = tiny_fit(model, log, ckpt_path=str(step), trainer_options=options)
            for key in ("weights", "moments", "shift"):
                assert_same(whole[key], again[key], key)
            note(f"resume, {precision}", same_to_the_bit=True)
        except Exception as error:  # an assertion that says by how much
            note(f"resume, {precision}", failed=f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            torch.use_deterministic_algorithms(False)


# --- how fast?


class Clock(Callback):
    """Seconds from the end of the last step that does not count to that of the last, and all losses."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.ends: list[float] = []

    def tell(self, steps: int, of: int) -> None:
        """Says how many of the steps are done."""
        if steps in (WARM, of):
            self.ends.append(now())
        if CUDA and steps == WARM:
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, *told: Any) -> None:
        """Keeps the loss."""
        self.losses.append(told[1]["loss"].detach())
        self.tell(trainer.global_step, trainer.max_steps)

    @property
    def seconds(self) -> float:
        """Of the steps that count."""
        return self.ends[1] - self.ends[0]


@contextmanager
def random_policy(shape: str, dtype: torch.dtype, lora: bool) -> Iterator[None]:
    """Within it a module gets a random model, which nobody has to write to a disk."""
    before = build.load_policy, Reference.digest, Reference.hold
    build.load_policy = lambda *_told, **_how: random_model(shape, dtype, lora)
    Reference.digest = property(lambda self: "random")
    Reference.hold = lambda self: None  # batches bring its log-probs, or it is the policy without its adapter
    try:
        yield
    finally:
        build.load_policy, Reference.digest, Reference.hold = before


def our_module(shape: str, lora: bool, dtype: torch.dtype, **options: Any) -> BCOModule:
    """The module as a run has it."""
    module = BCOModule(
        shape, lora=LoraSettings() if lora else None, dtype=str(dtype)[6:], class_weights="none", warmup_ratio=0.0,
        lr_schedule="constant_with_warmup", reference_log_probs="online", **options,
    )  # fmt: skip
    module._tokenizer = byte_tokenizer()
    return module.to(DEVICE)


def ours(shape: str, lora: bool, batches: list[FeedbackBatch], **options: Any) -> tuple[float, list[float], str]:
    """Seconds of the steps that count, of Lightning's own loop, all losses, and how rows went through the policy."""
    dtype, clock = options.pop("dtype", torch.bfloat16 if lora else torch.float32), Clock()
    precision = options.pop("precision", "32-true" if dtype == torch.bfloat16 else "bf16-mixed")
    trainer = Trainer(
        accelerator=DEVICE.type, devices=1, strategy=options.pop("strategy", "auto"), precision=precision,
        max_steps=len(batches), max_epochs=1, gradient_clip_val=1.0, callbacks=[clock, *options.pop("callbacks", ())],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.strategy.teardown = lambda: None  # it would copy all that is on the card to the CPU
    with random_policy(shape, dtype, lora):
        module = our_module(shape, lora, dtype, **options)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=CUDA))
    return clock.seconds, [float(loss) for loss in clock.losses], module.said_of_rows


def theirs(shape: str, lora: bool, groups: list[list[dict[str, Any]]], cached: bool) -> float:
    """Seconds of TRL 1.13's step in plain PyTorch: right padding, whole float32 logits, checkpointing, its default.

    As on our side, cuDNN's attention is off, which would make a plan for each of its shapes: TRL is the faster for it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = random_model(shape, torch.bfloat16 if lora else torch.float32, lora).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, delta, clock = torch.optim.AdamW(trained, lr=1e-5, fused=True), 0.0, Clock()

    def log_probs(ids: Tensor, attended: Tensor, scored: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits.float()
        at_target = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        of_tokens = at_target - torch.stack([row.logsumexp(-1) for row in logits[:, :-1]])
        return (of_tokens * scored[:, 1:]).sum(-1), logits[up], logits[~up]  # it copies both, to log their sums

    for number, rows in enumerate(groups):
        longest = max(len(row["input_ids"]) for row in rows)
        kinds = ([row["input_ids"] for row in rows], [[1] * len(row["input_ids"]) for row in rows])
        inputs = [
            torch.tensor([[*map(int, each), *[0] * (longest - len(each))] for each in kind], device=DEVICE)
            for kind in (*kinds, [row["completion_mask"] for row in rows])
        ]
        up = torch.tensor([row["thumbs_up"] for row in rows], device=DEVICE)
        policy, *logits = log_probs(*inputs, up)
        reference = policy.detach()
        if not cached:
            with torch.no_grad(), model.disable_adapter() if lora else nullcontext():
                reference = log_probs(*inputs, up)[0]
        rewards = 0.1 * (policy - reference)
        delta = 0.9 * delta + 0.1 * rewards.detach().mean()
        loss = (-logsigmoid(torch.where(up, rewards - delta, delta - rewards))).mean()
        sum(each.detach().nansum().item() for each in logits)
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tell(number + 1, len(groups))
    return clock.seconds


def kto(shape: str, lora: bool, groups: list[list[dict[str, Any]]], cached: bool) -> float:
    """Seconds of the steps that count of TRL 1.16's KTO trainer, with the loss that needs no second pass; as above."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer import kto_trainer

    torch.backends.cuda.enable_cudnn_sdp(False)
    clock = Clock()

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            clock.tell(state.global_step, len(groups))

    class OfTokens(kto_trainer.KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *told: Any, **how: Any) -> Any:
            return dataset

        _precompute_ref_logps = _prepare_dataset

    def row_of(row: dict[str, Any]) -> dict[str, Any]:
        ids, start = row["input_ids"], row["completion_mask"].index(True)
        columns = {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": row["thumbs_up"]}
        return columns | ({"ref_logps": -3000.0} if cached else {})

    kto_trainer.hash_module = lambda model: "random"  # it would copy the model to the CPU
    options = kto_trainer.KTOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="apo_zero_unpaired", max_length=None, max_steps=len(groups),
        per_device_train_batch_size=len(groups[0]), precompute_ref_log_probs=cached, bf16=True, learning_rate=1e-5,
        lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=not CUDA, dataloader_pin_memory=CUDA,
    )  # fmt: skip
    trainer = OfTokens(
        model=random_model(shape, torch.bfloat16 if lora else torch.float32), args=options,
        train_dataset=Dataset.from_list([row_of(row) for rows in groups for row in rows]),
        processing_class=byte_tokenizer(), callbacks=[Tell()], peft_config=adapters() if lora else None,
    )  # fmt: skip
    trainer.train()
    return clock.seconds


def known(batch: FeedbackBatch) -> FeedbackBatch:
    """With log-probs under the reference, as after the pass before the first step."""
    return replace(batch, reference_log_probs_B=torch.full((len(batch),), -3000.0))


def speed(
    shape: str, lora: bool, longest: int, count: int, ways: Sequence[str], cached: bool = True, least: float = 0.25
) -> None:
    """Tokens a second, MFU and peak memory of each way."""
    groups = [made_rows(varied(longest, count, number, least), shape, number) for number in range(WARM + 5)]
    batches = [known(collate(rows)) if cached else collate(rows) for rows in groups]
    useful = UsefulFlops.of(random_model(shape, torch.bfloat16, lora, torch.device("meta")))
    tokens, flops = (sum(map(count_of, batches[WARM:])) for count_of in (lambda b: b.num_tokens, useful.of_batch))
    again: dict[str, Any] = {"gradient_checkpointing": True}
    options: dict[str, dict[str, Any]] = {
        "compiled": {"compile": True},
        "checkpointing": again,
        "compiled, checkpointing": {"compile": True, **again},
        "selective": {"gradient_checkpointing": "selective"},
        "bfloat16 rounded at random": {"dtype": torch.bfloat16, "optimizer": "adamw_bf16", **again},
        "fsdp2": {"strategy": "fsdp2"},
        "fsdp2, rounded at random": {"strategy": "fsdp2", "dtype": torch.bfloat16, "optimizer": "adamw_bf16"},
    }
    for way in (way for way in ways if way != KTO or TRL):
        online = "" if cached else ", reference online"
        label, said = f"{shape} {'LoRA' if lora else 'full'}, {count} rows to {longest}{online}: {way}", "padded"
        try:
            require_time()
            if way in (STEP, KTO):
                seconds = {STEP: theirs, KTO: kto}[way](shape, lora, groups, cached)
            else:
                with row_by_row() if way == "row by row" else nullcontext():
                    seconds, _, said = ours(shape, lora, batches, **options.get(way, {}))
            gib = {name: getattr(torch.cuda, f"max_memory_{name}")() / 2**30 for name in ("allocated", "reserved")}
            share = flops / seconds / PEAK if PEAK else None
            note(label, tokens_per_second=tokens / seconds, mfu=share, **gib, said=said)
        except Exception as error:
            note(label, failed=f"{type(error).__name__}: {str(error)[:200]}")
        forget()


def forget() -> None:
    """Gives back what the last way held, on the card and in the compiler."""
    gc.collect()
    torch.compiler.reset()
    if CUDA:
        torch.cuda.empty_cache()


def table() -> str:
    """The speeds in Markdown, each beside the first rival's in the same case."""
    lines = ["| case | way | tokens/s | of TRL 1.13 | MFU | GiB allocated | of TRL 1.13 |", "|---" * 7 + "|"]
    for label, found in results.items():
        if "tokens_per_second" not in found:
            continue
        (case, way), rival = label.split(": "), results.get(f"{label.split(': ')[0]}: {STEP}", {})
        times = (found[key] / rival[key] if rival.get(key) else None for key in ("tokens_per_second", "allocated"))
        faster, smaller = (f"{each:.2f}" if each else "" for each in times)
        share = f"{found['mfu']:.1%}" if found["mfu"] else ""
        rate, gib = f"{found['tokens_per_second']:,.0f}", f"{found['allocated']:.1f}"
        lines.append(f"| {case} | {way} | {rate} | {faster} | {share} | {gib} | {smaller} |")
    return "\n".join(lines)


def fsdp2(shape: str, longest: int) -> None:
    """Losses under FSDP2 with one process are those of one process."""
    batches = [known(collate(made_rows(varied(longest, 4, number), shape, number))) for number in range(6)]
    for lora, precision in ((False, "bf16-mixed"), (False, "32-true"), (True, "32-true")):
        one, cut = (
            ours(shape, lora, batches, strategy=strategy, precision=precision)[1] for strategy in ("auto", "fsdp2")
        )
        forget()
        difference = max(abs(a - b) for a, b in zip(one, cut, strict=True))
        note(
            f"fsdp2 with one process, {'LoRA' if lora else 'full'} {precision}", largest_difference_of_losses=difference
        )


class Waits(Callback):
    """Has PyTorch tell of each wait for the device, from the last step that does not count to the last step."""

    def on_train_batch_start(self, trainer: Any, *told: Any) -> None:
        """Begins; training waits nowhere else."""
        if CUDA and trainer.global_step == WARM:
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, *told: Any) -> None:
        """Ends, before losses are looked at."""
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def waits(shape: str, longest: int) -> None:
    """How often the host waits for the device in a step, by PyTorch's own account, and where; once is meant."""
    batches = [known(collate(made_rows(varied(longest, 4, number), shape, number))) for number in range(WARM + 5)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            ours(shape, True, batches, callbacks=[Waits()])
        finally:
            Waits().on_train_end()  # where it failed amid a step
    waited = [each for each in told if "called a synchronizing" in str(each.message)]
    found = [f"{Path(each.filename).name}:{each.lineno}" for each in waited]
    places = dict(Counter(found).most_common(5))
    note("waits for the device", of_each_step=len(found) / 5 if CUDA else "not counted", places=places)


def main() -> None:
    """Runs the parts asked for, the most wanted first."""
    small, middle, large = ("tiny",) * 3 if arguments.tiny else ("small", "1B", "8B")
    scale = 32 if arguments.tiny else 1
    usual = ("packed", STEP, KTO, "checkpointing")
    compiled = ("compiled", "compiled, checkpointing") if CUDA else ()
    sharded = ("fsdp2", "fsdp2, rounded at random")  # last: a process that was told its rank stays a rank for TRL
    parts: dict[str, Callable[[], None]] = {
        "environment": environment,
        "reward": lambda: first_reward(small, 1024 // scale),
        "numerics": lambda: numerics(small, 1024 // scale),
        "LoRA": lambda: speed(large, True, 2048 // scale, 4, usual),
        "full": lambda: speed(middle, False, 2048 // scale, 4, usual),
        "LoRA long": lambda: speed(large, True, 8192 // scale, 2, usual, least=1),
        "full long": lambda: speed(middle, False, 8192 // scale, 2, usual, least=1),
        "LoRA short": lambda: speed(large, True, 512 // scale, 8, usual),
        "full short": lambda: speed(middle, False, 512 // scale, 8, usual),
        "resume": resume,
        "waits": lambda: waits(small, 512 // scale),
        "8B full": lambda: speed(large, False, 2048 // scale, 2, ("bfloat16 rounded at random",)),
        "LoRA online": lambda: speed(large, True, 2048 // scale, 4, usual[:3], cached=False),
        "fsdp2": lambda: fsdp2(small, 512 // scale),
        "more ways": lambda: speed(middle, False, 2048 // scale, 4, ("row by row", "selective", *sharded)),
        "more ways of LoRA": lambda: speed(large, True, 2048 // scale, 4, ("row by row", *compiled)),
    }
    if unknown := set(arguments.parts or ()) - set(parts):
        raise SystemExit(f"--parts: expected {', '.join(parts)}; found {', '.join(sorted(unknown))}.")
    for name in (name for name in parts if name in (arguments.parts or parts)):
        try:
            require_time()
            parts[name]()
        except Exception as error:
            traceback.print_exc()
            note(name, failed=f"{type(error).__name__}: {str(error)[:200]}")
        forget()
    print(table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows, on a CPU too")
    parser.add_argument("--parts", nargs="*", help="some parts alone, in the order of all")
    parser.add_argument("--minutes", type=float, default=6.5, help="after which nothing more is begun")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "gpu.json"))
    arguments = parser.parse_args()
    main()

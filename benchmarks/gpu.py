"""One GPU, at most eight minutes: are the numbers right there, and how fast is it?

    python benchmarks/gpu.py                        # an H100 or H200; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny                 # the same paths on a CPU, in a minute or two
    python benchmarks/gpu.py --parts numerics speed # some of them

No model file and no network is needed: models are random, in the shapes of Llama 3. What fails is noted and the rest
goes on. Tokens count once for each row; TFLOPS and MFU are of `UsefulFlops`, against the 989 TFLOPS of an H100.
"""

# ruff: noqa: E402 - what the environment says has to stand before torch is imported

from __future__ import annotations

import argparse
import copy
import gc
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
from pathlib import Path
from typing import Any

os.environ.update({"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"})
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from tests.reliability.tiny_run import byte_tokenizer, make_log, make_model, tiny_fit
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from bco_lightning.batch import FeedbackBatch
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.data.collate import collate
from bco_lightning.models import attention, build
from bco_lightning.models.layout import set_layout
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.module import BCOModule
from bco_lightning.options import LoraSettings
from bco_lightning.reference.model import Reference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
H100 = 989e12  # dense bfloat16 of the SXM card, by its data sheet
SHAPES = {  # hidden size, feed-forward size, layers, heads, heads of keys, vocabulary, tied
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "small": (1024, 2816, 6, 16, 4, 32000, False),
    "tiny": (64, 160, 2, 8, 2, 512, False),
}
WARM = 3  # steps that do not count
results: dict[str, dict[str, Any]] = {}
began = time.time()


def note(name: str, **values: Any) -> None:
    """Prints a figure and keeps it for the file."""
    results[name] = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    print(f"[{time.time() - began:4.0f} s] {name}: {results[name]}", flush=True)


def now() -> float:
    """Seconds, when everything that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


# --- models and rows


def random_model(shape: str, dtype: torch.dtype, lora: bool = False) -> Any:
    """A random Llama on the device; with adapters in float32, as PEFT makes them."""
    hidden, wide, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=16384,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model.to(DEVICE).eval()


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


def varied(longest: int, count: int, seed: int) -> list[int]:
    """Lengths from a quarter of the longest on."""
    shares = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [max(8, int(longest * share)) for share in (0.25 + 0.75 * shares).tolist()]


@contextmanager
def row_by_row(cudnn: bool) -> Iterator[None]:
    """Attention as it is where there is no kernel for all rows; with cuDNN's kernels, or without."""
    before, kernels = attention._has_kernel_for_all, attention._KERNELS
    attention._has_kernel_for_all = lambda query: False
    attention._KERNELS = [*kernels, torch.nn.attention.SDPBackend.CUDNN_ATTENTION] if cudnn else kernels
    try:
        yield
    finally:
        attention._has_kernel_for_all, attention._KERNELS = before, kernels


# --- is it right?


def environment(longest: int) -> None:
    """What the machine is, its matrix products, and what a length costs that attention has not seen before."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    note("environment", device=name, torch=torch.__version__, cudnn=torch.backends.cudnn.version() if CUDA else None)
    side = 8192 if CUDA else 512
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    for repeats in (3, 20):
        start = now()
        for _ in range(repeats):
            a @ a
        rate = 2 * side**3 * repeats / (now() - start)
    note(f"matrix product {side}", tflops=rate / 1e12)
    for backend in (True, False) if CUDA else ():
        torch.backends.cuda.enable_cudnn_sdp(backend)
        first, again = [], []
        for length in range(301, 309):
            q = torch.randn(1, 4096 + length, 32, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            q = q[:, :, :length].requires_grad_()
            for times in (first, again):
                start = now()
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
    """Against float64. Expected of float32: 5e-4 and 1e-4; of packed bfloat16: no worse than rows alone."""
    for per_prompt in (1, 2):
        rows = made_rows(varied(longest, 8, 1), shape, 1, per_prompt)
        batch = collate(rows).to(DEVICE)
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(shape, dtype)
            exact = copy.deepcopy(model).double()
            wanted_B = alone(exact, rows)
            wanted = gradient_of(exact, wanted_B)
            for layout in ("alone", "padded", "row by row", "packed"):
                set_layout(model, layout if layout in ("alone", "padded") else "packed")
                with row_by_row(cudnn=False) if layout == "row by row" else nullcontext():
                    found_B = alone(model, rows) if layout == "alone" else completion_log_probs(model, batch)
                    found = gradient_of(model, found_B)
                note(
                    f"{str(dtype)[6:]}{', shared prompts' if per_prompt > 1 else ''}, {layout}",
                    log_prob_rms=float((found_B.double() - wanted_B).square().mean().sqrt()),
                    gradient=float((found - wanted).norm() / wanted.norm()),
                )


def first_reward(shape: str, longest: int) -> None:
    """Policy and reference are equal at first: the log-ratio is 0 to the bit; in other batches it is rounding."""
    rows = made_rows(varied(longest, 8, 2), shape, 2, 2)
    batch, *halves = (collate(part).to(DEVICE) for part in (rows, rows[:4], rows[4:]))
    kinds = (("LoRA bfloat16", True, torch.bfloat16, False), ("LoRA bf16-mixed", True, torch.float32, True))
    for kind, lora, dtype, mixed in (*kinds, ("full bf16-mixed", False, torch.float32, True)):
        with random_policy(shape, dtype, lora):
            module = our_module(shape, lora, dtype)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed), torch.no_grad():
                rows_B = module(batch)[1]
                cut_B = torch.cat([module(half)[1].policy_log_probs_B for half in halves])
        note(
            f"first log-ratio, {kind}",
            same_batch=float((rows_B.policy_log_probs_B - rows_B.reference_log_probs_B).abs().max()),
            other_batches_rms=float((rows_B.policy_log_probs_B - cut_B).square().mean().sqrt()),
        )


def resume() -> None:
    """A run that is cut ends with the weights, moments and shift of one that is not, to the bit."""
    place = Path(tempfile.mkdtemp())
    model, log = make_model(place / "model"), make_log(place / "log.jsonl")
    options = {"accelerator": "gpu" if CUDA else "cpu", "default_root_dir": str(place)}
    try:
        whole = tiny_fit(model, log, callbacks=[RunCheckpoint(every_n_steps=7, keep=10)], trainer_options=options)
        step = next(path for path in sorted(place.rglob("*")) if path.is_dir() and path.name.endswith("0000007"))
        options["default_root_dir"] = str(place / "again")
        again = tiny_fit(model, log, ckpt_path=str(step), trainer_options=options)
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(torch.equal(whole["weights"][name].cpu(), again["weights"][name].cpu()) for name in whole["weights"])
    note("resume", same_weights_to_the_bit=same, same_shift=whole["shift"] == again["shift"])


# --- how fast?


class Clock(Callback):
    """Seconds from the end of the last step that does not count."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.start = 0.0

    def on_train_batch_end(self, trainer: Any, *told: Any) -> None:
        """Keeps the loss, and starts after the last step that does not count."""
        self.losses.append(told[1]["loss"].detach())
        if trainer.global_step == WARM:
            self.start = now()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()


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


def ours(shape: str, lora: bool, batches: list[FeedbackBatch], **options: Any) -> tuple[float, int, list[float]]:
    """Seconds and useful operations of the steps that count, and all losses, of Lightning's own loop."""
    dtype, clock = options.pop("dtype", torch.bfloat16 if lora else torch.float32), Clock()
    precision = options.pop("precision", "32-true" if dtype == torch.bfloat16 else "bf16-mixed")
    trainer = Trainer(
        accelerator="gpu" if CUDA else "cpu", devices=1, strategy=options.pop("strategy", "auto"), precision=precision,
        max_steps=len(batches), max_epochs=1, gradient_clip_val=1.0, callbacks=[clock, *options.pop("callbacks", ())],
        logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    with random_policy(shape, dtype, lora):
        module = our_module(shape, lora, dtype, **options)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=CUDA))
    seconds, flops = now() - clock.start, UsefulFlops.of(module.policy)
    return seconds, sum(map(flops.of_batch, batches[WARM:])), [float(loss) for loss in clock.losses]


def theirs(shape: str, lora: bool, groups: list[list[dict[str, Any]]], cached: bool) -> float:
    """Seconds of TRL 1.13's step in plain PyTorch: right padding, whole float32 logits, checkpointing, its default."""
    model = random_model(shape, torch.bfloat16 if lora else torch.float32, lora).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, delta, start = torch.optim.AdamW(trained, lr=1e-5, fused=True), 0.0, 0.0

    def log_probs(ids: Tensor, attended: Tensor, scored: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits.float()
        return (logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(-1)

    for number, rows in enumerate(groups):
        if number == WARM:
            start = now()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
        longest = max(len(row["input_ids"]) for row in rows)
        kinds = ([row["input_ids"] for row in rows], [[1] * len(row["input_ids"]) for row in rows])
        inputs = [
            torch.tensor([[*map(int, each), *[0] * (longest - len(each))] for each in kind], device=DEVICE)
            for kind in (*kinds, [row["completion_mask"] for row in rows])
        ]
        up = torch.tensor([row["thumbs_up"] for row in rows], device=DEVICE)
        policy = log_probs(*inputs)
        reference = policy.detach()
        if not cached:
            with torch.no_grad(), model.disable_adapter() if lora else nullcontext():
                reference = log_probs(*inputs)
        rewards = 0.1 * (policy - reference)
        delta = 0.9 * delta + 0.1 * rewards.detach().mean()
        (-logsigmoid(torch.where(up, rewards - delta, delta - rewards))).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return now() - start


def known(batch: FeedbackBatch) -> FeedbackBatch:
    """With log-probs under the reference, as after the pass before the first step."""
    return replace(batch, reference_log_probs_B=torch.full((len(batch),), -3000.0))


def speed(shape: str, lora: bool, longest: int, count: int, ways: Sequence[str], cached: bool = True) -> None:
    """Tokens a second, MFU and peak memory of each way."""
    groups = [made_rows(varied(longest, count, number), shape, number) for number in range(WARM + 5)]
    batches = [known(collate(rows)) if cached else collate(rows) for rows in groups]
    tokens, flops = sum(batch.num_tokens for batch in batches[WARM:]), 0
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
    for way in ways:
        online = "" if cached else ", reference online"
        label = f"{shape} {'LoRA' if lora else 'full'}, {count} rows to {longest}{online}: {way}"
        try:
            if time.time() - began > 60 * arguments.minutes:
                raise TimeoutError("no time left")
            if way == "TRL's step":
                seconds = theirs(shape, lora, groups, cached)
            else:
                slow = way in ("row by row", "row by row, cuDNN")
                with row_by_row(way.endswith("cuDNN")) if slow else nullcontext():
                    seconds, flops, _ = ours(shape, lora, batches, **options.get(way, {}))
            gib = {name: getattr(torch.cuda, f"max_memory_{name}")() / 2**30 for name in ("allocated", "reserved")}
            note(label, tokens_per_second=tokens / seconds, mfu=flops / seconds / H100, **gib)
        except Exception as error:
            note(label, failed=f"{type(error).__name__}: {str(error)[:200]}")
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def fsdp2(shape: str, longest: int) -> None:
    """Losses under FSDP2 with one process are those of one process."""
    batches = [known(collate(made_rows(varied(longest, 4, number), shape, number))) for number in range(6)]
    for lora, precision in ((False, "bf16-mixed"), (False, "32-true"), (True, "32-true")):
        one, cut = (
            ours(shape, lora, batches, strategy=strategy, precision=precision)[2] for strategy in ("auto", "fsdp2")
        )
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

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends, before losses are looked at."""
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def waits(shape: str, longest: int) -> None:
    """How often the host waits for the device in a step, by PyTorch's own account, and where; once is meant."""
    batches = [known(collate(made_rows(varied(longest, 4, number), shape, number))) for number in range(WARM + 5)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours(shape, True, batches, callbacks=[Waits()])
    found = [f"{Path(each.filename).name}:{each.lineno}" for each in told if "synchronizing" in str(each.message)]
    places = dict(Counter(found).most_common(5))
    note("waits for the device", of_each_step=len(found) / 5 if CUDA else "not counted", places=places)


def main() -> None:
    """Runs the parts asked for, and writes what they found after each."""
    small, middle, large = ("tiny",) * 3 if arguments.tiny else ("small", "1B", "8B")
    scale = 32 if arguments.tiny else 1
    compiled = ("compiled", "compiled, checkpointing")
    usual = ("row by row, cuDNN", "row by row", "packed", "TRL's step")
    parts: dict[str, Callable[[], None]] = {
        "environment": lambda: environment(2048 // scale),
        "numerics": lambda: numerics(small, 1024 // scale),
        "reward": lambda: first_reward(small, 1024 // scale),
        "resume": resume,
        "fsdp2": lambda: fsdp2(small, 512 // scale),
        "waits": lambda: waits(small, 512 // scale),
        "LoRA": lambda: speed(large, True, 2048 // scale, 4, (*usual, "checkpointing", *(compiled if CUDA else ()))),
        "LoRA short": lambda: speed(large, True, 512 // scale, 8, usual),
        "full": lambda: speed(
            middle, False, 2048 // scale, 4, (*usual, "selective", "fsdp2", "fsdp2, rounded at random")
        ),
        "8B full": lambda: speed(large, False, 2048 // scale, 2, ("bfloat16 rounded at random",)),
        "LoRA online": lambda: speed(large, True, 2048 // scale, 4, ("packed", "TRL's step"), cached=False),
        "LoRA long": lambda: speed(large, True, 8192 // scale, 1, usual),
        "full long": lambda: speed(middle, False, 8192 // scale, 1, usual),
    }
    for name in arguments.parts or parts:
        try:
            parts[name]()
        except Exception as error:
            traceback.print_exc()
            note(name, failed=f"{type(error).__name__}: {str(error)[:200]}")
        Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows, on a CPU too")
    parser.add_argument("--parts", nargs="*", help="some parts alone")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no more speeds are measured")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "gpu.json"))
    arguments = parser.parse_args()
    main()

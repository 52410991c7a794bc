"""The tiny run of the reliability trials: two layers, a byte tokenizer, 96 rows, 24 optimizer steps over two epochs.

Nothing here needs pytest: trials in fresh processes import it too.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bco_lightning import BCOModule, FeedbackDataModule
from bco_lightning.batch import micro_batches_of

ROOT = Path(__file__).parents[2]
ROWS, UP, STEPS, ROWS_PER_STEP = 96, 64, 24, 8
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the control tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>", "<pad>")])
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


def make_model(folder: Path, seed: int = 0) -> str:
    """Writes a random Llama of about 30,000 parameters with its byte tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_log(path: Path, num_rows: int = ROWS, seed: int = 0) -> str:
    """Writes rows of 3 to 40 bytes, two thirds of them thumbs-up."""
    drawn = random.Random(seed)
    letters = "abcdefgh ijkl"
    lines = []
    for number in range(num_rows):
        text = "".join(drawn.choice(letters) for _ in range(drawn.randint(2, 38)))
        lines.append(json.dumps({"prompt": f"q{number}", "completion": f"a{text}", "label": number % 3 != 0}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class Recorder(Callback):
    """Writes down which rows each optimizer step consumed and every value that was logged."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.values: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for part in micro_batches_of(batch):
            self.rows.setdefault(trainer.global_step, []).extend(part.row_ids_B.tolist())

    def take(self, values: dict[str, float], step: int) -> None:
        self.values.setdefault(step, {}).update(values)


def tiny_fit(
    model: str,
    log: str,
    *,
    callbacks: list[Callback] | None = None,
    ckpt_path: str | None = None,
    trainer_options: dict[str, Any] | None = None,
    module_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    module: BCOModule | None = None,
) -> dict[str, Any]:
    """Trains the tiny run in this process and returns everything that may be compared, as plain values and tensors."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    seed_everything(0, verbose=False)
    recorder, logger = Recorder(), None
    module = module or BCOModule(model, **{"learning_rate": 1e-2, "dtype": "float32", **(module_options or {})})
    own = {"train_files": log, "batch_size": ROWS_PER_STEP, "max_length": 96, "validation_fraction": 0.0}
    data = FeedbackDataModule(**{**own, **(data_options or {})})
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        **(trainer_options or {}),
    }
    logger = options.pop("logger", None) or _RecordingLogger(recorder)
    trainer = Trainer(callbacks=[recorder, *(callbacks or [])], logger=logger, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return {**state_of(module, trainer), "rows": recorder.rows, "values": recorder.values}


def whole(value: Any) -> Any:
    """A sharded tensor as a whole one on the CPU, by a collective; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def state_of(module: BCOModule, trainer: Trainer, part: Callable[[Any], Any] = whole) -> dict[str, Any]:
    """Weights, optimizer, learning rate, shift and random number state of a run, copied; whole or a part of them."""
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
    moments = [] if optimizer is None else [dict(state) for state in optimizer.state.values()]
    return {
        "step": trainer.global_step,
        "weights": {name: part(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad},
        "moments": [{name: part(value).clone() for name, value in state.items()} for state in moments],
        "learning_rate": scheduler.get_last_lr() if scheduler else None,
        "shift": module.reward_shift.state_dict(),
        "random": torch.get_rng_state().clone(),
    }


class _RecordingLogger:
    """Stands where a logger stands and keeps the values."""

    def __new__(cls, recorder: Recorder) -> Any:
        from lightning.pytorch.loggers.logger import DummyLogger

        class Keep(DummyLogger):
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
                recorder.take({name: float(value) for name, value in metrics.items() if name != "epoch"}, step or 0)

        return Keep()


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    """Equal to the bit, NaN being equal to NaN."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path}: differs by {(one.double() - other.double()).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{path}: {one.keys() ^ other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), f"{path}: {len(one)} and {len(other)} entries"
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}[{number}]")
    else:
        assert one == other or (one != one and other != other), f"{path}: {one} and {other}"


_CONTEXT = multiprocessing.get_context("forkserver")
_LATER = ["pytest", "torch.utils.tensorboard", "torch.distributed.fsdp"]  # what nearly every child comes to need
_CONTEXT.set_forkserver_preload(["tests.reliability.tiny_run", "bco_lightning.cli.app", *_LATER])


def start(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int = 1,
    folder: Path,
    environment: dict[str, str] | None = None,
) -> list[BaseProcess]:
    """Starts a function in fresh processes, which share nothing with this one; each writes what it returns.

    Args:
        function: A module-level function.
        arguments: What it is called with.
        ranks: Number of processes of one group (gloo); each knows its rank as torchrun would tell it.
        folder: Where ``result.RANK`` and ``output.RANK`` go.
        environment: More environment variables.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(environment or {})}
    if ranks > 1:
        port = str(free_port())
        shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    processes = []
    for rank in range(ranks):
        own = {**shared, "LOCAL_RANK": str(rank), "RANK": str(rank)} if ranks > 1 else shared
        process = _CONTEXT.Process(target=_child, args=(function, arguments, own, str(folder), rank))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], folder: Path, timeout: float = 120) -> list[Any]:
    """Waits for processes that should end well and returns what each of them returned."""
    codes = wait(processes, timeout)
    said = "\n".join((folder / f"output.{rank}").read_text()[-3000:] for rank in range(len(processes)))
    assert codes == [0] * len(processes), f"{said}\nexit codes {codes}"
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(len(processes))]


def wait(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes; ``None`` for a process that had to be killed because it did not end in time."""
    codes: list[int | None] = []
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def _child(function: Callable[..., Any], arguments: Any, environment: dict[str, str], folder: str, rank: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(f"{folder}/output.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as they do for a user
    # From Python 3.14 on a forked process forgets what its parent has registered, but finalizers do not know that.
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    os.chdir(folder)
    torch.set_num_threads(1)
    code = 0
    try:
        torch.save(function(*arguments), f"{folder}/result.{rank}")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    _wait_for_others(Path(folder), rank, int(environment.get("WORLD_SIZE", 1)))
    os._exit(code)  # what a dead process group's threads still hold must not keep this one


def _wait_for_others(folder: Path, rank: int, ranks: int, most_seconds: float = 5.0) -> None:
    """A process that ends takes its connections along, in which another may still be reading."""
    (folder / f"ended.{rank}").touch()
    deadline = time.monotonic() + most_seconds
    while len(list(folder.glob("ended.*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

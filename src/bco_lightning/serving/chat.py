"""What is said to a policy and its reference: answers as they are made, and the log of their thumbs."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TextIteratorStreamer

from bco_lightning.batch import FeedbackRow, Message, TokenizedSample
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.images import ImageFinder, ImageInputs, with_pictures
from bco_lightning.data.messages import check_size, messages_in
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import ConfigError
from bco_lightning.models.generation import end_tokens, evaluating
from bco_lightning.models.layout import causal_lm_of, joined_images
from bco_lightning.models.load import locate_model, resolve_dtype
from bco_lightning.module import BCOModule
from bco_lightning.options import LoraSettings
from bco_lightning.places import is_private
from bco_lightning.serving.export import opened


@dataclass
class Answer:
    """What one of the models says to a prompt, written as in a log; its thumb, and its line once it had one."""

    model: str
    prompt: list[Message]
    text: str = ""
    finished: bool | None = None  # by its own end token; not yet known while it is made
    thumb: bool | None = None
    line: bytes = b""


class Speakers:
    """A policy and perhaps its reference, one model in memory where that is the policy with its adapter off.

    One answer is made at a time, whoever asks: an adapter is off for everyone.
    """

    def __init__(self, ckpt_path: Path | None, name_or_path: str | None, reference: str | None, runs: Path) -> None:
        if (ckpt_path is None) == (name_or_path is None) or (ckpt_path and reference):
            expected = "expected either --ckpt_path, or --name_or_path and perhaps --reference_name_or_path"
            raise ConfigError("chat", f"{expected}, found {'both' if ckpt_path else 'neither'}.")
        # A CUDA build of PyTorch names its accelerator on a machine that has none, too.
        found, told = torch.accelerator.current_accelerator(check_available=True), dict[str, Any]()
        device = found or torch.device("cpu")
        if ckpt_path is not None:
            module, told = opened(ckpt_path, None, runs, map_location=device)
        else:
            adapted = LoraSettings() if locate_model(str(name_or_path)).is_adapter else None
            dtype = str(resolve_dtype("auto", LoraSettings(), device)).removeprefix("torch.")
            module = BCOModule(name_or_path, reference, dtype=dtype, lora=adapted)
        policy: Any = module.to(device).policy
        self._policy = policy
        self.models: dict[str, Any] = {"policy": nullcontext}  # what gives none has the policy speak in it
        if told or reference:
            module.reference.hold()
            self.models["reference"] = module.reference.model
        elif module.lora is not None:
            self.models["reference"] = policy.disable_adapter
        self.name = str(told.get("place", name_or_path))
        self.log = (Path(self.name).parents[2] if told else runs) / "chat.jsonl"
        self.tokenizer, day = module.tokenizer, module.told.get("template_date")
        self._longest = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self._rows = RowTokenizer(self.tokenizer, DataOptions(max_length=2**31, template_date=day))
        self.inputs, self._worker = ImageInputs(self.tokenizer), ThreadPoolExecutor(max_workers=1)

    def speak(self, answer: Answer, temperature: float, max_new_tokens: int) -> Iterator[Answer]:
        """The answer as it grows, to a prompt as a row has it; at temperature 0 each token is the likeliest one.

        Raises a UserError if no row could be made of the prompt, or the model cannot hold it.
        """
        place = "conversation"
        asked = with_pictures(messages_in(answer.prompt, "prompt", place), None, ImageFinder(anywhere=True), place)
        row = self._rows.seen(FeedbackRow(asked, [{"role": "assistant", "content": "."}], None, place))
        sample: Any = next(outcome for _, outcome in self._rows.tokenize([row]))
        if not isinstance(sample, TokenizedSample):
            raise sample if isinstance(sample, Exception) else ConfigError(place, f"cannot be told: {sample.reason}.")
        prompt: list[int] = sample.input_ids[: sample.completion_mask.index(True)]
        if (room := min(max_new_tokens, self._longest - len(prompt))) < 1:
            found = f"expected fewer than {self._longest} tokens, which the model can hold, found {len(prompt)}."
            raise ConfigError("conversation", found, "Begin another one.")
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made = self._worker.submit(self._make, answer, sample.images, prompt, streamer, temperature, room)
        for text in streamer:
            answer.text += text
            yield answer
        answer.text, answer.finished = made.result()
        yield answer

    def _make(
        self, answer: Answer, images: Any, prompt: list[int], streamer: Any, temperature: float, room: int
    ) -> tuple[str, bool]:
        greedy = dict.fromkeys(("temperature", "top_k", "top_p"))
        try:
            with self.models[answer.model]() as other, evaluating(model := other or self._policy):
                ends, ids = end_tokens(model, self.tokenizer), torch.tensor([prompt], device=model.device)
                drawn: dict[str, Any] = {"temperature": temperature} if temperature else greedy
                drawn |= {"do_sample": temperature > 0, "eos_token_id": ends, "streamer": streamer}
                drawn |= {"max_new_tokens": room, "pad_token_id": self.tokenizer.pad_token_id}
                seen = joined_images(causal_lm_of(model), [self.inputs(images)], ids)
                drawn |= {name: each.to(model.device) for name, each in seen.items()}
                found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **drawn)
                new = found[0, len(prompt) :].tolist()
                return self.tokenizer.decode(new, skip_special_tokens=True), new[-1:] != [] and new[-1] in ends
        finally:
            streamer.end()


def said(text: str, images: Sequence[str] = ()) -> Any:
    """What a message of a log holds: a text, or parts where there are images, or where it would be taken for parts."""
    parts = [*({"type": "image", "image": path} for path in images), {"type": "text", "text": text}]
    return parts if images or text.startswith("[{") else text


def rate(log: Path, answer: Answer, thumb: bool | None, name: str) -> None:
    """Appends a rated answer to a log as one line that ``fit`` reads; another thumb is written in place of the first.

    Labels take five characters each for that; ``None`` takes a thumb back, and is read as no feedback. Images are
    copied beside the log, each once.

    Raises:
        UserError: If the answer was cut off, says nothing, or is too long for a row; if others can read the images.
        OSError: If the log cannot be written, which is then as it was, or an image.
    """
    if not answer.finished or not answer.text.strip():
        found, remedy = {
            True: ("one that says nothing", ""),
            False: (
                "one that was cut off, which would teach to end there",
                "Raise the limit of tokens, and ask again.",
            ),
            None: ("one that is still being made", "Rate it once it is there."),
        }[answer.finished]
        raise ConfigError("thumb", f"expected an answer that ended by itself, found {found}.", remedy)
    check_size([*answer.prompt, {"role": "assistant", "content": answer.text}], "thumb")
    log.parent.mkdir(parents=True, exist_ok=True)
    images, completion = log.with_name(f"{log.stem}_images"), [{"role": "assistant", "content": said(answer.text)}]
    told = ((each, each["content"]) for each in answer.prompt)
    prompt = [each if isinstance(c, str) else {**each, "content": [_kept(p, images) for p in c]} for each, c in told]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {"prompt": prompt, "completion": completion, "model": answer.model, "source": name, "time": now}
    line = f'{{"label": {json.dumps(thumb):5}, {json.dumps(row, ensure_ascii=False)[1:]}\n'.encode()
    with os.fdopen(os.open(log, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        before = file.read()
        at = before.find(answer.line) if answer.line else -1
        if at < 0:  # also where somebody has edited the log meanwhile
            at, gap = len(before), b"" if before[-1:] in (b"", b"\n") else b"\n"
            line = gap + line
        if os.pwrite(file.fileno(), line, at) < len(line):
            os.ftruncate(file.fileno(), len(before))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log))
        os.fsync(file.fileno())
    answer.line, answer.thumb = line.lstrip(b"\n"), thumb


def _kept(part: Message, folder: Path) -> Message:
    """A part of a message, an image copied to where its row will find it, which only the log's owner can read."""
    if part["type"] != "image":
        return part
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        found = f"expected {folder} to be a folder that you alone can open, found another."
        raise ConfigError("thumb", found, "Make it one (chmod 700), or move it.")
    name = hashlib.sha256(Path(part["image"]).read_bytes()).hexdigest()[:32] + Path(part["image"]).suffix
    if not (folder / name).exists():
        with written_whole(folder / name) as partial:
            shutil.copyfile(part["image"], partial)
    return {**part, "image": f"{folder.name}/{name}"}


def chat(
    ckpt_path: Path | None = None, name_or_path: str | None = None, reference_name_or_path: str | None = None, *,
    blind: bool = False, log: Path | None = None, host: str = "127.0.0.1", port: int | None = None,
    run_folder: Path = Path("runs/bco"),
) -> None:  # fmt: skip
    """Serves a page on which a policy and its reference answer side by side, and thumbs become rows to train on.

    Args:
        ckpt_path: Checkpoint of a run, as for ``export``; ``last`` or ``best`` of the newest run.
        name_or_path: Or a model, such as an export. The reference of an adapter is its base model.
        reference_name_or_path: A model to stand beside that one.
        blind: Show answers as those of A and B, in random order.
        log: File to which rated answers are appended; ``chat.jsonl`` beside the run's folder if left out.
        host: Address to listen on; other machines reach any but ``127.0.0.1``. Only who has the printed URL gets in.
        port: Port to listen on; the first free one from 7860 if left out.
        run_folder: Folder of the runs of which ``last`` or ``best`` alone takes the newest.

    Raises:
        ConfigError: If gradio is not installed, or neither or both of checkpoint and model are given.
        CheckpointError: If the checkpoint is missing, damaged or no such checkpoint.
    """
    if find_spec("gradio") is None:
        raise ConfigError("chat", "expected gradio, found none.", 'Install it: pip install "bco_lightning[ui]"')
    with TemporaryDirectory() as uploads:  # gradio's own stays, and others may read it
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from bco_lightning.serving.chat_page import page, serve

        speakers = Speakers(ckpt_path, name_or_path, reference_name_or_path, run_folder)
        serve(page(speakers, log or speakers.log, blind), host, port)

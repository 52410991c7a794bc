"""Images of rows: where a log keeps them, whether they can be read, and what a model's processor makes of them.

A message has ``MARK`` in its text for each of its images, which it keeps under ``IMAGES``, in order. A table keeps what
:class:`Picture` has stored, not pixels: these are made when a row is drawn.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from bco_lightning.batch import FeedbackRow, Message
from bco_lightning.data.remote import GIVEN, HTTP, file_system, protocol_of
from bco_lightning.data.values import shown
from bco_lightning.errors import FeedbackRowError, LanguageModelError

MARK, IMAGES = "\ufdd2", "images"  # a Unicode noncharacter, which no text should hold
WITH_IMAGE = "conversation with an image"
TOO_LONG_WITH_IMAGES = "too long with its images, which are not cut (data.max_length)"
PARTS = ("image", "image_url", "input_image")  # of transformers and Anthropic, and of OpenAI's two APIs
_SOURCES = ("image_url", "image", "url", "path", "bytes", "base64", "data", "source")
_PLACEHOLDER = "<image>"  # in texts of LLaMA-Factory and ms-swift, whose images stand in a column of their own
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # others of Pillow's can start programs
_FILE = b"file:"  # no image begins so
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Picture:
    """An image as a table keeps it: the bytes of its file, or digest and path; shown by the digest of its bytes."""

    stored: bytes
    digest: str

    def __str__(self) -> str:
        return f"image {self.digest[:16]}"


@dataclass(frozen=True)
class ImageFinder:
    """Finds the images that the records of one file name; paths of rows that Python gave may lead anywhere."""

    folder: str = "."
    anywhere: bool = False
    urls: bool = False

    @classmethod
    def of(cls, path: str, options: Any) -> ImageFinder:
        """That of a file of records, as the options of data say."""
        given, folder = GIVEN in path, options.image_folder
        return cls(folder or ("." if given else str(Path(path).parent)), given, options.image_urls)

    def picture(self, source: Any, place: str) -> Picture:
        """One image, whose bytes are read but not looked at; a FeedbackRowError if there is none."""
        if isinstance(source, Mapping) and ("bytes" in source or "path" in source):  # of `datasets`
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, str):
            name = source.strip()
            if not name.startswith("data:") and protocol_of(name) not in HTTP:
                return self._in_folder(name.removeprefix("file://"), place)
            source = self._fetched(name, place) if not name.startswith("data:") else None
            with suppress(ValueError):  # no base64
                source = source or base64.b64decode("".join(name.partition(",")[2].split()), validate=True)
        if not isinstance(source, bytes) or not source or source.startswith(_FILE):
            expected = "expected an image as path, address, data URL or bytes"
            raise FeedbackRowError(place, f"{expected}, found {shown(source)}.", "Correct or remove the row.")
        return Picture(source, hashlib.sha256(source).hexdigest())

    def _in_folder(self, name: str, place: str) -> Picture:
        root, content, inside = Path(self.folder).resolve(), b"", True
        with suppress(OSError, ValueError):  # a name that is none, or too long
            path = (root / name).resolve()
            inside = self.anywhere or path.is_relative_to(root)
            if inside and path.is_file() and path.stat().st_size <= _MOST_BYTES:
                content = path.read_bytes()
        if not content:
            found = "none of at most 64 MiB there" if inside else "a path that leads out of it"
            problem = f"expected an image file below {self.folder}, found {found}."
            remedy = "Put it there, or name the folder that paths begin in: --data.image_folder=FOLDER"
            raise FeedbackRowError(place, problem, remedy)
        digest = hashlib.sha256(content).hexdigest()
        return Picture(_FILE + f"{digest} {path}".encode(), digest)

    def _fetched(self, url: str, place: str) -> bytes:
        if not self.urls:
            remedy = "To fetch such images, say so on the command line: --data.image_urls=true"
            raise FeedbackRowError(place, "expected an image on this machine, found a web address.", remedy)
        try:
            system, inside = file_system(url)
            return bytes(system.cat_file(inside, start=0, end=_MOST_BYTES))
        except Exception as error:  # whose words hold the whole address
            problem = f"expected an image that can be fetched, found {type(error).__name__}."
            raise FeedbackRowError(place, problem, "Check address and connection, or remove the row.") from None


def source_in(part: Mapping[str, Any]) -> Any:
    """What a part of a message says of its image; nothing where it stands for one of a column."""
    name = next((name for name in _SOURCES if part.get(name) is not None), "")
    value = part.get(name)
    if isinstance(value, Mapping) and not {"bytes", "path"} & value.keys():  # {"url": ...}, or Anthropic's source
        return source_in(value)
    return f"data:,{value}" if name in ("base64", "data") and not str(value).startswith("data:") else value


def with_pictures(messages: Sequence[Message], column: Any, finder: ImageFinder, place: str) -> list[Message]:
    """Messages with their images found; those of a column take the places that are marked, or stand before all."""
    given = [] if column is None else list(column) if isinstance(column, (list, tuple)) else [column]
    if not given and not any(IMAGES in message for message in messages):
        return list(messages)
    told = [{**message, IMAGES: list(message.get(IMAGES) or ())} for message in messages]
    asked = [message for message in told if message["role"] != "assistant"]
    if given and not any(None in message[IMAGES] for message in told):
        first = next((message for message in asked if message["role"] == "user"), told[0])
        if not any(_PLACEHOLDER in message["content"] for message in asked):
            first["content"] = _PLACEHOLDER * len(given) + first["content"]
        for message in asked:
            message[IMAGES] = [None] * message["content"].count(_PLACEHOLDER) + message[IMAGES]
            message["content"] = message["content"].replace(_PLACEHOLDER, MARK)
    places = sum(message["content"].count(MARK) for message in asked if message[IMAGES])
    named = sum(image is not None for message in told for image in message[IMAGES])
    if len(given) + named != places:
        expected = "expected as many images as places for them in what the assistant is told"
        problem = f"{expected}, found {len(given) + named} for {places}."
        raise FeedbackRowError(place, problem, "Correct or remove the row.")
    rest = iter(given)
    for message in told:
        message[IMAGES] = [finder.picture(next(rest) if each is None else each, place) for each in message[IMAGES]]
    return [message if message[IMAGES] else {n: v for n, v in message.items() if n != IMAGES} for message in told]


def pictures_of(row: FeedbackRow) -> list[Picture]:
    """The images of a row, in the order in which the template comes to them."""
    return [picture for message in (*row.prompt, *row.completion) for picture in message.get(IMAGES, ())]


def as_told(message: Message) -> Message:
    """A message as the chat templates of models with images take it: a list of texts and images."""
    first, *others = message["content"].split(MARK) if IMAGES in message else [message["content"]]
    parts: list[Message] = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    kept = {name: value for name, value in message.items() if name != IMAGES}
    return {**kept, "content": [part for part in parts if part.get("text") != ""]}


def file_of(stored: bytes) -> tuple[str, str]:
    """Digest and path of an image that is kept in a file of its own; empty texts of one that is not."""
    digest, _, path = stored.removeprefix(_FILE).partition(b" ") if stored.startswith(_FILE) else (b"", b"", b"")
    return digest.decode(), path.decode()


def opened(stored: bytes, place: str = "") -> Any:
    """The Pillow image of what a table keeps, not yet decoded; a FeedbackRowError if it is none."""
    from PIL import Image

    digest, path = file_of(stored)
    if path:
        with suppress(OSError):
            stored = Path(path).read_bytes()
        if hashlib.sha256(stored).hexdigest() != digest:
            problem = "expected the image as it was when its row was read, found another or none."
            raise FeedbackRowError(place or path, problem, "Restore it, or start anew.")
    try:
        return Image.open(io.BytesIO(stored), formats=_FORMATS)
    except Exception as error:  # no image, a bomb, or whatever a decoder makes of its bytes
        found = "others" if isinstance(error, OSError) else f"one that Pillow refuses ({error})"
        problem = f"expected an image of {', '.join(_FORMATS)} in {path or 'the row'}, found {found}."
        raise FeedbackRowError(place or path, problem, "Convert it or make it smaller, or remove the row.") from error


def pixels_of(stored: bytes, place: str = "") -> Any:
    """The image as RGB, upright, its first frame; what is transparent is white."""
    from PIL import Image, ImageOps

    image = opened(stored, place)
    if getattr(image, "n_frames", 1) > 1:
        rank_zero_warn("images: of those that are animated the first frame is taken")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # of 16 or 32 bits
            values = np.asarray(image, np.float64)
            values = values / 257 if values.max() > 255 else values
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # the same
        path = file_of(stored)[1] or "the row"
        problem = f"expected a whole image in {path}, found one that cannot be decoded ({error})."
        raise FeedbackRowError(place or path, problem, "Mend it, or remove the row.") from error


class ImageInputs:
    """What the processor of a tokenizer's model makes of images: text in their place, and tensors for the model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def processor(self) -> Any:
        """The tokenizer's ``processor`` if it was given one, else that of the folder it came from; of none ``None``."""
        given = getattr(self._tokenizer, "processor", None)
        return given if given is not None else _loaded(self._tokenizer.name_or_path)

    def __call__(self, images: Sequence[bytes] | None) -> dict[str, Tensor]:
        """What the model is given beside the tokens of a row with these images."""
        if not images:
            return {}
        text = [self.processor.image_token * len(images)]
        found = self.processor(images=[list(map(pixels_of, images))], text=text, return_tensors="pt")
        names = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and name not in names}

    def expanded(self, texts: Sequence[str], pictures: Sequence[Picture], place: str) -> list[str]:
        """Rendered texts with what stands for images, one token each, drawn out to as many as the model wants."""
        pixels = [pixels_of(each.stored, place) for each in pictures]
        try:
            told = self.processor(images=[pixels], text=["".join(texts)], return_text_replacement_offsets=True)
            drawn = iter([each["replacement"] for each in told["text_replacement_offsets"][0]])
        except Exception as error:  # whatever a processor makes of an image, or of a template that forgets one
            problem = f"expected images that the model's processor takes, found {type(error).__name__}: {error}"
            raise FeedbackRowError(place, problem, "Remove the row, or set data.chat_template.") from error
        return [re.sub(re.escape(self.processor.image_token), lambda _: next(drawn), text) for text in texts]

    def digest(self) -> str:
        """SHA-256 over the settings of the processor, which is not loaded for it."""
        given = getattr(self._tokenizer, "processor", None)
        told = "" if given is None else given.to_json_string()
        for name in () if told else ("processor_config.json", "preprocessor_config.json"):
            with suppress(OSError, ValueError):  # none
                told += Path(str(cached_file(self._tokenizer.name_or_path, name, local_files_only=True))).read_text()
        return hashlib.sha256(told.encode()).hexdigest()


@lru_cache(maxsize=4)
def _loaded(name: str) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # there are no files at all
        return None
    except ImportError as error:
        if "Video" in str(error):
            return _without_videos(name)
        problem = f"expected a processor for the images of rows, found that it cannot be loaded: {error}"
        raise LanguageModelError(name, problem, "Install what it asks for.") from error
    return processor if getattr(processor, "image_token", None) else None


def _without_videos(name: str) -> Any:
    """A processor of images alone, since that of videos wants torchvision, which has to fit the build of torch."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, trust_remote_code=False))]

    class ImagesOnly(kind):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    images = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    return ImagesOnly(images, AutoTokenizer.from_pretrained(name, trust_remote_code=False))

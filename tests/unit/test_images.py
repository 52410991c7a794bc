"""Images of a log: each way to write them, what is wrong with them in one message, and pixels as they were."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bco_lightning import FeedbackDataModule
from bco_lightning.data.images import IMAGES, MARK, pixels_of
from bco_lightning.errors import FeedbackRowError
from tests.conftest import write_jsonl
from tests.unit.vision_models import image_bytes, picture, processor_of, tokenizer_of

TEXT = {"type": "text", "text": "What is it?"}
PNG = image_bytes(0)
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def seeing() -> Any:
    """A tokenizer that knows its processor."""
    tokenizer = tokenizer_of("llava")
    tokenizer.processor = processor_of("llava", tokenizer)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log" / "images").mkdir(parents=True)
    (tmp_path / "log" / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "outside.png").write_bytes(PNG)
    return tmp_path / "log"


def asked(*parts: Any, **others: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": list(parts)}], "completion": "A dog.", "label": True, **others}


def read(folder: Path, *rows: Any, tokenizer: Any, **options: Any) -> FeedbackDataModule:
    """The rows of a log, scored rather than trained on, so that one is enough."""
    path = folder / "log.parquet"
    if any(isinstance(row, pa.Table) for row in rows):
        pq.write_table(rows[0], path)
    else:
        path = Path(write_jsonl(folder / "log.jsonl", list(rows)))
    data = FeedbackDataModule(predict_files=str(path), tokenizer=tokenizer, cache_rows=False, **options)
    data.setup("predict")
    return data


def struct_table() -> pa.Table:
    """As ``datasets`` writes its Image feature."""
    kind = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    images = pa.array([[{"bytes": PNG, "path": "a.png"}]], kind)
    return pa.table({"prompt": ["What is it?"], "completion": ["A dog."], "label": [True], "images": images})


@pytest.mark.parametrize(
    "row",
    [
        asked({"type": "image_url", "image_url": {"url": "images/a.png"}}, TEXT),
        asked({"type": "image_url", "image_url": {"url": URL}}, TEXT),
        asked({"type": "input_image", "image_url": URL}, {"type": "input_text", "text": "What is it?"}),
        asked({"type": "image", "path": "images/a.png"}, TEXT),
        asked({"type": "image", "image": URL}, TEXT),
        asked({"type": "image", "base64": URL.partition(",")[2]}, TEXT),
        asked(
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}},
            TEXT,
        ),
        asked({"type": "image"}, TEXT, images=["images/a.png"]),
        {"prompt": "<image>What is it?", "completion": "A dog.", "label": True, "images": ["images/a.png"]},
        {"prompt": "What is it?", "completion": "A dog.", "label": True, "images": "images/a.png"},
        struct_table(),
    ],
    ids=[
        "a path", "a data URL", "OpenAI's other API", "a path of transformers", "a data URL of transformers", "base64",
        "Anthropic's", "a part without a source", "a placeholder", "a column alone", "a struct of datasets",
    ],
)  # fmt: skip
def test_an_image_is_read_however_a_log_writes_it(folder: Path, seeing: Any, row: Any) -> None:
    given = read(folder, row, tokenizer=seeing).predict_dataset[0]
    text = "<|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\n"
    expected = seeing.processor(images=[picture(0)], text=[text])["input_ids"][0]
    assert given["input_ids"][: len(expected)] == list(expected)
    assert not any(given["completion_mask"][: len(expected)])
    assert np.array_equal(np.asarray(pixels_of(given["images"][0])), np.asarray(picture(0)))


def bomb() -> bytes:
    """A PNG whose header says that it is 60,000 pixels wide and high."""
    made = bytearray(image_bytes(0))
    made[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    made[29:33] = zlib.crc32(bytes(made[12:29])).to_bytes(4, "big")
    return bytes(made)


IMAGE = {"type": "image", "path": "images/a.png"}


def of_path(path: str) -> dict[str, Any]:
    return asked({"type": "image", "path": path}, TEXT)


BAD = {
    "missing": (of_path("images/b.png"), "expected an image file below", "image_folder"),
    "truncated": (of_path("cut.png"), "cut.png, found one that cannot be decoded", "truncated"),
    "no image": (of_path("text.png"), "text.png, found others", "Convert it"),
    "huge": (of_path("bomb.png"), "decompression bomb", "make it smaller"),
        "disguised": (
        asked({"type": "image", "base64": base64.b64encode(b"file:0 /etc/hostname").decode()}, TEXT),
        "expected an image as path, address, data URL or bytes",
        "Correct or remove",
    ),
    "no base64": (asked({"type": "image", "base64": "%%%"}, TEXT), "or bytes, found null", "Correct or remove"),
    "fewer than places": (asked({"type": "image"}, TEXT), "found 0 for 1", "Correct or remove"),
    "more than places": (
        asked({"type": "image"}, TEXT, images=["images/a.png"] * 2), "found 2 for 1", "Correct or remove"
    ),
    "more in text": (
        {"prompt": "<image>?", "completion": "A", "label": True, "images": [URL, URL]}, "found 2 for 1", "Correct or"
    ),
    "out of the folder": (of_path("../outside.png"), "leads out of it", "image_folder"),
    "absolute": (of_path("/etc/hostname"), "leads out of it", "image_folder"),
    "on the web": (
        asked({"type": "image", "url": "https://host/a.png"}, TEXT), "found a web address", "--data.image_urls=true"
    ),
    "said by the assistant": (
        {"prompt": "Draw", "completion": [{"role": "assistant", "content": [IMAGE, TEXT]}], "label": True},
        "in what the assistant is told, found 1 for 0",
        "Correct or remove",
    ),
    "no source": (asked({"type": "image", "image": 7}, TEXT), "data URL or bytes, found 7", "Correct or remove"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_an_image_is_one_message(folder: Path, seeing: Any, name: str) -> None:
    (folder / "cut.png").write_bytes(image_bytes(0, size=(64, 64))[:-40])
    (folder / "text.png").write_text("no image")
    (folder / "bomb.png").write_bytes(bomb())
    row, problem, remedy = BAD[name]
    with pytest.raises(FeedbackRowError) as error:
        read(folder, row, tokenizer=seeing)
    assert str(error.value).startswith(f"{folder / 'log.jsonl'}:1: ")
    assert problem in error.value.problem + error.value.remedy and remedy in str(error.value)


def test_a_model_of_text_alone_leaves_out_rows_with_images_and_counts_them(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llava")
    tokenizer.name_or_path = str(tmp_path)  # a folder without a processor
    counts = read(folder, asked(IMAGE, TEXT), asked(TEXT), tokenizer=tokenizer).counts[0]
    assert (counts.used, list(counts.left_out)) == (1, ["conversation with an image, and a model that sees none"])


def test_a_row_too_long_with_its_images_is_left_out_and_counted(folder: Path, seeing: Any) -> None:
    counts = read(folder, asked(IMAGE, TEXT), asked(TEXT), tokenizer=seeing, max_length=52).counts[0]
    assert (counts.used, counts.num_left_out) == (1, 1)
    assert "not cut" in next(iter(counts.left_out))


def test_a_folder_of_images_may_be_named(folder: Path, seeing: Any) -> None:
    row = asked({"type": "image", "path": "outside.png"}, TEXT)
    assert len(read(folder, row, tokenizer=seeing, image_folder=str(folder.parent)).predict_dataset) == 1


def test_a_typed_placeholder_of_the_model_stays_text(folder: Path, seeing: Any) -> None:
    row = asked(IMAGE, {"type": "text", "text": "Why is <image> a word?"})
    ids = read(folder, row, tokenizer=seeing).predict_dataset[0]["input_ids"]
    assert ids.count(seeing.processor.image_token_id) == 16 and "Why is <image> a word?" in seeing.decode(ids)


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    picture(1).save(file, "GIF", save_all=True, append_images=[picture(2)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (image_bytes(3, mode="L"), picture(3, mode="L").convert("RGB")),
        (image_bytes(3, mode="P"), picture(3, mode="P").convert("RGB")),
        (image_bytes(3, "TIFF", mode="CMYK"), picture(3, mode="CMYK").convert("RGB")),
        (
            sixteen_bits(),
            Image.fromarray(np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)).convert("RGB"),
        ),
    ],
    ids=["grey", "palette", "CMYK", "16 bits"],
)
def test_every_mode_becomes_rgb(made: bytes, expected: Image.Image) -> None:
    found = pixels_of(made)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_what_is_transparent_is_white_and_what_is_turned_stands_upright() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")
    assert np.asarray(pixels_of(file.getvalue())).min() == 255
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    picture(0).save(file, "PNG", exif=turned)
    assert pixels_of(file.getvalue()).size == picture(0).size[::-1]


def test_of_an_animated_image_the_first_frame_is_taken_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="of those that are animated the first frame is taken"):
        found = pixels_of(animated())
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(animated())).convert("RGB")))


def test_the_same_words_about_another_image_are_another_prompt(folder: Path, seeing: Any) -> None:
    (folder / "images" / "b.png").write_bytes(image_bytes(1))
    rows = [asked({"type": "image", "path": f"images/{name}.png"}, TEXT) for name in "aab"]
    first, second, other = read(folder, *rows, tokenizer=seeing).predict_dataset["prompt_key"]
    assert first == second != other


def test_tables_are_read_again_where_an_image_has_changed(folder: Path, seeing: Any, tmp_path: Path) -> None:
    def keys(cache: Path = tmp_path / "cache") -> Any:
        path = write_jsonl(folder / "log.jsonl", [asked(IMAGE, TEXT)])
        data = FeedbackDataModule(predict_files=path, tokenizer=seeing, cache_folder=str(cache))
        data.setup("predict")
        return data.predict_dataset["prompt_key"][0]

    before = keys()
    assert keys() == before
    (folder / "images" / "a.png").write_bytes(image_bytes(5, size=(21, 14)))
    assert keys() != before


def test_a_message_keeps_its_images_beside_its_text(folder: Path, seeing: Any) -> None:
    data = read(folder, asked(TEXT, IMAGE), tokenizer=seeing)
    (message,) = json.loads(data.predict_dataset["prompt"][0])
    assert message["content"] == f"What is it?{MARK}" and len(message[IMAGES]) == 1

"""A tiny random vision-language model of each kind, with the library's own processor, built in memory."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = ("llava", "gemma3", "idefics3", "qwen2_vl", "qwen2_5_vl", "mistral3")
_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_PLACEHOLDER = {
    "llava": "<image>", "idefics3": "<image>", "smolvlm": "<image>", "gemma3": "<start_of_image>", "mistral3": "[IMG]",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}  # fmt: skip
_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    "<start_of_image>", "<image_soft_token>", "<end_of_image>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
    "<|video_pad|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def tokenizer_of(kind: str) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: number for number, letter in enumerate(letters)}, [])
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="right", **dict.fromkeys(("eos_token", "pad_token"), "<|im_end|>"),
        extra_special_tokens=named if kind == "gemma3" else {},
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", _PLACEHOLDER[kind])
    return tokenizer


def processor_of(kind: str, tokenizer: Any) -> Any:
    """The library's processor, its image processor that of Pillow, with images of about 16 pixels."""
    if kind.startswith("qwen2"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        base = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[kind]

        class ImagesOnly(base):  # type: ignore[misc, valid-type]
            def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
                super().__init__(image_processor, tokenizer, chat_template=chat_template)

        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 8 * 8, "longest_edge": 24 * 24}, patch_size=4, merge_size=2, temporal_patch_size=2
        )
        return ImagesOnly(images, tokenizer)
    if kind == "llava":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        size = {"height": 16, "width": 16}
        images = LlavaImageProcessorPil(size=size, crop_size=size)
        return transformers.LlavaProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return transformers.Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=4
        )
    if kind == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    name = "transformers.models.pixtral.image_processing_pixtral"  # which wants torchvision
    if name not in sys.modules and not find_spec("torchvision"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].get_resize_output_image_size = None  # type: ignore[attr-defined]
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    images = PixtralImageProcessorPil(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})
    return PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)


def torchvision_processor_of(kind: str, tokenizer: Any) -> Any:
    """A processor that the library has for torchvision alone."""
    if kind == "mistral3":
        images = transformers.PixtralImageProcessor(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})
        return transformers.PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    images, videos = transformers.SmolVLMImageProcessor(**sizes), transformers.SmolVLMVideoProcessor(**sizes)
    return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)


def model_of(kind: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in evaluation mode."""
    token = tokenizer.convert_tokens_to_ids
    text, vision = dict(_TEXT, vocab_size=len(tokenizer)), dict(_VISION)
    told: dict[str, Any] = {"image_token_id": token(_PLACEHOLDER[kind])}
    if kind == "llava":
        text, vision = {"model_type": "llama", **text}, {"model_type": "clip_vision_model", **vision}
        told |= {"vision_feature_select_strategy": "default", "vision_feature_layer": -2, "image_seq_length": 16}
    elif kind == "gemma3":
        vision["model_type"] = "siglip_vision_model"
        text |= {
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        told = {"image_token_id": token("<image_soft_token>"), "mm_tokens_per_image": 4}
        told |= {"boi_token_index": token("<start_of_image>"), "eoi_token_index": token("<end_of_image>")}
    elif kind in ("idefics3", "smolvlm"):
        text = {"model_type": "llama", **text}
        told |= {"scale_factor": 2, "pad_token_id": 1}
    elif kind == "mistral3":
        text, vision = {"model_type": "mistral", **text}, {"model_type": "pixtral", **vision, "head_dim": 8}
        told |= {"spatial_merge_size": 2, "vision_feature_layer": -1}
    else:
        text = {**_QWEN_TEXT, "vocab_size": len(tokenizer)}
        own = {"qwen2_vl": {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "depth": 2, "hidden_size": 32}}
        newer = {"hidden_size": 16, "num_heads": 2, "depth": 2, "intermediate_size": 24, "out_hidden_size": 32}
        newer |= {"window_size": 16, "fullatt_block_indexes": [1]}
        vision = {**own.get(kind, newer), "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        told = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
        told |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, tie_word_embeddings=False, **told)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)  # that what an image says is seen in what follows
    return model.eval()


def picture(number: int, size: tuple[int, int] = (20, 14), mode: str = "RGB") -> Image.Image:
    """An image that differs from others."""
    made = Image.new("RGB", size)
    made.putdata(  # type: ignore[no-untyped-call]
        [((x * 37 + number * 71) % 256, (y * 53 + number * 29) % 256, number * 97 % 256)
         for y in range(size[1]) for x in range(size[0])]
    )  # fmt: skip
    return made.convert(mode)


def image_bytes(number: int, kind: str = "PNG", **given: Any) -> bytes:
    file = io.BytesIO()
    picture(number, **given).save(file, kind)
    return file.getvalue()


def saved(kind: str, folder: Path) -> str:
    """The folder of a model with its tokenizer and processor."""
    tokenizer = tokenizer_of(kind)
    model_of(kind, tokenizer).save_pretrained(folder)
    processor_of(kind, tokenizer).save_pretrained(folder)
    return str(folder)

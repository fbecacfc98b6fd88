"""A tiny vision-language model in the shape of Qwen2.5-VL with random weights, its processor, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from PIL import Image
from torch import Tensor

from kedit_train import world
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.compatibility import TRANSFORMERS_4

if TRANSFORMERS_4:
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
else:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LAYERS = "model.language_model.layers"
SCOPE = [f"{LAYERS}.{i}.mlp.down_proj.weight" for i in (1, 2)]
TEXTS = ["The old baker found a coin near the river.", "A red fox slept.", "Where is the bridge? Answer: far away"]
IMAGES = [True, False, True, True]

_SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VISION = "model.visual."


class ImageProcessor(tf.Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without videos, whose processor needs torchvision."""

    if TRANSFORMERS_4:
        attributes = ["image_processor", "tokenizer"]
        tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **others: Any) -> None:
        if not TRANSFORMERS_4:
            super().__init__(image_processor, tokenizer, **others)
            return
        # The constructor of the parent needs a video processor.
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, **others)
        self.image_token, self.video_token = _SPECIAL[:2]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(_SPECIAL[:2])

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def build_tokenizer() -> Any:
    """Return the tokenizer of the bundled world with the special tokens of Qwen2.5-VL."""
    tokenizer = world.load()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    return tokenizer


def build_processor() -> Any:
    """Return a processor. An image of 8 x 8 pixels becomes 16 patches and 4 tokens."""
    size: Any = {"size": {"shortest_edge": 16, "longest_edge": 64}}
    if TRANSFORMERS_4:
        # transformers 4 ignores the size.
        size = {"min_pixels": 16, "max_pixels": 64}
    return ImageProcessor(Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, **size), build_tokenizer())


def build_model(tokenizer: Any, *, vision_depth: int = 3, seed: int = 0) -> Any:
    """Return a model in fp32 whose vision tower has modules with the names and shapes of the language model."""
    text = {
        "vocab_size": 1600,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    rope, theta = {"rope_type": "default", "mrope_section": [2, 1, 1]}, {"rope_theta": 10000.0}
    text |= {"rope_scaling": rope, **theta} if TRANSFORMERS_4 else {"rope_parameters": rope | theta}
    vision = {
        "depth": vision_depth,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 2,
        "window_size": 8,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    names = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(_SPECIAL), strict=True))
    torch.manual_seed(seed)
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = tf.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # With weights of 0.02, images would hardly change the logits.
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model.float()


def picture(seed: int) -> Image.Image:
    """Return an image of 8 x 8 random pixels."""
    values = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (8, 8), bytes(values.flatten().tolist()))


def batch_of(processor: Any, edits: Sequence[Any], images: Sequence[bool]) -> dict[str, Tensor]:
    """Return a batch with one row per edit. Only the target has labels.

    Args:
        processor: from :func:`build_processor`.
        edits: the edits.
        images: for each edit, whether an image comes before its prompt.
    """
    rows = list(zip(edits, images, strict=True))
    prompts = [f"{PICTURE if has_image else ''}{edit.prompt}" for edit, has_image in rows]
    texts = [f"{prompt} {edit.target}" for prompt, edit in zip(prompts, edits, strict=True)]
    pictures = [picture(i) for i, (_, has_image) in enumerate(rows) if has_image]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "return_token_type_ids": False}
    batch = dict(processor(images=[[p] for p in pictures] or None, text=texts, **options))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        own = dict(processor(images=[picture(row)] if images[row] else None, text=[prompt]))
        labels[row, : len(own["input_ids"][0])] = -100
    return batch | {"labels": labels}


def scope() -> ParameterScope:
    return ParameterScope("1-2", modules="mlp.down_proj.weight")


def bits(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().view(torch.int32).clone() for name, p in model.named_parameters()}


def changed(model: Any, before: dict[str, Tensor]) -> list[str]:
    """Return the parameters that have changed, and check that no entry of the vision tower has."""
    moved = {name: int((now != before[name]).sum()) for name, now in bits(model).items()}
    assert sum(count for name, count in moved.items() if name.startswith(VISION)) == 0
    return [name for name, count in moved.items() if count]


def train(model: Any, processor: Any, batch: dict[str, Tensor], callbacks: list[Any], steps: int = 3) -> Any:
    model.train()
    with editing(model, callbacks, tokenizer=processor.tokenizer, log_every_n_steps=1) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for _ in range(steps):
            edit.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return edit

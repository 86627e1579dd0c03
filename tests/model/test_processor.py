"""Images and prompts -> encoder inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from easyref.model.reference import (
    INSTRUCTION,
    ReferenceConfig,
    ReferenceProcessor,
    ReferenceSample,
    null_image,
)

from .conftest import GRID, PROMPTS, REFERENCES, picture, reference_config


def test_message_is_images_then_instruction_then_prompt(processor: ReferenceProcessor) -> None:
    message = processor.tokenizer.decode(processor.text([2, 3], "a red cat"))
    assert message == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "Visualize a scene that closely resembles the provided images, capturing the essence and details "
        "described in this prompt:\na red cat<|im_end|>\n<|im_start|>assistant\n"
    )


def test_image_is_cut_as_transformers_does(processor: ReferenceProcessor) -> None:
    image, config = picture(0, 50, 31), processor.config
    theirs = Qwen2VLImageProcessorPil(
        min_pixels=config.min_pixels, max_pixels=config.max_pixels, patch_size=4, merge_size=2, temporal_patch_size=2
    )(images=[image], return_tensors="pt")
    ours = processor.image(image)
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert torch.equal(ours.grid_thw, theirs["image_grid_thw"][0])
    assert config.min_pixels <= processor.num_merged_tokens(ours) * GRID**2 <= config.max_pixels


def test_published_image_size_gives_120_to_144_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """method.md 1.2: cond_image_size 336 of the real model."""
    real = ReferenceConfig(
        **reference_config().model_dump() | {"patch_size": 14, "min_pixels": 11**2 * 28**2, "max_pixels": (12**2 + 1) * 28**2}
    )
    processor = ReferenceProcessor(tokenizer, real)
    for width, height in ((512, 512), (1024, 683), (640, 360), (336, 1000)):
        patches = processor.image(picture(0, width, height))
        assert 120 <= processor.num_merged_tokens(patches) <= 144
        assert patches.pixel_values.shape[1] == 1176


def test_batch_pads_on_the_right_and_packs_images(processor: ReferenceProcessor) -> None:
    batch = processor(REFERENCES, PROMPTS)
    lengths = batch.mask_BL.sum(1)
    assert len(set(lengths.tolist())) == 3
    for row, length in zip(batch.mask_BL, lengths, strict=True):
        assert row[:length].all() and not row[length:].any()
    assert len(batch.image_grid_thw) == 6
    assert len(batch.pixel_values) == int(batch.image_grid_thw.prod(1).sum())
    assert int(batch.mm_token_type_ids_BL.sum()) * 4 == len(batch.pixel_values)
    for row, references, prompt in zip(range(3), REFERENCES, PROMPTS, strict=True):
        ids = processor.text([processor.num_merged_tokens(processor.image(r)) for r in references], prompt)
        assert torch.equal(batch.input_ids_BL[row, : lengths[row]], ids)


def test_long_prompt_is_never_cut(processor: ReferenceProcessor) -> None:
    prompt = "a very long description " * 500
    ids = processor([[picture(i) for i in range(processor.config.max_references)]], [prompt]).input_ids_BL
    assert INSTRUCTION + prompt in processor.tokenizer.decode(ids[0])


def test_number_of_references_is_checked(processor: ReferenceProcessor) -> None:
    with pytest.raises(ValueError, match="no reference image; give at least one"):
        processor.batch([ReferenceSample([], "a cat")])
    with pytest.raises(ValueError, match="6 reference images, the limit is 5; give fewer, or raise max_references"):
        processor([[picture(i) for i in range(6)]], ["a cat"])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_prompt_cannot_smuggle_special_tokens(processor: ReferenceProcessor, token: str) -> None:
    with pytest.raises(ValueError, match="remove it"):
        processor([[picture(0)]], [f"a cat {token}"])


def test_null_image_is_black_512() -> None:
    array = np.asarray(null_image())
    assert array.shape == (512, 512, 3) and not array.any()


def test_from_pretrained_reads_a_folder(processor: ReferenceProcessor, tmp_path: Path) -> None:
    processor.tokenizer.save_pretrained(tmp_path)
    again = ReferenceProcessor.from_pretrained(str(tmp_path), processor.config)
    assert torch.equal(again(REFERENCES, PROMPTS).input_ids_BL, processor(REFERENCES, PROMPTS).input_ids_BL)


def test_tokenizer_without_chat_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat_template; use the tokenizer of a Qwen2-VL"):
        ReferenceProcessor(bare, reference_config())


def test_config_is_complete_and_round_trips() -> None:
    config = reference_config()
    assert ReferenceConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="positions"):
        ReferenceConfig(**{k: v for k, v in config.model_dump().items() if k != "positions"})
    with pytest.raises(ValueError, match="extra"):
        reference_config(tokens=3)

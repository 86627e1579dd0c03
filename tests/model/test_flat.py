"""The flat encoders against the stock ones: any number and size of references, padding, both kinds of positions; text."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from easyref.model.flat import Aggregator, Prefix, Text, Vision, flat_inputs
from easyref.model.reference import ReferenceEncoder, ReferenceProcessor
from tests.model.conftest import randomize, reference_config


@pytest.mark.parametrize("changes", [{}, {"positions": "sequential", "prefix_final_norm": True, "final_layer_attention": "causal"}])
@torch.no_grad()
def test_flat_modules_are_the_stock_ones(make_mllm, tokenizer, changes: dict) -> None:
    config = reference_config(**changes)
    encoder = ReferenceEncoder(make_mllm(), config, torch.Generator().manual_seed(0)).eval()
    processor = ReferenceProcessor(tokenizer, config)
    rng = np.random.default_rng(0)
    sizes = [[(16, 30), (32, 16), (24, 24)], [(17, 17)]]
    images = [[Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in own] for own in sizes]
    inputs = processor(images, ["a red cat on a blue chair", "a cat"])
    bias = processor.bias(inputs, [[1.0, 2.0, 0.5], [1.0]]).float()
    see, read = flat_inputs(inputs, encoder.mllm, config.positions)
    embeds = Vision(encoder)(**see)
    for own, stock in zip(embeds, encoder.vision(inputs.pixel_values, inputs.image_grid_thw), strict=True):
        torch.testing.assert_close(own[: len(stock)], stock, atol=2e-5, rtol=1e-4)
    states = Prefix(encoder)(image_embeds=embeds, **read)
    stock = encoder.prefix(inputs)
    real = inputs.mask_BL.bool()
    torch.testing.assert_close(states[real], stock.states_BLD[real], atol=2e-5, rtol=1e-4)
    tokens = Aggregator(encoder)(states, read["positions"], read["mask"], bias)
    torch.testing.assert_close(tokens, encoder(inputs, bias), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(tokens, encoder(inputs), atol=1e-3)


@pytest.mark.parametrize("eos", [2, 49])  # 2 in published configs, where the largest id is the end
@torch.no_grad()
def test_text_is_what_sdxl_reads_of_clip(eos: int) -> None:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=9,
        projection_dim=24, eos_token_id=eos, bos_token_id=1, pad_token_id=49,
    )  # fmt: skip
    ids = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = ids[1, 8:] = 49  # the end, and padding that looks like it
    first, second = CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config).eval()
    for seed, model in enumerate((first, second)):
        randomize(model, seed)
    torch.testing.assert_close(Text(first)(ids), first(ids, output_hidden_states=True).hidden_states[-2], atol=1e-5, rtol=1e-5)
    states, pooled = Text(second)(ids)
    stock = second(ids, output_hidden_states=True)
    torch.testing.assert_close(states, stock.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, stock.text_embeds, atol=1e-5, rtol=1e-5)
    other = ids.clone()
    other[:, 7] = 3  # a later word changes no earlier state
    assert torch.equal(Text(first)(other)[:, :7], Text(first)(ids)[:, :7])

"""The flat encoder against the stock one: any number and size of references, padding, both kinds of positions."""

import numpy as np
import pytest
import torch
from PIL import Image

from easyref.model.flat import Aggregator, Prefix, Vision, flat_inputs
from easyref.model.reference import ReferenceEncoder, ReferenceProcessor
from tests.model.conftest import reference_config


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

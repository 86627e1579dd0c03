"""`easyref bench infer`: what references cost at inference, side by side in one run, with random weights.

A step: a UNet of SDXL's arrangement and more than 20 M parameters, plain; with EasyRef's attention and keys and values computed once an
image; and with diffusers' own IP-Adapter processors, which project the tokens in each step. 64 reference tokens, guidance on.
Encoding: a Qwen2-VL of middle size, 8 references of the paper's size; all of it, then a new prompt for the same references.

Times are CPU time of one thread, which other programs on the machine do not lengthen as they do wall time. Ratios are medians over
rounds, in each of which every method runs once, in turn; with the exact 95 % interval of the median.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import quantile_test

from easyref.model.adapter import Adapter
from easyref.model.attention import kv_layout
from easyref.model.reference import PrefixStart, ReferenceConfig, ReferenceEncoder, ReferenceProcessor, ReferenceSample
from easyref.progress import machine, track
from easyref.records import write_json

TOKENS, TEXT, WIDTH, SIDE = 64, 77, 512, 32  # reference tokens, text tokens, cross-attention width, latents' side
REFERENCES, PIXELS = 8, 336  # images of a sample and their side
FEWEST = 6  # values that have an exact 95 % interval of their median
RATIOS = {
    "adapter_over_plain": ("easyref", "plain"), "adapter_over_diffusers_ip_adapter": ("easyref", "diffusers_ip_adapter"),
    "new_prompt_over_first_encode": ("new_prompt", "first_encode"),
}  # fmt: skip


@torch.no_grad()
def bench_infer(out: Path, tokenizer: str, rounds: int = 60) -> dict[str, Any]:
    """Measure and write `out`. `tokenizer`: a folder with a Qwen2-VL tokenizer."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    step, parameters = step_methods()
    encode = encode_methods(tokenizer)
    took = {**_measure(step, rounds, "bench: steps"), **_measure(encode, max(FEWEST, rounds // 3), "bench: encode")}
    ms = {name: 1000 * statistics.median(values) for name, values in took.items()}
    pairs = {name: [a / b for a, b in zip(took[one], took[other], strict=True)] for name, (one, other) in RATIOS.items()}
    result = {
        **{name: round(statistics.median(values), 4) for name, values in pairs.items()},
        "intervals": {name: _interval(values) for name, values in pairs.items()},
        "median_ms": {name: round(value, 2) for name, value in ms.items()},
        "unet_parameters": parameters, "reference_tokens": TOKENS, "references": REFERENCES, "rounds": rounds,
        "threads": 1, "clock": "CPU time", **machine("torch", "diffusers", "transformers"),
    }  # fmt: skip
    write_json(out, result)
    return result


def _interval(values: list[float]) -> list[float]:
    return [round(float(end), 4) for end in quantile_test(values).confidence_interval()]


def _measure(methods: dict[str, Callable[[], Any]], rounds: int, title: str) -> dict[str, list[float]]:
    for method in methods.values():
        method()
    took: dict[str, list[float]] = {name: [] for name in methods}
    for number in track(range(rounds), title, rounds, "rounds"):
        names = list(methods)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.process_time()
            methods[name]()
            took[name].append(time.process_time() - begin)
    return took


def step_methods() -> tuple[dict[str, Callable[[], Any]], int]:
    """One call of the UNet by each method, and the UNet's parameters."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    build: Any = UNet2DConditionModel
    plain = build(
        sample_size=SIDE, block_out_channels=(128, 256, 512), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + WIDTH,
    ).eval().requires_grad_(False)  # fmt: skip
    parameters = sum(p.numel() for p in plain.parameters())
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    adapter = Adapter.install(ours, TOKENS, 8, 8.0, torch.Generator().manual_seed(0))
    adapter.merge_lora()
    processors = dict(theirs.attn_processors)
    for slot in kv_layout(theirs):
        attention = theirs.get_submodule(slot.name)
        processors[f"{slot.name}.processor"] = IPAdapterAttnProcessor2_0(attention.inner_dim, WIDTH, num_tokens=(TOKENS,), scale=1.0)
    theirs.set_attn_processor(processors)
    theirs.encoder_hid_proj = MultiIPAdapterImageProjection([torch.nn.Identity()])
    theirs.config.encoder_hid_dim_type = "ip_image_proj"
    sample, text = torch.randn(2, 4, SIDE, SIDE), torch.randn(2, TEXT, WIDTH)
    tokens = torch.randn(2, TOKENS, WIDTH)
    added = {"text_embeds": torch.randn(2, WIDTH), "time_ids": torch.zeros(2, 6)}
    payload = adapter.payload(tokens)
    call = lambda unet, **more: unet(sample, 500, text, added_cond_kwargs={**added, **more}, return_dict=False)[0]  # noqa: E731
    return {
        "plain": lambda: call(plain),
        "easyref": lambda: call(ours, image_embeds=[payload]),
        "diffusers_ip_adapter": lambda: call(theirs, image_embeds=[tokens[:, None]]),
    }, parameters


def encode_methods(tokenizer: str) -> dict[str, Callable[[], Any]]:
    """The first encode of a sample, and another prompt for its references."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = words.get_vocab()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={"depth": 6, "embed_dim": 256, "hidden_size": 512, "num_heads": 4, "patch_size": 14, "temporal_patch_size": 2},
        image_token_id=vocabulary["<|image_pad|>"], video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"], vision_end_token_id=vocabulary["<|vision_end|>"],
    )  # fmt: skip
    own = ReferenceConfig(
        num_tokens=TOKENS, cross_attention_dim=WIDTH, prefix_final_norm=False, final_layer_attention="bidirectional", positions="mrope",
        min_pixels=94864, max_pixels=113680, patch_size=14, merge_size=2, temporal_patch_size=2, max_references=REFERENCES,
    )  # fmt: skip
    encoder = ReferenceEncoder(Qwen2VLForConditionalGeneration(config), own, torch.Generator().manual_seed(0)).eval()
    processor = ReferenceProcessor(words, own)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)) for _ in range(REFERENCES)]
    prompt = "a farmer, smiling, in the style of the references"
    start = encoder.start(processor([images], [prompt]))

    def encode(start: PrefixStart) -> torch.Tensor:
        return encoder(encoder.prefix_from(start, processor.batch([ReferenceSample(start.images, prompt)])))

    return {"first_encode": lambda: encode(encoder.start(processor([images], [prompt]))), "new_prompt": lambda: encode(start)}

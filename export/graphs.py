"""The inference graphs of one EasyRef as torch modules with flat inputs, and their export to ONNX.

unet          sample, timestep, encoder_hidden_states, text_embeds, time_ids, reference_kv → noise; LoRA merged. Keys and values of the
              references are an INPUT: they do not depend on the timestep, so they are computed once an image.
reference_kv  tokens, scale → packed keys and values of all layers. λ is folded into the values (the output is linear in them), so the
              UNet needs no scale input and a scale per layer costs nothing.
vae_decoder   latents → image.
text_encoder, text_encoder_2
              token ids → the states that SDXL reads; the second one's pooled states too.
vision, prefix, aggregator
              the reference encoder in three parts (easyref/model/flat.py), for any number and size of references.

Letters: B batch · T reference tokens · X cross-attention width · W packed keys and values · C,h,w latents · L text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from easyref.model.attention import kv_layout, pack_reference_kv, packed_width, reference_kv
from easyref.model.flat import Aggregator, Prefix, Text, Vision, flat_inputs
from easyref.model.reference import ReferenceEncoder, ReferenceProcessor
from easyref.pipeline import EasyRef

EXTERNAL = 2**30  # bytes of weights from which they lie in a file of their own: a protobuf ends at 2 GiB
MAX_BATCH = 16  # the exporter needs a bound below 64, where diffusers' upsampling takes another branch


class UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        reference_kv: Tensor,
    ) -> Tensor:
        """sample [B, C, h, w], timestep [], encoder_hidden_states [B, L, X], text_embeds [B, P], time_ids [B, 6],
        reference_kv [B, T, W] → [B, C, h, w]."""
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids, "image_embeds": [reference_kv[:, None]]}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False)[0]


class ReferenceKV(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        """tokens [B, T, X], scale [layers] → [B, T, W]."""
        layers = reference_kv(self.unet, tokens)
        return pack_reference_kv([(k, v * scale[i]) for i, (k, v) in enumerate(layers)])[:, 0]


class Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w], as diffusion leaves them → image [B, 3, H, W] in [-1, 1]."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype), return_dict=False)[0].to(latents.dtype)


class Cast(nn.Module):
    """`module`, its output in `dtype`: the sinusoids of the added times come in single precision, and the exporter joins them as they
    are with half-precision embeddings, which ONNX Runtime refuses."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).to(self.dtype)


@dataclass(frozen=True)
class Graph:
    """One graph: module, example inputs by name, which of their axes are free, names of the outputs."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    free: dict[str, dict[int, Any]]
    outputs: tuple[str, ...]
    cases: Sequence[tuple[str, dict[str, Tensor]]] = ()  # inputs to verify with; none: they are drawn


def graphs(easyref: EasyRef) -> list[Graph]:
    """All graphs of one EasyRef."""
    pipe, encoder = easyref.pipe, easyref.encoder
    assert isinstance(encoder, ReferenceEncoder)
    easyref.adapter.set_scale(1.0)
    return [
        *unet_graphs(pipe.unet, encoder.config.num_tokens),
        decoder_graph(pipe.vae, pipe.unet.dtype),
        *text_graphs(pipe),
        *encoder_graphs(encoder, easyref.processor),
    ]


def unet_graphs(unet: Any, tokens_T: int) -> list[Graph]:
    """Examples have a batch of two and odd sizes: at even ones the exporter fixes every upsampling to a factor of two."""
    unet.eval()
    if unet.dtype == torch.float16:
        unet.add_time_proj = Cast(unet.add_time_proj, unet.dtype)
    c, layout = unet.config, kv_layout(unet)
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    draw = partial(_draw, torch.Generator().manual_seed(0), unet.dtype)
    b, length = _batch(), torch.export.Dim("l")
    inputs = {
        "sample": draw(2, c.in_channels, 9, 11), "timestep": torch.tensor(500),
        "encoder_hidden_states": draw(2, 7, c.cross_attention_dim), "text_embeds": draw(2, pooled), "time_ids": draw(2, 6),
        "reference_kv": draw(2, tokens_T, packed_width(layout)),
    }  # fmt: skip
    return [
        Graph(
            "unet", UNet(unet), inputs,
            {"sample": {0: b, **_sides()}, "timestep": {}, "encoder_hidden_states": {0: b, 1: length}, "text_embeds": {0: b},
             "time_ids": {0: b}, "reference_kv": {0: b}}, ("noise",),
        ),
        Graph(
            "reference_kv", ReferenceKV(unet), {"tokens": draw(2, tokens_T, c.cross_attention_dim), "scale": torch.ones(len(layout))},
            {"tokens": {0: b}, "scale": {}}, ("reference_kv",),
        ),
    ]  # fmt: skip


def decoder_graph(vae: Any, dtype: torch.dtype) -> Graph:
    """`dtype`: of the latents."""
    vae.eval()
    if dtype == torch.float16 and vae.config.force_upcast:  # SDXL's overflows in half precision
        vae.float()
    latents = _draw(torch.Generator().manual_seed(0), dtype, 2, vae.config.latent_channels, 9, 11)
    return Graph("vae_decoder", Decoder(vae), {"latents": latents}, {"latents": {0: _batch(), **_sides()}}, ("image",))


#: Prompts of a batch that is verified; the last one is cut at the tokenizer's end.
PROMPTS = (["a cat in blue, standing on a chair", ""], ["farmer"], ["a very long prompt " * 40, "farmer", "cat"])


def text_graphs(pipe: Any) -> list[Graph]:
    found = []
    for name, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        encoder = getattr(pipe, name).eval()
        cases = [(f"{len(p)} prompts", {"input_ids": text_ids(tokenizer, p)}) for p in PROMPTS]
        outputs = ("states", "pooled") if hasattr(encoder, "text_projection") else ("states",)
        found.append(Graph(name, Text(encoder), cases[0][1], {"input_ids": {0: _batch()}}, outputs, cases))
    return found


def text_ids(tokenizer: Any, prompts: list[str]) -> Tensor:
    """As the pipeline makes them: always of full length."""
    most = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt").input_ids


def _draw(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def _batch() -> Any:
    return torch.export.Dim("b", min=1, max=MAX_BATCH)


def _sides() -> dict[int, Any]:
    return {2: torch.export.Dim("h"), 3: torch.export.Dim("w")}


def shapes_of(easyref: EasyRef) -> dict[str, Any]:
    """What an engine's profile needs to know of the model: numbers of the manifest."""
    c = easyref.encoder.config
    side = c.patch_size * c.merge_size
    least, most = c.min_pixels // side**2, c.max_pixels // side**2
    text = len(easyref.processor.text([1], "")) - 1
    return {
        "layers": len(kv_layout(easyref.pipe.unet)), "vae_factor": easyref.pipe.vae_scale_factor,
        "merged": [max(1, least // 2), most, 2 * most],  # a long, narrow image passes the bounds on both sides
        "around": text + 3 * c.max_references,
    }  # fmt: skip


#: Number of references of each sample of a batch that is verified.
REFERENCES = ((2, 3), (1,), (2,), (8, 1), (24,))


@torch.no_grad()
def encoder_graphs(
    encoder: ReferenceEncoder, processor: ReferenceProcessor, references: Sequence[tuple[int, ...]] = REFERENCES
) -> list[Graph]:
    """Cases are batches of images of several sizes and prompts of several lengths, through the processor of a real run."""
    encoder.eval()
    vision, prefix, aggregator = Vision(encoder), Prefix(encoder), Aggregator(encoder)
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[str, dict[str, Tensor]]]] = {"vision": [], "prefix": [], "aggregator": []}
    for counts in references:
        if max(counts) > encoder.config.max_references:
            continue
        sizes = [[tuple(rng.integers(48, 144, 2)) for _ in range(count)] for count in counts]
        images = [[Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in own] for own in sizes]
        prompts = ["a cat in blue, standing on a chair", "farmer"][: len(counts)]
        inputs = processor(images, prompts)
        weights = [[1.0 + (i % 3) / 2 for i in range(count)] for count in counts]
        see, read = flat_inputs(inputs, encoder.mllm, encoder.config.positions)
        embeds = vision(**see)
        states = prefix(image_embeds=embeds, **read)
        label = f"{' and '.join(map(str, counts))} references"
        found["vision"].append((label, see))
        found["prefix"].append((label, {"input_ids": read.pop("input_ids"), "image_embeds": embeds, **read}))
        bias = processor.bias(inputs, weights).to(states.dtype)
        found["aggregator"].append((label, {"states": states, "positions": read["positions"], "mask": read["mask"], "bias": bias}))
    b, length, n = _batch(), torch.export.Dim("l"), torch.export.Dim("n")
    m = torch.export.Dim("m")
    merged = encoder.config.merge_size**2 * m
    free: dict[str, dict[str, dict[int, Any]]] = {
        "vision": {"patches": {0: n, 1: merged}, "places": {0: n, 1: merged}, "patch_mask": {0: n, 1: merged}},
        "prefix": {"input_ids": {0: b, 1: length}, "image_embeds": {0: n, 1: m}, "gather": {0: b, 1: length},
                   "positions": {1: b, 2: length}, "mask": {0: b, 1: length}},
        "aggregator": {"states": {0: b, 1: length}, "positions": {1: b, 2: length}, "mask": {0: b, 1: length},
                       "bias": {0: b, 1: length}},
    }  # fmt: skip
    outputs = {"vision": "image_embeds", "prefix": "states", "aggregator": "tokens"}
    modules: dict[str, nn.Module] = {"vision": vision, "prefix": prefix, "aggregator": aggregator}
    return [Graph(name, modules[name], found[name][0][1], free[name], (outputs[name],), found[name]) for name in modules]


@torch.no_grad()
def export_graph(graph: Graph, path: Path, opset: int) -> None:
    """Write `path` (and `path`.data beside it if the weights are large), without the exporter's stack traces and paths."""
    import onnx
    import onnx_ir

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says for every operator that torchvision is missing
    program = torch.onnx.export(
        graph.module.eval(), (), kwargs=graph.inputs, dynamo=True, opset_version=opset, input_names=list(graph.inputs),
        output_names=list(graph.outputs), dynamic_shapes=graph.free, external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model
    body: Any
    for body in [model.graph, *model.functions.values()]:
        for node in onnx_ir.traversal.RecursiveGraphIterator(body):
            node.metadata_props.clear()
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    # Straight from torch's memory: a second copy of the weights would be too much where one fits
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights > EXTERNAL else None)
    onnx.checker.check_model(str(path))

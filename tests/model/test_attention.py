"""Decoupled cross-attention against diffusers' own processor, against fp64 maths, and inside real pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from easyref.model.adapter import Adapter
from easyref.model.attention import kv_layout, packed_width, processors, reference_kv

from .conftest import T, X, randomize, unet_inputs

Make = Callable[..., UNet2DConditionModel]


def install(unet: UNet2DConditionModel, scale: float = 0.7, seed: int = 5) -> Adapter:
    """With K_ref/V_ref unlike the text's."""
    adapter = Adapter.install(unet, T, None, None, scale=scale)
    for processor in processors(unet).values():
        randomize(processor, seed := seed + 1)
    return adapter


def with_images(inputs: dict[str, Any], payload: Tensor) -> dict[str, Any]:
    return inputs | {"added_cond_kwargs": inputs["added_cond_kwargs"] | {"image_embeds": [payload]}}


def test_unet_equals_diffusers_own_processor(make_unet: Make) -> None:
    ours, theirs, inputs = make_unet(), make_unet(), unet_inputs()
    install(ours)
    official = dict(theirs.attn_processors)
    for name, processor in processors(ours).items():
        official[f"{name}.processor"] = IPAdapterAttnProcessor2_0(processor.hidden_size, X, num_tokens=(T,), scale=0.7)
        official[f"{name}.processor"].load_state_dict(processor.state_dict())
    theirs.set_attn_processor(official)
    theirs.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
    theirs.config.encoder_hid_dim_type = "ip_image_proj"
    assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


def test_one_layer_equals_two_softmaxes_in_fp64(make_unet: Make) -> None:
    unet = make_unet().double()
    install(unet, scale=0.7)
    g = torch.Generator().manual_seed(0)
    for slot in kv_layout(unet):
        attn = unet.get_submodule(slot.name)
        own = processors(unet)[slot.name]
        hidden, text, reference = (torch.randn(2, n, w, generator=g, dtype=torch.float64) for n, w in ((9, slot.width), (7, X), (T, X)))

        def attend(k_weight: Tensor, v_weight: Tensor, context: Tensor, attn: Any = attn, hidden: Tensor = hidden) -> Tensor:
            q = torch.einsum("bsc,hec->bhse", hidden, attn.to_q.weight.unflatten(0, (attn.heads, -1)))
            k = torch.einsum("btx,hex->bhte", context, k_weight.unflatten(0, (attn.heads, -1)))
            v = torch.einsum("btx,hex->bhte", context, v_weight.unflatten(0, (attn.heads, -1)))
            p = (torch.einsum("bhse,bhte->bhst", q, k) / q.shape[-1] ** 0.5).softmax(-1)
            return torch.einsum("bhst,bhte->bshe", p, v).flatten(2)

        expected = attend(attn.to_k.weight, attn.to_v.weight, text)
        expected = expected + 0.7 * attend(own.to_k_ip[0].weight, own.to_v_ip[0].weight, reference)
        expected = expected @ attn.to_out[0].weight.T + attn.to_out[0].bias
        actual = attn(hidden, encoder_hidden_states=(text, [reference[:, None]]))
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_precomputed_kv_equals_tokens(make_unet: Make) -> None:
    unet, inputs = make_unet(), unet_inputs()
    adapter = install(unet)
    payload = adapter.payload(inputs["added_cond_kwargs"]["image_embeds"][0][:, 0])
    assert payload.shape == (2, 1, T, packed_width(kv_layout(unet)))
    torch.testing.assert_close(unet(**with_images(inputs, payload)).sample, unet(**inputs).sample, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_precomputed_kv_is_exact_in_fp64(make_unet: Make, scale: float) -> None:
    """Attention with fewer passes is the same sums: the whole UNet by both ways, and by diffusers' code for packed keys and values."""
    unet, inputs = make_unet().double(), unet_inputs(dtype=torch.float64)
    adapter = install(unet, scale=scale)
    payload = adapter.payload(inputs["added_cond_kwargs"]["image_embeds"][0][:, 0])
    ours, from_tokens = unet(**with_images(inputs, payload)).sample, unet(**inputs).sample
    torch.testing.assert_close(ours, from_tokens, atol=1e-12, rtol=0)
    everywhere = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8, dtype=torch.float64)]}}
    torch.testing.assert_close(unet(**with_images(inputs, payload) | everywhere).sample, from_tokens, atol=1e-12, rtol=0)


def test_precomputed_kv_needs_no_projection(make_unet: Make) -> None:
    """So the reference K/V can leave the UNet for inference and export."""
    unet, inputs = make_unet(), unet_inputs()
    adapter = install(unet)
    payload = adapter.payload(inputs["added_cond_kwargs"]["image_embeds"][0][:, 0])
    expected = unet(**inputs).sample
    for parameter in adapter.parts()["reference_kv"]:
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(unet(**with_images(inputs, payload)).sample, expected, atol=1e-6, rtol=0)


def test_layout_names_every_slot_of_the_packed_kv(make_unet: Make) -> None:
    unet = make_unet()
    adapter = install(unet)
    tokens = torch.randn(2, T, X, generator=torch.Generator().manual_seed(0))
    payload, kv = adapter.payload(tokens)[:, 0], reference_kv(unet, tokens)
    assert len(kv) == len(kv_layout(unet)) == 8
    for slot, (k, v) in zip(kv_layout(unet), kv, strict=True):
        own = processors(unet)[slot.name]
        assert torch.equal(k, tokens @ own.to_k_ip[0].weight.T) and torch.equal(v, tokens @ own.to_v_ip[0].weight.T)
        assert torch.equal(payload[..., slot.offset : slot.offset + slot.width], k)
        assert torch.equal(payload[..., slot.offset + slot.width : slot.offset + 2 * slot.width], v)


def test_reference_kv_start_as_copies_of_the_text_kv(make_unet: Make) -> None:
    unet = make_unet()
    Adapter.install(unet, T, None, None)
    for name, processor in processors(unet).items():
        attn = unet.get_submodule(name)
        for ours, text in ((processor.to_k_ip[0], attn.to_k), (processor.to_v_ip[0], attn.to_v)):
            assert torch.equal(ours.weight, text.weight) and ours.weight.data_ptr() != text.weight.data_ptr()


def test_scale_zero_is_the_plain_unet(make_unet: Make) -> None:
    unet, inputs = make_unet(), unet_inputs()
    without = inputs | {"added_cond_kwargs": {k: v for k, v in inputs["added_cond_kwargs"].items() if k != "image_embeds"}}
    plain = unet(**without).sample
    adapter = install(unet)
    assert not torch.equal(unet(**inputs).sample, plain)
    adapter.set_scale(0.0)
    assert torch.equal(unet(**inputs).sample, plain)


def test_scale_can_be_set_by_block(make_unet: Make) -> None:
    unet = make_unet()
    adapter = install(unet, scale=1.0)
    adapter.set_scale({"mid_block": 0.25})
    assert {n.split(".")[0]: p.scale for n, p in processors(unet).items()} == {
        "down_blocks": [1.0], "up_blocks": [1.0], "mid_block": [0.25],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no cross-attention starts with 'middle'"):
        adapter.set_scale({"middle": 0.5})


def test_wrong_payload_width_is_explained(make_unet: Make) -> None:
    unet, inputs = make_unet(), unet_inputs()
    install(unet)
    with pytest.raises(ValueError, match="image_embeds are 40 wide; give reference tokens"):
        unet(**with_images(inputs, torch.zeros(2, 1, T, 40)))


def test_regional_masks_work_with_precomputed_kv(make_unet: Make) -> None:
    unet, inputs = make_unet(), unet_inputs()
    adapter = install(unet)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    payload = adapter.payload(inputs["added_cond_kwargs"]["image_embeds"][0][:, 0])
    masked = unet(**inputs).sample
    torch.testing.assert_close(unet(**with_images(inputs, payload)).sample, masked, atol=1e-6, rtol=0)
    assert not torch.equal(masked, unet(**inputs | {"cross_attention_kwargs": None}).sample)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


def run(pipe: Any, image_embeds: Tensor, **extra: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    negative, positive = (torch.randn(1, 7, X, generator=g) for _ in range(2))
    negative_pooled, pooled = (torch.randn(1, 32, generator=g) for _ in range(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled, ip_adapter_image_embeds=[image_embeds], num_inference_steps=2,
        guidance_scale=5.0, latents=torch.randn(1, 4, 8, 8, generator=g), height=8, width=8, output_type="latent", **extra,
    ).images  # fmt: skip


def test_pipelines_take_tokens_and_precomputed_kv(make_unet: Make, vae: AutoencoderKL) -> None:
    """Text-to-image under guidance (negative first) and ControlNet, whose branch sees the text only."""
    unet = make_unet()
    control = copy.deepcopy(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16,))).eval()
    adapter = install(unet)
    parts = (vae, None, None, None, None, unet)
    tokens = torch.randn(2, T, X, generator=torch.Generator().manual_seed(3))  # null reference, references
    pipe = StableDiffusionXLPipeline(*parts, DDIMScheduler())
    from_tokens = run(pipe, tokens[:, None])
    torch.testing.assert_close(run(pipe, adapter.payload(tokens)), from_tokens, atol=1e-4, rtol=0)
    assert not torch.equal(run(pipe, tokens.flip(0)[:, None]), from_tokens)

    pipe = StableDiffusionXLControlNetPipeline(*parts[:-1], unet, control, DDIMScheduler())
    run(pipe, adapter.payload(tokens), image=torch.rand(1, 3, 8, 8))

    pipe.set_ip_adapter_scale(0.4)  # diffusers' own way to set lambda
    assert all(p.scale == [0.4] for p in processors(unet).values())

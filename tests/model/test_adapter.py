"""Install and uninstall, LoRA, the adapter's own state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from easyref.model import lora
from easyref.model.adapter import Adapter

from .conftest import T, unet_inputs

Make = Callable[..., UNet2DConditionModel]
RANK, ALPHA = 4, 6.0  # alpha != rank, so that a forgotten alpha shows


def install(unet: UNet2DConditionModel, rank: int | None = RANK, trained: bool = True) -> Adapter:
    adapter = Adapter.install(unet, T, rank, ALPHA, torch.Generator().manual_seed(0))
    if trained:
        g = torch.Generator().manual_seed(9)
        for parameter in (p for part in adapter.parts().values() for p in part):
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * parameter.shape[1] ** -0.5)
    return adapter


def without_images(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"added_cond_kwargs": {k: v for k, v in inputs["added_cond_kwargs"].items() if k != "image_embeds"}}


def weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in unet.state_dict().items()}


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("merged", [False, True])
def test_uninstall_gives_the_unet_back_exactly(make_unet: Make, rank: int | None, merged: bool) -> None:
    unet, inputs = make_unet(), without_images(unet_inputs())
    unet.conv_in.requires_grad_(False)
    before, output, config = weights(unet), unet(**inputs).sample, dict(unet.config)
    modules = [(n, type(m)) for n, m in unet.named_modules()]
    kinds = {n: type(p) for n, p in unet.attn_processors.items()}
    grads = {n: p.requires_grad for n, p in unet.named_parameters()}
    attributes = set(vars(unet))

    adapter = install(unet, rank)
    assert not torch.equal(unet(**unet_inputs()).sample, output)
    if merged:
        adapter.merge_lora()
    adapter.uninstall()

    assert torch.equal(unet(**inputs).sample, output)
    after = unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert [(n, type(m)) for n, m in unet.named_modules()] == modules
    assert {n: type(p) for n, p in unet.attn_processors.items()} == kinds
    assert dict(unet.config) == config and unet.config.encoder_hid_dim_type is None
    assert {n: p.requires_grad for n, p in unet.named_parameters()} == grads
    assert {a for a in vars(unet) if getattr(unet, a) is not None} == {a for a in attributes if getattr(unet, a) is not None}
    install(unet, rank).uninstall()  # and it can be installed again


@pytest.mark.parametrize("rank", [None, RANK])
def test_only_the_adapter_is_trainable_and_all_of_it_learns(make_unet: Make, rank: int | None) -> None:
    unet = make_unet()
    parts = install(unet, rank).parts()
    assert {tag: len(part) for tag, part in parts.items()} == {"reference_kv": 8 * 2, "lora": 16 * 4 * 2 if rank else 0}
    own = [p for part in parts.values() for p in part]
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in own}
    unet(**unet_inputs()).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in own)


def test_lora_is_on_q_k_v_out_of_every_attention_and_nowhere_else(make_unet: Make) -> None:
    unet = make_unet()
    attentions = [n for n, _ in unet.named_modules() if n.endswith((".attn1", ".attn2"))]
    install(unet)
    assert set(lora.wrapped(unet)) == {f"{n}.{p}" for n in attentions for p in ("to_q", "to_k", "to_v", "to_out.0")}


def test_fresh_lora_changes_nothing(make_unet: Make) -> None:
    plain, with_lora, inputs = make_unet(), make_unet(), unet_inputs()
    install(plain, None, trained=False)
    install(with_lora, trained=False)
    assert torch.equal(with_lora(**inputs).sample, plain(**inputs).sample)


def test_lora_equals_its_equation_in_fp64(make_unet: Make) -> None:
    """y = W x + b + alpha / rank * B A x."""
    unet = make_unet().double()
    adapter = install(unet)
    state = adapter.state_dict()
    for name, module in lora.wrapped(unet).items():
        base = module.get_base_layer()
        down, up = state[f"lora.{name}.down.weight"], state[f"lora.{name}.up.weight"]
        assert down.shape == (RANK, base.in_features) and up.shape == (base.out_features, RANK)
        x = torch.randn(3, base.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = torch.einsum("bi,oi->bo", x, base.weight) + ALPHA / RANK * torch.einsum("bi,ri,or->bo", x, down, up)
        expected = expected if base.bias is None else expected + base.bias
        torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


def test_merge_is_the_same_and_unmerge_is_exact(make_unet: Make) -> None:
    unet, inputs = make_unet(), unet_inputs()
    adapter = install(unet)
    before, output = weights(unet), unet(**inputs).sample
    adapter.merge_lora()
    merged = unet(**inputs).sample
    assert (merged - output).abs().max() <= 1e-5 * output.abs().max()
    assert not lora.wrapped(unet)
    plain = {k.replace(".base_layer.", "."): v for k, v in before.items()}
    changed = [k for k, v in unet.state_dict().items() if not torch.equal(v, plain[k])]
    assert len(changed) == 16 * 4
    adapter.merge_lora()  # merging twice is merging once
    assert torch.equal(unet(**inputs).sample, merged)
    adapter.unmerge_lora()
    after = unet.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(unet(**inputs).sample, output)


def test_another_lora_on_a_merged_one_counts_and_leaves_it(make_unet: Make) -> None:
    """The same as both side by side."""
    merged, beside, inputs = make_unet(), make_unet(), unet_inputs()
    style = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    adapters = [install(merged), install(beside)]
    adapters[0].merge_lora()
    without = merged(**inputs).sample
    for unet in (merged, beside):
        torch.manual_seed(5)  # peft draws from the global generator
        unet.add_adapter(style, "style")
    beside.set_adapters(["easyref", "style"])
    assert not torch.equal(merged(**inputs).sample, without)
    torch.testing.assert_close(merged(**inputs).sample, beside(**inputs).sample, atol=1e-4, rtol=1e-4)
    adapters[0].uninstall()
    adapters[1].uninstall()
    beside.set_adapters(["style"])
    assert torch.equal(merged(**without_images(inputs)).sample, beside(**without_images(inputs)).sample)


def test_merged_lora_refuses_new_weights(make_unet: Make) -> None:
    adapter = install(make_unet())
    adapter.merge_lora()
    for use in (adapter.state_dict, lambda: adapter.load_state_dict({})):
        with pytest.raises(ValueError, match="call unmerge_lora"):
            use()


def test_state_round_trips_and_holds_nothing_of_the_unet(make_unet: Make) -> None:
    one, two, inputs = make_unet(), make_unet(), unet_inputs()
    trained = install(one)
    fresh = install(two, trained=False)
    state = trained.state_dict()
    assert len(state) == 8 * 2 + 16 * 4 * 2
    assert "reference_kv.mid_block.attentions.0.transformer_blocks.0.attn2.k.weight" in state
    assert "lora.mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0.down.weight" in state
    fresh.load_state_dict(state)
    assert torch.equal(one(**inputs).sample, two(**inputs).sample)
    state.popitem()
    with pytest.raises(ValueError, match="adapter state does not fit"):
        fresh.load_state_dict(state)


def test_lora_starts_from_the_generator_alone(make_unet: Make) -> None:
    unet = make_unet()
    before = torch.random.get_rng_state()
    one = install(unet, trained=False).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    two = install(make_unet(), trained=False).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    name = next(k for k in one if k.endswith("to_q.down.weight"))
    assert one[name].abs().max().item() == pytest.approx(1 / math.sqrt(one[name].shape[1]), rel=0.1)


def test_other_loras_live_beside_ours(make_unet: Make) -> None:
    unet, inputs = make_unet(), without_images(unet_inputs())
    adapter = install(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    adapter.uninstall()
    assert set(unet.peft_config) == {"style"}
    with_style = unet(**inputs).sample
    unet.unload_lora()
    assert not torch.equal(unet(**inputs).sample, with_style)
    assert torch.equal(unet(**inputs).sample, make_unet()(**inputs).sample)


def test_install_refuses_an_occupied_unet(make_unet: Make) -> None:
    unet = make_unet()
    install(unet)
    with pytest.raises(ValueError, match="already has an image adapter"):
        install(unet)
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="already carries LoRA layers; install EasyRef first"):
        install(unet)
    with pytest.raises(ValueError, match="LoRA needs lora_alpha and a generator"):
        Adapter.install(make_unet(), T, RANK, None)


def test_failed_install_leaves_the_unet_alone(make_unet: Make) -> None:
    unet = make_unet()
    with pytest.raises(ValueError, match="generator"):
        Adapter.install(unet, T, RANK, ALPHA)
    assert unet.encoder_hid_proj is None and all(p.requires_grad for p in unet.parameters())


def test_bf16_unet_gets_a_bf16_adapter(make_unet: Make) -> None:
    unet = make_unet().bfloat16()
    adapter = install(unet)
    assert {t.dtype for t in adapter.state_dict().values()} == {torch.bfloat16}
    assert unet(**unet_inputs(dtype=torch.bfloat16)).sample.dtype == torch.bfloat16

"""The reference encoder against independent maths in fp64, against transformers, and by its properties.

transformers computes RMSNorm and rotary angles in fp32 whatever the model's dtype, so fp64 runs agree to about 1e-6, not 1e-15.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from easyref.model.reference import PrefixStates, ReferenceEncoder, ReferenceInputs, ReferenceProcessor

from .conftest import PROMPTS, REFERENCES, D, T, X, picture, reference_config

Make = Callable[..., ReferenceEncoder]
SWITCHES = [
    {"prefix_final_norm": n, "final_layer_attention": a, "positions": p}
    for n, a, p in itertools.product((False, True), ("bidirectional", "causal"), ("mrope", "sequential"))
]
all_switches = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(str(v) for v in s.values()))
CLOSE: dict[str, float] = {"atol": 2e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def inputs(processor: ReferenceProcessor) -> ReferenceInputs:
    return processor(REFERENCES, PROMPTS)


# ---- independent maths: one unpadded sample, one head at a time, complex rotation, no transformers code ----


def rms_norm(x_SD: Tensor, weight: Tensor) -> Tensor:
    return weight * x_SD / (torch.einsum("sd,sd->s", x_SD, x_SD) / x_SD.shape[1] + 1e-6).sqrt()[:, None]


def rope(x_SE: Tensor, positions_3S: Tensor) -> Tensor:
    """Component i and i+E/2 are one complex number, turned by position * theta^(-2i/E); axis of i from mrope_section 1,1,2."""
    half = x_SE.shape[1] // 2
    axes = [0, 1, 2, 2]
    angles = torch.stack([positions_3S[axes[i]].double() * 1e4 ** (-2 * i / x_SE.shape[1]) for i in range(half)], dim=1)
    turned = torch.complex(x_SE[:, :half], x_SE[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=1)


def decoder_layer(x_SD: Tensor, positions_3S: Tensor, may_see_SS: Tensor, w: dict[str, Tensor]) -> Tensor:
    heads, kv_heads, width = 4, 2, D // 4
    n_SD = rms_norm(x_SD, w["input_layernorm.weight"])

    def project(name: str, head: int) -> Tensor:
        rows = slice(head * width, (head + 1) * width)
        weight, bias = w[f"self_attn.{name}_proj.weight"][rows], w[f"self_attn.{name}_proj.bias"][rows]
        return torch.einsum("sd,ed->se", n_SD, weight) + bias

    outs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q, k = rope(project("q", head), positions_3S), rope(project("k", group), positions_3S)
        scores = torch.einsum("qe,ke->qk", q, k) / width**0.5
        weights = torch.where(may_see_SS, scores, -torch.inf).exp()
        outs.append(torch.einsum("qk,ke->qe", weights / weights.sum(1, keepdim=True), project("v", group)))
    x_SD = x_SD + torch.cat(outs, dim=1) @ w["self_attn.o_proj.weight"].T
    n_SD = rms_norm(x_SD, w["post_attention_layernorm.weight"])
    gate = n_SD @ w["mlp.gate_proj.weight"].T
    return x_SD + (gate / (1 + (-gate).exp()) * (n_SD @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def expected_positions(is_image: list[bool], grids: list[list[int]], mode: str) -> Tensor:
    """positions_3L: text counts up on all axes; an image has (start, start + row, start + column), then max side follows."""
    if mode == "sequential":
        return torch.arange(len(is_image)).expand(3, -1)
    rows: list[list[int]] = []
    at, token, waiting = 0, 0, list(grids)
    while token < len(is_image):
        if not is_image[token]:
            rows.append([at, at, at])
            at, token = at + 1, token + 1
            continue
        _, height, width = waiting.pop(0)
        height, width = height // 2, width // 2
        rows += [[at, at + r, at + c] for r in range(height) for c in range(width)]
        at, token = at + max(height, width), token + height * width
    return torch.tensor(rows).T


def weights_of(encoder: ReferenceEncoder, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in encoder.state_dict().items() if k.startswith(prefix)}


def independent(encoder: ReferenceEncoder, inputs: ReferenceInputs, switches: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Prefix states [L, D] and tokens [T, X] of each sample."""
    images = encoder.vision(inputs.pixel_values, inputs.image_grid_thw)
    grids = inputs.image_grid_thw.tolist()
    all_states, all_tokens = [], []
    w = weights_of(encoder, "")
    for ids, mask, kinds, references in zip(inputs.input_ids_BL, inputs.mask_BL, inputs.mm_token_type_ids_BL, REFERENCES, strict=True):
        length = int(mask.sum())
        is_image = [bool(k) for k in kinds[:length]]
        mine, images = torch.cat(images[: len(references)]), images[len(references) :]
        positions = expected_positions(is_image, grids[: len(references)], switches["positions"])
        grids = grids[len(references) :]
        x_SD = w["mllm.language_model.embed_tokens.weight"][ids[:length]].clone()
        x_SD[torch.tensor(is_image)] = mine
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for i in range(2):
            x_SD = decoder_layer(x_SD, positions, causal, weights_of(encoder, f"mllm.language_model.layers.{i}."))
        if switches["prefix_final_norm"]:
            x_SD = rms_norm(x_SD, w["mllm.language_model.norm.weight"])
        all_states.append(x_SD)

        positions = torch.cat([positions, (positions.max() + 1 + torch.arange(T)).expand(3, -1)], dim=1)
        may_see = torch.ones(length + T, length + T, dtype=torch.bool)
        if switches["final_layer_attention"] == "causal":
            may_see = may_see.tril()
        x_SD = torch.cat([x_SD, w["reference_tokens"]])
        x_SD = decoder_layer(x_SD, positions, may_see, weights_of(encoder, "final_layer."))[-T:]
        x_SD = rms_norm(x_SD, w["norm.weight"]) @ w["projector.hidden.weight"].T + w["projector.hidden.bias"]
        x_SD = x_SD * (1 + torch.erf(x_SD / 2**0.5)) / 2
        x_TX = x_SD @ w["projector.out.weight"].T + w["projector.out.bias"]
        x_TX = (x_TX - x_TX.mean(1, keepdim=True)) / (x_TX.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        all_tokens.append(x_TX * w["projector.norm.weight"] + w["projector.norm.bias"])
    return all_states, all_tokens


@all_switches
def test_encoder_equals_independent_fp64_maths(make_encoder: Make, inputs: ReferenceInputs, switches: dict[str, Any]) -> None:
    encoder = make_encoder(**switches)
    with torch.no_grad():
        for parameter in encoder.norm.parameters():  # the two norms part in training: they must not be mixed up
            parameter.mul_(1.3)
        states, tokens = independent(encoder, inputs, switches)
        prefix = encoder.prefix(inputs)
        for row, expected in zip(prefix.states_BLD, states, strict=True):
            torch.testing.assert_close(row[: len(expected)], expected, **CLOSE)
        torch.testing.assert_close(encoder(inputs), torch.stack(tokens), **CLOSE)


def test_switches_all_matter(make_encoder: Make, inputs: ReferenceInputs) -> None:
    results = [make_encoder(**switches)(inputs) for switches in SWITCHES]
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 1e-3


# ---- against transformers ----


def stock(model: Any, inputs: ReferenceInputs, positions: str) -> tuple[Tensor, ...]:
    length = inputs.input_ids_BL.shape[1]
    return model.model(
        input_ids=inputs.input_ids_BL,
        attention_mask=inputs.mask_BL,
        mm_token_type_ids=inputs.mm_token_type_ids_BL,
        pixel_values=inputs.pixel_values,
        image_grid_thw=inputs.image_grid_thw,
        position_ids=torch.arange(length).expand(3, 3, -1) if positions == "sequential" else None,
        output_hidden_states=True,
    ).hidden_states


@pytest.mark.parametrize("positions", ["mrope", "sequential"])
@pytest.mark.parametrize("norm", [False, True])
def test_prefix_equals_hidden_states_of_transformers(
    make_encoder: Make, make_mllm: Callable[..., Any], inputs: ReferenceInputs, positions: str, norm: bool
) -> None:
    full = make_mllm().double()
    before_last = stock(full, inputs, positions)[-2]
    expected = full.model.language_model.norm(before_last) if norm else before_last
    ours = make_encoder(positions=positions, prefix_final_norm=norm).prefix(inputs).states_BLD
    real = inputs.mask_BL.bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-12, rtol=0)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("positions", ["mrope", "sequential"])
def test_aggregate_equals_whole_last_layer_of_transformers(
    make_encoder: Make, make_mllm: Callable[..., Any], inputs: ReferenceInputs, attention: str, positions: str
) -> None:
    encoder = make_encoder(final_layer_attention=attention, positions=positions)
    prefix = encoder.prefix(inputs)
    lm = make_mllm().double().model.language_model
    length = prefix.mask_BL.shape[1]
    all_BSD = torch.cat([prefix.states_BLD, encoder.reference_tokens.expand(3, -1, -1)], dim=1)
    mask = torch.ones(3, 1, length + T, length + T, dtype=torch.bool)
    mask = mask.tril() if attention == "causal" else mask
    mask &= torch.cat([prefix.mask_BL, torch.ones(3, T)], dim=1).bool()[:, None, None]
    mask |= torch.eye(length + T, dtype=torch.bool)  # so that padding rows, whose outputs are dropped, are not empty
    lengths = prefix.mask_BL.sum(1)
    starts = [int(prefix.positions_3BL[:, b, : lengths[b]].max()) + 1 for b in range(3)]
    new = torch.stack([torch.arange(s, s + T) for s in starts]).expand(3, -1, -1)
    turns = lm.rotary_emb(all_BSD, torch.cat([prefix.positions_3BL, new], dim=-1))
    whole = lm.layers[-1](all_BSD, attention_mask=mask, position_embeddings=turns)
    expected = encoder.projector(lm.norm(whole)[:, -T:])
    torch.testing.assert_close(encoder.aggregate(prefix), expected, atol=1e-12, rtol=0)


# ---- padding, packing, cost ----


@all_switches
def test_padding_never_changes_a_result(
    make_encoder: Make, processor: ReferenceProcessor, inputs: ReferenceInputs, switches: dict[str, Any]
) -> None:
    encoder = make_encoder(**switches)
    tokens = encoder(inputs)
    singles = torch.cat([encoder(processor([r], [p])) for r, p in zip(REFERENCES, PROMPTS, strict=True)])
    torch.testing.assert_close(tokens, singles, **CLOSE)


def test_content_of_padding_is_never_read(make_encoder: Make, inputs: ReferenceInputs) -> None:
    encoder = make_encoder()
    garbage = torch.randint(10, 200, inputs.input_ids_BL.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.where(inputs.mask_BL.bool(), inputs.input_ids_BL, garbage)
    torch.testing.assert_close(encoder(replace(inputs, input_ids_BL=ids)), encoder(inputs), atol=1e-12, rtol=0)

    prefix = encoder.prefix(inputs)
    padding = prefix.mask_BL == 0
    states = prefix.states_BLD.masked_fill(padding[..., None], 1e3)
    positions = prefix.positions_3BL.masked_fill(padding, 999)
    spoiled = PrefixStates(states, prefix.mask_BL, positions)
    torch.testing.assert_close(encoder(spoiled), encoder(prefix), atol=1e-12, rtol=0)


def test_packed_vision_call_equals_a_loop(make_encoder: Make, inputs: ReferenceInputs) -> None:
    encoder = make_encoder()
    packed = encoder.vision(inputs.pixel_values, inputs.image_grid_thw)
    pieces = inputs.pixel_values.split(inputs.image_grid_thw.prod(1).tolist())
    for together, pixels, grid in zip(packed, pieces, inputs.image_grid_thw, strict=True):
        torch.testing.assert_close(together, encoder.vision(pixels, grid[None])[0], atol=1e-12, rtol=0)
    assert torch.equal(encoder.aggregate(encoder.prefix(inputs, packed)), encoder.aggregate(encoder.prefix(inputs)))


def test_last_layer_computes_queries_for_reference_tokens_only(make_encoder: Make, inputs: ReferenceInputs) -> None:
    encoder, seen = make_encoder(), {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp"):
        encoder.final_layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].shape[1]})
        )
    encoder(inputs)
    length = inputs.input_ids_BL.shape[1]
    assert seen == {"self_attn.q_proj": T, "self_attn.k_proj": length + T, "self_attn.o_proj": T, "mlp": T}


# ---- order of the references ----
# What holds: images are embedded apart from each other, and the aggregator is a set operation on (state, position) pairs.
# What does not hold, in either mode: the encoder as a whole is NOT invariant to the order of different references, because the
# prefix is a causal LLM and positions follow the order.

by_positions = pytest.mark.parametrize("positions", ["mrope", "sequential"])


def test_image_embeddings_move_with_their_image(make_encoder: Make, processor: ReferenceProcessor) -> None:
    encoder, images = make_encoder(), REFERENCES[0]

    def embed(order: list[int]) -> list[Tensor]:
        batch = processor([[images[i] for i in order]], ["a cat"])
        return encoder.vision(batch.pixel_values, batch.image_grid_thw)

    straight, turned = embed([0, 1, 2]), embed([2, 0, 1])
    for a, b in zip([straight[2], straight[0], straight[1]], turned, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@by_positions
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_aggregator_sees_a_set_of_states_with_positions(
    make_encoder: Make, inputs: ReferenceInputs, positions: str, attention: str
) -> None:
    encoder = make_encoder(positions=positions, final_layer_attention=attention)
    p = encoder.prefix(inputs)
    order = torch.randperm(p.mask_BL.shape[1], generator=torch.Generator().manual_seed(0))
    tokens = encoder(p)
    moved = PrefixStates(p.states_BLD[:, order], p.mask_BL[:, order], p.positions_3BL[:, :, order])
    torch.testing.assert_close(encoder(moved), tokens, atol=1e-12, rtol=0)
    only_states = PrefixStates(p.states_BLD[:1].flip(1), p.mask_BL[:1].flip(1), p.positions_3BL[:, :1])
    assert (encoder(only_states) - tokens[:1]).abs().max() > 1e-3


def test_a_weight_counts_a_reference_so_many_times(make_encoder: Make, processor: ReferenceProcessor) -> None:
    """2: as if the aggregator saw that image's states twice; 0: as if it did not see them; 1: no difference."""
    encoder = make_encoder()
    inputs = processor([[picture(0), picture(1, 32, 16)], [picture(2)]], ["a cat", "a dog"])
    p = encoder.prefix(inputs)
    plain = encoder(p)
    torch.testing.assert_close(encoder(p, processor.bias(inputs, [[1, 1], [1]])), plain, atol=1e-12, rtol=0)
    (places,) = torch.nonzero(inputs.mm_token_type_ids_BL[0], as_tuple=True)
    second = places[processor.num_merged_tokens(processor.image(picture(0))) :]
    for weight, extra in ((2.0, second), (3.0, second.repeat(2))):
        index = torch.cat([torch.arange(p.mask_BL.shape[1]), extra])
        seen = PrefixStates(p.states_BLD[:1, index], p.mask_BL[:1, index], p.positions_3BL[:, :1, index])
        weighted = encoder(p, processor.bias(inputs, [[1, weight], [1]]))
        torch.testing.assert_close(weighted[:1], encoder(seen), atol=1e-12, rtol=0)
        torch.testing.assert_close(weighted[1:], plain[1:], atol=1e-12, rtol=0)
    without = p.mask_BL[:1].clone()
    without[0, second] = 0
    blind = encoder.aggregate(PrefixStates(p.states_BLD[:1], without, p.positions_3BL[:, :1]))
    assert p.positions_3BL[:, 0, second].max() < p.positions_3BL[:, 0].max()  # else the tokens' own positions would move
    torch.testing.assert_close(encoder(p, processor.bias(inputs, [[1, 0], [1]]))[:1], blind, atol=1e-12, rtol=0)
    for weights, message in (
        ([[1, 1], []], "weights "),
        ([[1], [1]], "2 weights for 3"),
        ([[0, 0], [1]], "above 0"),
        ([[1, -1], [1]], "from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.bias(inputs, weights)


@by_positions
def test_order_of_different_references_matters(make_encoder: Make, processor: ReferenceProcessor, positions: str) -> None:
    encoder = make_encoder(positions=positions)
    a, b = picture(0), picture(1)
    straight, swapped = processor([[a, b]], ["a cat"]), processor([[b, a]], ["a cat"])
    assert torch.equal(encoder.prefix(straight).positions_3BL, encoder.prefix(swapped).positions_3BL)  # equal grids
    assert (encoder(straight) - encoder(swapped)).abs().max() > 1e-3
    assert torch.equal(encoder(processor([[a, a]], ["a cat"])), encoder(processor([[a, picture(0)]], ["a cat"])))


@by_positions
def test_only_mrope_sees_the_shape_of_a_reference(make_encoder: Make, processor: ReferenceProcessor, positions: str) -> None:
    encoder = make_encoder(positions=positions)
    wide = processor([[picture(0, 32, 16)]], ["a cat"])
    tall = replace(wide, image_grid_thw=wide.image_grid_thw[:, [0, 2, 1]])
    embeds = encoder.vision(wide.pixel_values, wide.image_grid_thw)
    difference = (encoder(encoder.prefix(wide, embeds)) - encoder(encoder.prefix(tall, embeds))).abs().max()
    assert difference == 0 if positions == "sequential" else difference > 1e-3


def test_number_of_tokens_does_not_depend_on_references(make_encoder: Make, processor: ReferenceProcessor) -> None:
    for number in (1, 5):
        batch = processor([[picture(i) for i in range(number)]], ["a cat"])
        assert make_encoder()(batch).shape == (1, T, X)


# ---- parameters, dtype, randomness, errors ----


@pytest.mark.parametrize("norm", [False, True])
def test_parts_hold_every_parameter_once_and_all_learn(make_encoder: Make, inputs: ReferenceInputs, norm: bool) -> None:
    encoder = make_encoder(prefix_final_norm=norm)
    parts = encoder.parts()
    assert set(parts) == {"reference_tokens", "final_layer", "projector", "vision", "mllm"}
    flat = [p for part in parts.values() for p in part]
    assert len(flat) == len({id(p) for p in flat}) == len(list(encoder.parameters()))
    assert not any("lm_head" in name for name, _ in encoder.named_parameters())
    (encoder(inputs) ** 3).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_training_the_aggregator_leaves_the_prefix_alone(make_encoder: Make, inputs: ReferenceInputs) -> None:
    """Or cached prefix states would go stale: the two norms of the released model are two parameters."""
    encoder = make_encoder(prefix_final_norm=True)
    before = encoder.prefix(inputs).states_BLD
    with torch.no_grad():
        for tag in ("reference_tokens", "final_layer", "projector"):
            for parameter in encoder.parts()[tag]:
                parameter.mul_(1.1)
    assert torch.equal(encoder.prefix(inputs).states_BLD, before)


def test_bf16_keeps_exact_rotary_frequencies(make_encoder: Make, inputs: ReferenceInputs) -> None:
    exact = make_encoder(torch.float32)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    frequencies = [n for n, _ in exact.named_buffers() if n.endswith(".inv_freq")]
    assert len(frequencies) == 3  # vision, prefix, aggregator
    for name in frequencies:
        assert torch.equal(half.get_buffer(name), exact.get_buffer(name))
    tokens = half(inputs)
    assert tokens.dtype == torch.bfloat16
    assert (tokens - exact(inputs)).abs().mean() < 0.05


def test_aggregator_in_fp32_takes_cached_bf16_states(make_encoder: Make, inputs: ReferenceInputs) -> None:
    encoder = make_encoder(torch.float32)
    prefix = encoder.prefix(inputs)
    cached = replace(prefix, states_BLD=prefix.states_BLD.bfloat16())
    assert encoder(cached).dtype == torch.float32


def test_initial_values_come_from_the_generator_alone(make_mllm: Callable[..., Any]) -> None:
    def build(seed: int) -> dict[str, Tensor]:
        model = make_mllm()
        before = torch.random.get_rng_state()
        encoder = ReferenceEncoder(model, reference_config(num_tokens=512), torch.Generator().manual_seed(seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        return {k: v for k, v in encoder.state_dict().items() if k.startswith(("reference_tokens", "projector"))}

    one, same, other = build(1), build(1), build(2)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["projector.hidden.weight"], other["projector.hidden.weight"])
    assert one["reference_tokens"].std().item() == pytest.approx(0.1, rel=0.03)
    assert one["projector.out.weight"].abs().max().item() == pytest.approx(D**-0.5, rel=0.01)


def test_config_must_fit_the_model(make_mllm: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.patch_size is 14 but the MLLM has 4; set it to 4"):
        ReferenceEncoder(make_mllm(), reference_config(patch_size=14), torch.Generator())


def test_images_and_text_must_belong_together(make_encoder: Make, inputs: ReferenceInputs) -> None:
    encoder = make_encoder()
    embeds = encoder.vision(inputs.pixel_values, inputs.image_grid_thw)
    with pytest.raises(ValueError, match="image tokens in the text but"):
        encoder.prefix(inputs, [*embeds, embeds[0]])

"""Reference encoder: any number of reference images and a prompt -> T tokens for the UNet.

EasyRef (arXiv 2412.09618), section 3: a Qwen2-VL reads all images and the prompt; its layers but the last are the PREFIX;
T learnable reference tokens join in the LAST layer only, and a projector takes them to the UNet's cross-attention width.
Paper and released weights differ in three switches (`SWITCHES`), which every checkpoint carries in its config.

Letters: B batch · L context tokens (images + text, right-padded) · T reference tokens · D LLM width · X UNet cross-attention
width · H query heads · G key/value heads · E head width · P image patches · N merged image tokens · K context tokens of all samples.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, Self

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
    rotate_half,
)

INSTRUCTION: Final = (
    "Visualize a scene that closely resembles the provided images, capturing the essence and details described in this prompt:\n"
)
IMAGE_TOKEN: Final = "<|image_pad|>"
SWITCHES: Final[dict[str, dict[str, Any]]] = {
    "paper": {"prefix_final_norm": False, "final_layer_attention": "bidirectional", "positions": "mrope"},
    "released": {"prefix_final_norm": True, "final_layer_attention": "causal", "positions": "sequential"},
}


_ROTARY: Final = (Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding)


class ReferenceConfig(BaseModel):
    """What a reference encoder is besides its weights and its base model; complete and JSON-able."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: PositiveInt = 64
    cross_attention_dim: PositiveInt
    prefix_final_norm: bool  # the LLM's final norm is applied to the prefix states
    final_layer_attention: Literal["bidirectional", "causal"]  # among the reference tokens; all see the whole context
    positions: Literal["mrope", "sequential"]
    layer: Literal[-1, -2, -3] = -1  # of the LLM, that the tokens join; those after it are not used
    instruction: str = INSTRUCTION
    min_pixels: PositiveInt
    max_pixels: PositiveInt
    patch_size: PositiveInt
    merge_size: PositiveInt
    temporal_patch_size: PositiveInt
    max_references: PositiveInt


class _Tensors:
    """Dataclass of tensors that moves as one."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**moved)


@dataclass(frozen=True)
class ImagePatches(_Tensors):
    """One image ready for the vision tower; depends on nothing but the image and the config, so it can be cached."""

    pixel_values: Tensor  # [P, 3 * temporal_patch_size * patch_size**2] float32
    grid_thw: Tensor  # [3] int64: temporal, height, width in patches


@dataclass(frozen=True)
class ReferenceSample:
    images: Sequence[ImagePatches]
    prompt: str


@dataclass(frozen=True)
class ReferenceInputs(_Tensors):
    """A batch for the encoder, right-padded. Images of all samples are packed one after the other."""

    input_ids_BL: Tensor  # int64
    mask_BL: Tensor  # int64, 1 = real token
    mm_token_type_ids_BL: Tensor  # int64, 1 = image token, 0 = text or padding
    pixel_values: Tensor  # [sum of P, patch width] float32
    image_grid_thw: Tensor  # [images, 3] int64


@dataclass(frozen=True)
class PrefixStates(_Tensors):
    """Output of the prefix: all the aggregator needs."""

    states_BLD: Tensor
    mask_BL: Tensor  # int64, 1 = real token
    positions_3BL: Tensor  # int64: temporal, height, width position of each token; padding holds any value


@dataclass(frozen=True)
class PrefixStart(_Tensors):
    """The prefix of one sample up to its last image: text comes after the images, so it does not depend on the prompt."""

    grids_R3: Tensor  # of the R images
    states_1SD: Tensor
    keys: Tensor  # of all layers [layers, 1, G, S, E]
    values: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    @property
    def images(self) -> list[ImagePatches]:
        """The images as the processor needs them for a text: without pixels."""
        return [ImagePatches(torch.empty(0, 0), grid) for grid in self.grids_R3.cpu()]


def null_image() -> Image.Image:
    """The reference that stands for "no reference": black, 512x512 (not zero vectors; see the paper's guidance)."""
    return Image.new("RGB", (512, 512))


class ReferenceProcessor:
    """Images and prompts -> `ReferenceInputs`. Work on one image (`image`) is apart, so that it can be cached.

    transformers' AutoProcessor is not used: its video half needs torchvision.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ReferenceConfig) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat_template; use the tokenizer of a Qwen2-VL *Instruct* model")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token; use the tokenizer of a Qwen2-VL model")
        self.tokenizer = tokenizer
        self.config = config
        self.image_token_id = tokenizer.get_vocab()[IMAGE_TOKEN]
        self.image_processor = Qwen2VLImageProcessorPil(
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            patch_size=config.patch_size,
            merge_size=config.merge_size,
            temporal_patch_size=config.temporal_patch_size,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str, config: ReferenceConfig, revision: str | None = None) -> Self:
        """Tokenizer from a folder or the hub; image sizes come from `config` alone."""
        return cls(AutoTokenizer.from_pretrained(name_or_path, revision=revision), config)

    def image(self, image: Image.Image) -> ImagePatches:
        """Resize, normalise and cut one image into patches."""
        out = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        return ImagePatches(out["pixel_values"], out["image_grid_thw"][0])

    def num_merged_tokens(self, patches: ImagePatches) -> int:
        """How many LLM tokens the image takes."""
        return int(patches.grid_thw.prod()) // self.config.merge_size**2

    def text(self, num_merged_tokens_per_image: Sequence[int], prompt: str) -> Tensor:
        """Token ids [L] of one chat message: all images, then instruction + prompt, then the generation prompt."""
        self._check(len(num_merged_tokens_per_image), prompt)
        content: list[dict[str, Any]] = [{"type": "image"} for _ in num_merged_tokens_per_image]
        content.append({"type": "text", "text": self.config.instruction + prompt})
        message: list[dict[str, Any]] = [{"role": "user", "content": content}]
        rendered = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)  # type: ignore[arg-type]
        pieces = str(rendered).split(IMAGE_TOKEN)
        text = pieces[0] + "".join(IMAGE_TOKEN * n + piece for n, piece in zip(num_merged_tokens_per_image, pieces[1:], strict=True))
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def batch(self, samples: Sequence[ReferenceSample]) -> ReferenceInputs:
        """Collate samples of any number and size of references. Never truncates."""
        ids = [self.text([self.num_merged_tokens(p) for p in s.images], s.prompt) for s in samples]
        longest = max(len(i) for i in ids)
        # Padding is masked everywhere, so its id is free; 0 exists in every vocabulary.
        ids_BL = torch.stack([F.pad(i, (0, longest - len(i))) for i in ids])
        mask_BL = torch.stack([F.pad(torch.ones_like(i), (0, longest - len(i))) for i in ids])
        images = [p for s in samples for p in s.images]
        return ReferenceInputs(
            input_ids_BL=ids_BL,
            mask_BL=mask_BL,
            mm_token_type_ids_BL=((ids_BL == self.image_token_id) & mask_BL.bool()).long(),
            pixel_values=torch.cat([p.pixel_values for p in images]),
            image_grid_thw=torch.stack([p.grid_thw for p in images]),
        )

    def bias(self, inputs: ReferenceInputs, weights: Sequence[Sequence[float]]) -> Tensor:
        """bias_BL for references that count `weights` times, one list for each sample: log w at the tokens of each image. A softmax
        with log 2 added is the softmax with those tokens there twice; 0 leaves them out.

        Raises:
            ValueError: another number of weights than of images, a negative one, or none above zero.
        """
        for given in weights:
            check_weights(given)
        flat = torch.tensor([w for given in weights for w in given], dtype=torch.float64)
        if len(flat) != len(inputs.image_grid_thw):
            raise ValueError(f"{len(flat)} weights for {len(inputs.image_grid_thw)} references; give one for each")
        tokens_N = inputs.image_grid_thw.prod(-1) // self.config.merge_size**2
        bias_BL = torch.zeros(inputs.input_ids_BL.shape, dtype=torch.float64)
        return bias_BL.masked_scatter(inputs.mm_token_type_ids_BL == 1, flat.log().repeat_interleave(tokens_N))

    def __call__(self, references: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> ReferenceInputs:
        """`batch` straight from PIL images: one list of references and one prompt for each sample."""
        return self.batch([ReferenceSample([self.image(i) for i in r], p) for r, p in zip(references, prompts, strict=True)])

    def _check(self, num_references: int, prompt: str) -> None:
        if num_references == 0:
            raise ValueError("a sample has no reference image; give at least one, or null_image() for 'no reference'")
        if num_references > self.config.max_references:
            raise ValueError(
                f"a sample has {num_references} reference images, the limit is {self.config.max_references}; "
                "give fewer, or raise max_references"
            )
        for token in self.tokenizer.all_special_tokens:
            if token in prompt:
                raise ValueError(f"the prompt contains the special token {token}; remove it from {prompt!r}")


def check_weights(weights: Sequence[float]) -> None:
    """ValueError for weights of one sample's references that no picture can be drawn with."""
    if not all(0 <= weight < torch.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights {list(weights)} of the references: give numbers from 0 on, at least one above 0")


class ReferenceEncoder(nn.Module):
    """Prefix (`mllm`), last layer over context + reference tokens (`final_layer`, `norm`) and `projector`.

    Takes ownership of `mllm`: its last decoder layer moves out, its lm_head is dropped. Do not use the model elsewhere.

    Two norms when `prefix_final_norm`: the prefix keeps the LLM's final norm as ITS parameter (part "mllm": frozen in stage 1 after a
    warm start, trained with the MLLM in stages 2-3) and the aggregator gets a copy (part "final_layer"). They start equal and part in
    training, as in the released code; so training the aggregator never changes (cached) prefix states. Otherwise the one norm
    moves to the aggregator and the prefix has none.

    State names: `reference_tokens`, `final_layer.*`, `norm.weight`, `projector.{hidden,out,norm}.*`, `mllm.*`.
    """

    def __init__(
        self,
        mllm: Qwen2VLForConditionalGeneration | Qwen2VLModel,
        config: ReferenceConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        core = mllm.model if isinstance(mllm, Qwen2VLForConditionalGeneration) else mllm
        lm = core.language_model
        _check_model(core, config)
        self.config = config
        self.final_layer = lm.layers[config.layer]
        lm.layers = lm.layers[: config.layer]
        self.norm = lm.norm
        lm.norm = copy.deepcopy(lm.norm) if config.prefix_final_norm else nn.Identity()
        self.rotary = copy.deepcopy(lm.rotary_emb)  # own copy: the aggregator runs without the mllm (cached prefix)
        self.mllm = core
        core.visual.config._attn_implementation = lm.config._attn_implementation = PACKED
        width = lm.config.hidden_size
        like: Any = lm.embed_tokens.weight
        tokens_TD = 0.1 * torch.randn(config.num_tokens, width, generator=generator)
        self.reference_tokens = nn.Parameter(tokens_TD.to(like.device, like.dtype))
        self.projector = _projector(width, config.cross_attention_dim, generator).to(like.device, like.dtype)

    def vision(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """Embeddings [N, D] of every image, in one packed call; images do not see each other."""
        return list(self.mllm.get_image_features(pixel_values, grid_thw, return_dict=True).pooler_output)

    def prefix(
        self, inputs: ReferenceInputs, image_embeds: Sequence[Tensor] | None = None, cache: DynamicCache | None = None
    ) -> PrefixStates:
        """Run all layers but the last over the L context tokens: those of all samples one after the other, without padding.

        `image_embeds`: cached result of `vision` for the images of `inputs`; the vision tower then does not run.
        `cache` takes the keys and values.
        """
        if image_embeds is None:
            image_embeds = self.vision(inputs.pixel_values, inputs.image_grid_thw)
        lm, real_BL = self.mllm.language_model, inputs.mask_BL.bool()
        embeds_KD = lm.embed_tokens(inputs.input_ids_BL[real_BL])
        packed_ND = torch.cat(list(image_embeds)).to(embeds_KD)
        is_image_K = inputs.mm_token_type_ids_BL[real_BL] == 1
        if int(is_image_K.sum()) != len(packed_ND):  # masked_scatter would ignore a surplus silently
            raise ValueError(
                f"{int(is_image_K.sum())} image tokens in the text but {len(packed_ND)} image embeddings; "
                "build the batch with ReferenceProcessor.batch under this encoder's config"
            )
        embeds_KD = embeds_KD.masked_scatter(is_image_K[:, None], packed_ND)
        positions_3BL = self._positions(inputs)
        states_1KD = lm(
            inputs_embeds=embeds_KD[None], position_ids=positions_3BL[:, None, real_BL], past_key_values=cache,
            use_cache=cache is not None, cu_seq_lens_q=F.pad(inputs.mask_BL.sum(1).cumsum(0).cpu(), (1, 0)),
        ).last_hidden_state  # fmt: skip
        states_BLD = states_1KD.new_zeros(*real_BL.shape, states_1KD.shape[-1]).masked_scatter(real_BL[..., None], states_1KD)
        return PrefixStates(states_BLD, inputs.mask_BL, positions_3BL)

    def start(self, inputs: ReferenceInputs) -> PrefixStart:
        """The prefix of one sample up to its last image: `prefix_from` goes on from there with any prompt."""
        end = int(inputs.mm_token_type_ids_BL[0].nonzero()[-1]) + 1
        ids_BL, mask_BL, types_BL = (t[:, :end] for t in (inputs.input_ids_BL, inputs.mask_BL, inputs.mm_token_type_ids_BL))
        cache: Any = DynamicCache()
        prefix = self.prefix(replace(inputs, input_ids_BL=ids_BL, mask_BL=mask_BL, mm_token_type_ids_BL=types_BL), cache=cache)
        keys, values = (torch.stack([getattr(layer, part) for layer in cache.layers]) for part in ("keys", "values"))
        return PrefixStart(inputs.image_grid_thw, prefix.states_BLD, keys, values)

    def prefix_from(self, start: PrefixStart, inputs: ReferenceInputs) -> PrefixStates:
        """`prefix` of one sample whose images are those of `start`: only the text after them runs."""
        lm, end = self.mllm.language_model, start.states_1SD.shape[1]
        cache, positions_3BL = DynamicCache(), self._positions(inputs)
        for number, (keys, values) in enumerate(zip(start.keys, start.values, strict=True)):
            cache.update(keys, values, number)
        states_1LD = lm(
            inputs_embeds=lm.embed_tokens(inputs.input_ids_BL[:, end:]), attention_mask=inputs.mask_BL,
            position_ids=positions_3BL[:, :, end:], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return PrefixStates(torch.cat([start.states_1SD, states_1LD], dim=1), inputs.mask_BL, positions_3BL)

    def aggregate(self, prefix: PrefixStates, bias_BL: Tensor | None = None) -> Tensor:
        """Last layer, norm and projector for the T reference tokens -> tokens_BTX in this module's dtype.

        `bias_BL` is added to the scores of the context tokens (`ReferenceProcessor.bias`). Keys and values come from all L + T
        tokens, queries from the T reference tokens only: cost T * (L + T).
        The same numbers as the whole layer on L + T tokens, of which only the last T outputs are used.
        """
        layer, dtype = self.final_layer, self.reference_tokens.dtype
        tokens_BTD = self.reference_tokens.expand(prefix.states_BLD.shape[0], -1, -1)  # len() would fix it in an export
        all_BSD = torch.cat([prefix.states_BLD.to(dtype), tokens_BTD], dim=1)
        tokens_BTD = tokens_BTD + self._attention(layer.input_layernorm(all_BSD), prefix, bias_BL)
        tokens_BTD = tokens_BTD + layer.mlp(layer.post_attention_layernorm(tokens_BTD))
        return self.projector(self.norm(tokens_BTD)).to(dtype)

    def forward(self, inputs: ReferenceInputs | PrefixStates, bias_BL: Tensor | None = None) -> Tensor:
        """tokens_BTX; from cached prefix states too, so that a wrapper (DDP) sees one entry point."""
        return self.aggregate(inputs if isinstance(inputs, PrefixStates) else self.prefix(inputs), bias_BL)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that the stages table uses; every parameter is in exactly one part."""
        return {
            "reference_tokens": [self.reference_tokens],
            "final_layer": [*self.final_layer.parameters(), *self.norm.parameters()],
            "projector": list(self.projector.parameters()),
            "vision": list(self.mllm.visual.parameters()),
            "mllm": list(self.mllm.language_model.parameters()),
        }

    def _positions(self, inputs: ReferenceInputs) -> Tensor:
        """positions_3BL: M-RoPE of Qwen2-VL, or 0..L-1 on all three axes (released code)."""
        if self.config.positions == "sequential":
            _, length = inputs.input_ids_BL.shape
            return torch.arange(length, device=inputs.input_ids_BL.device).expand(3, *inputs.input_ids_BL.shape)
        host = inputs.to("cpu")  # it reads single numbers: one copy here instead of a wait for the device at each
        get_rope_index: Any = self.mllm.get_rope_index
        positions_3BL, _ = get_rope_index(
            host.input_ids_BL,
            mm_token_type_ids=host.mm_token_type_ids_BL,
            image_grid_thw=host.image_grid_thw,
            attention_mask=host.mask_BL,
        )
        return positions_3BL.to(inputs.input_ids_BL.device)

    def _attention(self, normed_BSD: Tensor, prefix: PrefixStates, bias_BL: Tensor | None) -> Tensor:
        """Attention output [B, T, D] of the reference tokens over S = L + T tokens, with explicit mask and positions."""
        attn, num_tokens = self.final_layer.self_attn, self.config.num_tokens
        cos_BSE, sin_BSE = self.rotary(normed_BSD, extend_positions(prefix, num_tokens))
        q_BHTE = heads(attn.q_proj(normed_BSD[:, -num_tokens:]), attn.head_dim)
        k_BGSE = heads(attn.k_proj(normed_BSD), attn.head_dim)
        v_BGSE = heads(attn.v_proj(normed_BSD), attn.head_dim)
        q_BHTE = rotate(q_BHTE, cos_BSE[:, -num_tokens:], sin_BSE[:, -num_tokens:])
        k_BGSE = rotate(k_BGSE, cos_BSE, sin_BSE)
        mask_B1TS = attention_mask(prefix.mask_BL, num_tokens, self.config.final_layer_attention == "causal")
        if bias_BL is not None:
            bias_B11S = F.pad(bias_BL.to(q_BHTE), (0, num_tokens))[:, None, None]
            mask_B1TS = bias_B11S.expand_as(mask_B1TS).masked_fill(~mask_B1TS, -torch.inf)
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            # Repeated by hand: with a mask and enable_gqa, CUDA has only the slow kernel.
            k_BGSE.repeat_interleave(attn.num_key_value_groups, dim=1),
            v_BGSE.repeat_interleave(attn.num_key_value_groups, dim=1),
            attn_mask=mask_B1TS,
            dropout_p=attn.attention_dropout if self.training else 0.0,
            scale=attn.scaling,
        )
        return attn.o_proj(out_BHTE.transpose(1, 2).flatten(2))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """`.to(bfloat16)` would round rotary frequencies to 3 digits (angles off by a radian at position 1000): keep them."""
        before: dict[Any, Tensor] = {m: m.inv_freq for m in self.modules() if isinstance(m, _ROTARY)}
        super()._apply(fn, recurse)
        for module, inv_freq in before.items():
            if module.inv_freq.dtype != inv_freq.dtype:
                module.inv_freq = inv_freq.to(module.inv_freq.device)
        return self


def attend_packed(
    module: Any, q_1HKE: Tensor, k_1GKE: Tensor, v_1GKE: Tensor, attention_mask: Tensor | None, scaling: float, dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, K, H, E] within samples or images that lie one after the other and begin at `cu_seq_lens_q`; here alone they are
    padded to the longest. Without flash-attn transformers would go image by image, and pad samples everywhere."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, q_1HKE, k_1GKE, v_1GKE, attention_mask, dropout, scaling, **more)
    lengths_N = cu_seq_lens_q.cpu().diff()  # one wait for the device
    real_NL = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    padded, causal = not bool(real_NL.all()), module.is_causal
    places_K = real_NL.flatten().nonzero()[:, 0].to(q_1HKE.device)

    def rows(x_1HKE: Tensor) -> Tensor:
        """[N, H, longest, E]."""
        x_KHE = x_1HKE[0].transpose(0, 1)
        if padded:
            x_KHE = x_KHE.new_zeros(real_NL.numel(), *x_KHE.shape[1:]).index_copy(0, places_K, x_KHE)
        return x_KHE.unflatten(0, real_NL.shape).transpose(1, 2)

    # Padding is on the right, where causal attention never looks.
    mask_N11L = real_NL[:, None, None].to(q_1HKE.device) if padded and not causal else None
    out_NHLE = F.scaled_dot_product_attention(
        rows(q_1HKE), rows(k_1GKE), rows(v_1GKE), mask_N11L, dropout, causal, scale=scaling, enable_gqa=module.num_key_value_groups > 1
    )
    out_KHE = out_NHLE.transpose(1, 2).flatten(0, 1)
    return (out_KHE[places_K] if padded else out_KHE)[None], None


PACKED: Final = "flash_by_padding"  # transformers gives all images of a call to an attention with "flash" in its name
AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def _check_model(core: Qwen2VLModel, config: ReferenceConfig) -> None:
    vision: Any = core.config.vision_config
    lm = core.language_model
    for ours, theirs in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if getattr(config, ours) != theirs:
            raise ValueError(f"config.{ours} is {getattr(config, ours)} but the MLLM has {theirs}; set it to {theirs}")
    if len(lm.layers) <= -config.layer:
        raise ValueError(f"the MLLM has {len(lm.layers)} decoder layer; at least {1 - config.layer} are needed (prefix and last layer)")
    if lm.layers[config.layer].self_attn.sliding_window is not None:
        raise ValueError("the MLLM's last layer uses a sliding window; load it with use_sliding_window=False")


def _projector(width: int, out: int, generator: torch.Generator) -> nn.Sequential:
    """Linear D->D, GELU, Linear D->X, LayerNorm(X), with torch's usual Linear init drawn from `generator`."""
    parts = OrderedDict(
        hidden=nn.utils.skip_init(nn.Linear, width, width),
        act=nn.GELU(),
        out=nn.utils.skip_init(nn.Linear, width, out),
        norm=nn.LayerNorm(out),
    )
    for linear in (parts["hidden"], parts["out"]):
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return nn.Sequential(parts)


def extend_positions(prefix: PrefixStates, num_tokens: int) -> Tensor:
    """positions_3BS: the reference tokens go on, on all axes, one after the largest position of each sample's REAL tokens."""
    start_B = prefix.positions_3BL.masked_fill(prefix.mask_BL == 0, -1).amax(dim=(0, 2)) + 1
    tokens_BT = start_B[:, None] + torch.arange(num_tokens, device=start_B.device)
    return torch.cat([prefix.positions_3BL, tokens_BT.expand(3, -1, -1)], dim=-1)


def attention_mask(mask_BL: Tensor, num_tokens: int, causal: bool) -> Tensor:
    """bool [B, 1, T, L + T], True = attend. Context: every real token. Reference tokens: all, or those up to itself."""
    among_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=mask_BL.device)
    among_TT = among_TT.tril() if causal else among_TT
    context_BTL = mask_BL.bool()[:, None].expand(-1, num_tokens, -1)
    return torch.cat([context_BTL, among_TT.expand(mask_BL.shape[0], -1, -1)], dim=-1)[:, None]


def heads(x_BSF: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads * E] -> [B, heads, S, E]."""
    return x_BSF.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x_BHSE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) in the half-split layout of Qwen2."""
    return x_BHSE * cos_BSE[:, None] + rotate_half(x_BHSE) * sin_BSE[:, None]

"""The models of one EasyRef: base pipeline parts, reference encoder and adapter, loaded by the parameters in force."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from easyref.config import Params, Stage
from easyref.model.adapter import Adapter
from easyref.model.reference import ReferenceConfig, ReferenceEncoder, ReferenceProcessor
from easyref.model.schedule import AS_BASE, Schedule
from easyref.model.weights import CheckpointConfig
from easyref.records import sha256_file, sha256_json
from easyref.seeds import torch_rng
from easyref.training.engine import BLOCKS

#: Parts that start from nothing or from a copy, and may learn faster (`new_part_rate`).
NEW_PARTS = ("reference_tokens", "projector", "reference_kv")
CHECKPOINT = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Models:
    """Everything a stage trains or needs, on one device."""

    unet: Any
    vae: Any
    text_encoders: Sequence[tuple]
    scheduler: Any
    encoder: ReferenceEncoder
    processor: ReferenceProcessor
    adapter: Adapter
    accelerator: Any
    base_hash: str
    schedule: Schedule = AS_BASE

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> AbstractContextManager:
        return self.accelerator.autocast()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by their name in a checkpoint."""
        named = {f"encoder.{n}": p for n, p in self.encoder.named_parameters()}
        return named | {f"adapter.{n}": p for n, p in self.adapter.named_parameters().items()}

    def use(self, schedule: Schedule) -> None:
        """Noise by `schedule` from here on, in training and in the checkpoint's drawings."""
        self.schedule, self.scheduler = schedule, schedule.of(self.scheduler)

    def trainable(
        self, trains: Collection[str], new_part_rate: float = 1.0, rates: Mapping[str, float] = MappingProxyType({})
    ) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
        """The parameters of the parts `trains` by checkpoint name, with their learning-rate factors; all others are frozen.
        `rates`: factors of single parts, before those of `new_part_rate`."""
        if idle := sorted(rates.keys() - set(trains)):
            raise ValueError(f"rates: {idle[0]} is not trained in this stage, which trains {', '.join(trains)}; leave it out")
        names = {t: n for n, t in self.named_parameters().items()}
        trained, factors = {}, {}
        for part, tensors in {**self.encoder.parts(), **self.adapter.parts()}.items():
            for tensor in tensors:
                tensor.requires_grad_(part in trains)
                if part in trains:
                    trained[names[tensor]] = tensor
                    factors[names[tensor]] = rates.get(part, new_part_rate if part in NEW_PARTS else 1.0)
        return trained, factors

    def recompute(self, parts: Collection[str], checkpoint: Callable[..., Any] = CHECKPOINT) -> None:
        """Blocks of these parts keep their input alone and run again in the backward pass; `checkpoint(block, *args)` is how."""
        if "unet" in parts:
            self.unet.enable_gradient_checkpointing(checkpoint)
        for part, module in (("mllm", self.encoder.mllm.language_model), ("vision", self.encoder.mllm.visual)):
            if part in parts:
                module._set_gradient_checkpointing(True, checkpoint)
                module.train()  # no dropout is in them; only so do the blocks recompute

    def compile(self) -> None:
        """Block by block: one graph for all of a kind, and no break at what looks at values."""
        for model in (self.unet, self.encoder.mllm):
            for module in [m for m in model.modules() if type(m).__name__ in BLOCKS]:
                module.compile()

    def checkpoint_config(self, params: Params, stage: Stage, has_mllm: bool) -> CheckpointConfig:
        rank = stage.lora_rank or None
        ids = base_ids(params)
        return CheckpointConfig(
            reference=self.encoder.config, lora_rank=rank, lora_alpha=float(rank) if rank else None, has_mllm=has_mllm,
            mllm_id=ids["mllm"][0], mllm_revision=ids["mllm"][1], base_id=ids["diffusion"][0], base_revision=ids["diffusion"][1],
            schedule=self.schedule,
        )  # fmt: skip


def base_ids(params: Params) -> dict[str, tuple[str, str | None]]:
    """Id and revision of the two base models; folders below the models folder for models trained here."""
    b = params.base
    if b.source == "train":
        return {"diffusion": ("base/diffusion", None), "mllm": ("base/mllm", None)}
    return {"diffusion": (str(b.diffusion_id), b.diffusion_revision), "mllm": (str(b.mllm_id), b.mllm_revision)}


def reference_config(params: Params, mllm_config: Any, cross_attention_dim: int) -> ReferenceConfig:
    r, vision = params.reference, mllm_config.vision_config
    return ReferenceConfig(
        num_tokens=r.num_tokens, cross_attention_dim=cross_attention_dim, prefix_final_norm=r.prefix_final_norm,
        final_layer_attention=r.final_layer_attention, positions=r.positions, instruction=r.instruction,
        layer=r.layer, min_pixels=r.min_pixels, max_pixels=r.max_pixels, max_references=r.max_references, patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size,
    )  # fmt: skip


def fresh_easyref(
    params: Params, unet: Any, mllm: Any, lora_rank: int | None, prefix: torch.dtype = torch.float32
) -> tuple[ReferenceEncoder, Adapter]:
    """Reference encoder over `mllm` and adapter in `unet`, as a stage starts with them; on the devices of the two. `prefix`: dtype of
    the MLLM's weights but those of its last layer."""
    config = reference_config(params, mllm.config, unet.config.cross_attention_dim)
    encoder = ReferenceEncoder(mllm, config, torch_rng(params.seed, "encoder"))
    for parameter in encoder.mllm.parameters():  # and no buffer: rotary frequencies stay exact
        parameter.data = parameter.data.to(prefix)
    alpha = float(lora_rank) if lora_rank else None
    adapter = Adapter.install(unet, config.num_tokens, lora_rank, alpha, torch_rng(params.seed, "lora"))
    for name, parameter in adapter.named_parameters().items():
        parameter.data = parameter.data.float()  # trained, whatever the precision of the frozen UNet
        if params.reference.value_init == "zero" and name.startswith("reference_kv.") and name.endswith(".v.weight"):
            nn.init.zeros_(parameter)
    return encoder, adapter


def load_models(params: Params, folder: Path, lora_rank: int | None, precision: str, frozen_mllm: bool = False) -> Models:
    """Base models from `folder/base` (which the stage `base` fills, by training or from the hub) with a fresh EasyRef.

    `frozen_mllm`: the MLLM but for its last layer is in the precision of what is frozen."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, Qwen2VLForConditionalGeneration

    diffusion, mllm_folder = folder / "base" / "diffusion", folder / "base" / "mllm"
    if not (diffusion / "model_index.json").exists():
        raise FileNotFoundError(f"{diffusion}: no base models; get them with `dvc pull base`, or train them with `easyref base`")
    each_anew = AutocastKwargs(cache_enabled=False)  # a weight is cast once a pass; kept, the casts of all lie there to its end
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[each_anew])
    frozen = DTYPES[precision]  # frozen weights in compute precision, trained ones in fp32

    def load(cls: Any, name: str, dtype: torch.dtype = frozen) -> Any:
        return cls.from_pretrained(diffusion, subfolder=name, torch_dtype=dtype).to(accelerator.device).eval().requires_grad_(False)

    unet = load(UNet2DConditionModel, "unet")
    encoders = [load(CLIPTextModel, "text_encoder"), load(CLIPTextModelWithProjection, "text_encoder_2")]
    tokenizers = [AutoTokenizer.from_pretrained(diffusion / name) for name in ("tokenizer", "tokenizer_2")]
    mllm = Qwen2VLForConditionalGeneration.from_pretrained(mllm_folder, dtype=torch.float32)
    encoder, adapter = fresh_easyref(params, unet, mllm, lora_rank, frozen if frozen_mllm else torch.float32)
    encoder.to(accelerator.device)
    files = sorted([*diffusion.rglob("*.safetensors"), *mllm_folder.glob("*.safetensors")])
    return Models(
        unet=unet, vae=load(AutoencoderKL, "vae", torch.float32), text_encoders=list(zip(tokenizers, encoders, strict=True)),
        scheduler=DDIMScheduler.from_pretrained(diffusion, subfolder="scheduler"), encoder=encoder,
        processor=ReferenceProcessor.from_pretrained(str(mllm_folder), encoder.config), adapter=adapter, accelerator=accelerator,
        base_hash=sha256_json([sha256_file(f) for f in files]),
    )  # fmt: skip

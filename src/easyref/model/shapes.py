"""Shapes of the published base models by hub id: the numbers of their config.json that decide sizes, so that a plan or a test
can build them on the meta device without weights and without network. Other ids come from a local folder of base models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

Configs = dict[str, dict[str, Any]]  # by the model's folder in a pipeline

DIFFUSION: Final[dict[str, Configs]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {
            "sample_size": 1024, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 32,
        },
        "text_encoder": {
            "vocab_size": 49_408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "vocab_size": 49_408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "max_position_embeddings": 77, "projection_dim": 1280, "hidden_act": "gelu",
        },
    },
}  # fmt: skip
MLLM: Final[dict[str, dict[str, Any]]] = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def configs(diffusion_id: str, mllm_id: str, folder: Path) -> Configs:
    """Configs of the base models: from the tables above, for any other id from `folder` (models/base).

    Raises:
        ValueError: the id is not in the tables and `folder` has no such config.
    """
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    known = DIFFUSION.get(diffusion_id)
    diffusion = known or {name: _read(folder / "diffusion" / name / "config.json", diffusion_id) for name in names}
    return diffusion | {"mllm": MLLM.get(mllm_id) or _read(folder / "mllm" / "config.json", mllm_id)}


def build(values: Configs) -> dict[str, Any]:
    """The five models on the current default device (`with torch.device("meta")`: no memory, no weights)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    return {
        "vae": AutoencoderKL.from_config(values["vae"]),
        "unet": UNet2DConditionModel.from_config(values["unet"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(values["text_encoder"])),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(values["text_encoder_2"])),
        "mllm": Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(values["mllm"])),
    }


def _read(path: Path, model_id: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{model_id}: no shapes known here and no {path}; run `easyref base`, or add its config to model/shapes.py")
    return json.loads(path.read_text())

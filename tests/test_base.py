"""Stage `base` end to end, very small: what it writes loads as the hub's models do, and only what changed is trained again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from easyref.config import Params, parse_params
from easyref.seeds import numpy_rng
from easyref.training import base
from easyref.training.trainer import Task
from tests.projects import small_data

SHORT: dict = {
    "images": 8,
    "batch": 4,
    "microbatch": 4,
    "save_images": 4,
    "warmup_images": 0,
    "cooldown_images": 0,
    "ema_images": 0,
    "restart": None,
}


def small(**text_to_image: float) -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    b = values["base"]
    b["vae"] |= SHORT | {"channels": [8, 8, 16]}
    b["text_to_image"] |= SHORT | {
        "channels": [32, 64],
        "transformer_layers": [0, 1],
        "text_width": 32,
        "text_layers": 2,
        "vocabulary": 300,
        **text_to_image,
    }
    b["decoder"] |= SHORT
    b["captioning"] |= SHORT | {"width": 64, "intermediate": 64, "layers": 2, "heads": 2, "kv_heads": 1, "vision_width": 32}
    b["captioning"] |= {"vision_layers": 1, "vision_heads": 2, "vocabulary": 400}
    return parse_params(values)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_base_writes_models_that_load_and_goes_on_with_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_data(tmp_path / "data", small(), every=80)
    trained: list[str] = []
    train = base.train

    def noted(task: Task, *rest: Any) -> None:
        trained.append(task.name)
        train(task, *rest)

    monkeypatch.setattr(base, "train", noted)
    folders = [tmp_path / name for name in ("data", "out", "metrics", "work")]
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(base, "draw_text_grid", interrupt)
        base.base(small(), *folders)
    assert trained == ["base: captioning", "base: vae", "base: text to image", "base: decoder"]
    before, after = (tmp_path / "work" / next((tmp_path / "work").glob(f"{part}-*/")).name for part in ("diffusion", "decoder"))
    weights = "diffusion_pytorch_model.safetensors"
    assert (before / "unet" / weights).read_bytes() == (after / "unet" / weights).read_bytes()
    vae, taught = (load_file(folder / "vae" / weights) for folder in (before, after))
    changed = {name.split(".")[0] for name in vae if not torch.equal(vae[name], taught[name])}
    assert changed == {"decoder", "post_quant_conv"}, "latents stay what they are"
    base.base(small(drop_text=0.5), *folders)
    assert trained[4:] == ["base: text to image", "base: decoder"]
    assert not (tmp_path / "work").exists()

    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "diffusion", torch_dtype=torch.float32)
    assert pipe.unet.config.cross_attention_dim == 64
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    mllm = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out" / "mllm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "mllm")
    assert mllm.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert "_name_or_path" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("config.json"))
    assert Image.open(tmp_path / "metrics" / "text.png").width > 1000
    for name in ("vae", "diffusion", "decoder", "mllm"):
        assert json.loads((tmp_path / "metrics" / f"{name}.json").read_text())[-1]["seen"] == 8


def test_colours_are_swapped_in_the_share_that_is_asked_for() -> None:
    pixels = torch.randn(3, 4, 5)
    orders = []
    for number in range(600):
        swapped = base.swap_colours(pixels, 0.5, numpy_rng(0, "test", number))
        orders.append(tuple(next(i for i in range(3) if torch.equal(channel, pixels[i])) for channel in swapped))
    assert all(sorted(order) == [0, 1, 2] for order in orders) and len(set(orders)) == 6
    assert 0.5 < orders.count((0, 1, 2)) / 600 < 0.67  # half of them, and a sixth of the other half
    assert torch.equal(base.swap_colours(pixels, 0.0, numpy_rng(0, "test")), pixels)

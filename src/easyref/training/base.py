"""Stage `base`: the small base models of the nano preset, trained on the training split only, in the folder form in which
the sdxl preset gets its own from the hub.

`diffusion/` is a StableDiffusionXLPipeline folder (UNet with `text_time` embeddings, AutoencoderKL, two CLIP text encoders);
`mllm/` is a Qwen2VLForConditionalGeneration with image processor, tokenizer and chat template.
Letters: B batch · L text tokens · C latent channels · h,w latent size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from easyref.config import VAE, Captioning, Params, TextToImage
from easyref.data.captions import LABELS, caption, common_labels
from easyref.data.dataset import TrainingImages
from easyref.progress import use_threads
from easyref.records import HUB, atomic_folder, remove_folder, sha256_json, write_bytes, write_json
from easyref.seeds import Order, numpy_rng, torch_rng
from easyref.training.curves import write_curves
from easyref.training.trainer import Task, train

DESCRIBE, COMMON = "Describe the image.", "What do these images have in common?"


def base(params: Params, data: Path, out: Path, metrics: Path, work: Path) -> None:
    """Train captioning and text-to-image models and a VAE, its decoder twice. Writes `out/diffusion` and `out/mllm` (half precision),
    and into `metrics` the training curves and `text.png`: what the base draws from text alone.

    What each training makes is kept in `work` as it finishes, under a hash of all it depends on: the same command goes on where
    it was, a changed parameter trains anew what it changes. When all are written, `work` is removed: the next call trains again.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the base models train in one process; start `easyref base` by itself")
    print(use_threads(params.threads))
    metrics.mkdir(parents=True, exist_ok=True)
    if params.base.source == "hub":
        return download(params, out)
    images = TrainingImages(data)
    mllm = train_captioning(params, images, work)
    vae = train_vae(params, images, work)
    drawing = train_text_to_image(params, images, vae, work)
    diffusion = train_decoder(params, images, drawing, work)
    with atomic_folder(out) as folder:
        shutil.copytree(diffusion, folder / "diffusion")
        shutil.copytree(mllm, folder / "mllm")
        _forget_paths(folder)
    write_bytes(metrics / "text.png", draw_text_grid(params, images, diffusion))
    for part in (mllm, vae, drawing, diffusion):
        write_curves(part.with_suffix(".jsonl"), metrics, part.name.split("-")[0])
    remove_folder(work)


def _part(name: str, inputs: dict[str, Any], work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of one trained model in `work`, named by all it depends on, and the fingerprint of its training."""
    fingerprint = {"task": name, **inputs}
    return work / f"{name}-{sha256_json(fingerprint)[:12]}", fingerprint


def _forget_paths(folder: Path) -> None:
    """Take out of the config files where on this machine a part was loaded from."""
    for path in folder.rglob("config.json"):
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2) + "\n")


def download(params: Params, out: Path) -> None:
    """The published base models at their pinned revisions, safetensors only (no pickles)."""
    from huggingface_hub import snapshot_download

    b = params.base
    models = {"diffusion": (b.diffusion_id, b.diffusion_revision), "mllm": (b.mllm_id, b.mllm_revision)}
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    with atomic_folder(out) as folder:
        for name, (model_id, revision) in models.items():
            snapshot_download(
                str(model_id), revision=revision, local_dir=folder / name, allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*openvino*", "*_onnx/*", "sd_xl_base_1.0*"],
            )  # fmt: skip
        write_json(folder / HUB, models)


# -- VAE ---------------------------------------------------------------------------------------------------------------


def build_vae(p: VAE, size: int) -> Any:
    from diffusers import AutoencoderKL

    levels = len(p.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(p.channels), layers_per_block=p.layers, latent_channels=p.latent_channels,
        norm_num_groups=8, sample_size=size, force_upcast=False,
    )  # fmt: skip


def pixel_loss(error_B3HW: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """L1 + squared error on pixels and L1 on their differences along x and y (sharp edges)."""
    edges = error_B3HW.diff(dim=-1).abs().mean() + error_B3HW.diff(dim=-2).abs().mean()
    return error_B3HW.abs().mean() + error_B3HW.square().mean() + edge_weight * edges


def vae_loss(vae: Any, pixels_B3HW: torch.Tensor, noise_BChw: torch.Tensor, p: VAE) -> torch.Tensor:
    """`pixel_loss` + KL to the unit Gaussian."""
    posterior = vae.encode(pixels_B3HW).latent_dist
    out = vae.decode(posterior.mean + posterior.std * noise_BChw).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return pixel_loss(out - pixels_B3HW, p.edge_weight) + p.kl_weight * kl


def swap_colours(pixels_3HW: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """With probability `share` red, green and blue in a random order: yellow and red abound in the training images, green and
    purple hardly occur, and a VAE that has not seen a colour cannot draw it."""
    return pixels_3HW[rng.permutation(3)] if rng.random() < share else pixels_3HW


def train_vae(params: Params, images: TrainingImages, work: Path) -> Path:
    """An AutoencoderKL folder."""
    p = params.base.vae
    assert p is not None
    done, fingerprint = _part("vae", {"params": p.model_dump(), "images": images.content, "seed": params.seed}, work)
    if done.exists():
        return done
    torch.manual_seed(params.seed)
    vae = build_vae(p, params.ingest.size).to(memory_format=torch.channels_last)
    order = Order(images.weights, params.seed, "vae")
    side = params.ingest.size // 2 ** (len(p.channels) - 1)

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        rngs = [numpy_rng(params.seed, "vae colours", n) for n in numbers]
        pixels = images.batch([order[n] for n in numbers])
        pixels = torch.stack([swap_colours(x, p.swap_colours, rng) for x, rng in zip(pixels, rngs, strict=True)])
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        noise = torch.stack([torch.randn(p.latent_channels, side, side, generator=torch_rng(params.seed, "vae", n)) for n in numbers])
        return vae_loss(vae, pixels, noise, p)

    train(Task("base: vae", [vae], dict(vae.named_parameters()), loss, fingerprint), p, done.with_suffix(".safetensors"))
    vae.eval()
    with torch.no_grad():  # so that latents enter diffusion with unit variance, as in SD (scaling_factor)
        items = list(range(0, len(images.sha256s), max(1, len(images.sha256s) // 512)))
        latents = torch.cat([vae.encode(images.batch(items[i : i + 64])).latent_dist.mean for i in range(0, len(items), 64)])
        error = (vae.decode(latents[:64]).sample - images.batch(items[:64])).square().mean()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"base: vae reconstructs with mean squared error {error:.4f} on [-1, 1]; latent std {latents.std():.3f}")
    with atomic_folder(done) as folder:
        vae.save_pretrained(folder)
    return done


# -- text to image -----------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocabulary: int, special: list[str], clip: bool):
    """A byte-level BPE tokenizer trained on `texts`, lower-cased, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    suffix: dict[str, Any] = {"end_of_word_suffix": "</w>"} if clip else {}
    tokenizer = Tokenizer(models.BPE(**suffix))
    if clip:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False, **suffix,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def text_config(p: TextToImage, vocabulary: int, **ids: Any) -> Any:
    """Of both CLIP text encoders; `ids` are the tokenizer's bos_token_id, eos_token_id and pad_token_id."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=p.text_width, intermediate_size=4 * p.text_width, projection_dim=p.text_width,
        num_hidden_layers=p.text_layers, num_attention_heads=p.text_width // p.head_dim, max_position_embeddings=p.text_tokens,
        **ids,
    )  # fmt: skip


def build_text_encoders(p: TextToImage, texts: list[str], folder: Path):
    """CLIP tokenizer and the two CLIP text encoders (the second with a projection), SDXL's arrangement in small."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab_folder = folder / "tokenizer_vocabulary"
    if not (vocab_folder / "vocab.json").exists():
        tokenizer = train_tokenizer(texts, p.vocabulary, [end, start], clip=True)
        with atomic_folder(vocab_folder) as temporary:
            tokenizer.model.save(str(temporary))
            (temporary / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end,
                            "pad_token": end, "model_max_length": p.text_tokens})
            )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(vocab_folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = text_config(p, len(tokenizer), **ids)
    return tokenizer, CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_unet(p: TextToImage, latent_channels: int, size: int) -> Any:
    """SDXL's UNet in small, with `text_time` added embeddings."""
    from diffusers import UNet2DConditionModel

    cross = [bool(layers) for layers in p.transformer_layers]
    return UNet2DConditionModel(
        sample_size=size, in_channels=latent_channels, out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
        up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)),
        block_out_channels=tuple(p.channels), layers_per_block=p.layers, cross_attention_dim=2 * p.text_width,
        transformer_layers_per_block=tuple(max(1, n) for n in p.transformer_layers),
        attention_head_dim=tuple(c // p.head_dim for c in p.channels),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + p.text_width, norm_num_groups=16,
    )  # fmt: skip


def noise_schedule():
    """SDXL's betas rescaled to no signal at the last step, v-prediction and trailing steps (arXiv 2305.08891): where the noise
    is strong the loss then is the error of the picture itself, which a short training needs and references can lower."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        num_train_timesteps=1000, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def _time_ids(size: int) -> torch.Tensor:
    """SDXL's sizes of a whole square [6]."""
    return torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32)


def random_caption(label: dict, rng: np.random.Generator, drop_text: float, drop_label: float) -> str:
    """A caption with each label left out with probability `drop_label`, or nothing at all with `drop_text`."""
    if rng.random() < drop_text:
        return ""
    chosen = rng.random(len(LABELS)) < drop_label
    return caption(label, hide={name for name, out in zip(LABELS, chosen, strict=True) if out})


def train_text_to_image(params: Params, images: TrainingImages, vae_folder: Path, work: Path) -> Path:
    """A StableDiffusionXLPipeline folder with the VAE of `vae_folder`."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    from easyref.training.loss import diffusion_loss, encode_latents, encode_text

    p, seed = params.base.text_to_image, params.seed
    assert p is not None
    inputs = {"params": p.model_dump(), "images": images.content, "seed": seed, "vae": vae_folder.name}
    done, fingerprint = _part("diffusion", inputs, work)
    if done.exists():
        return done
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    torch.manual_seed(seed)
    texts = [caption(label, hide=()) for label in images.labels]
    tokenizer, encoder_1, encoder_2 = build_text_encoders(p, texts, work)
    unet = build_unet(p, vae.config.latent_channels, params.ingest.size // 2 ** (len(vae.config.block_out_channels) - 1))
    unet.to(memory_format=torch.channels_last)
    scheduler = noise_schedule()
    latents_NChw = encode_latents(vae, images.batch, len(images.sha256s), params.ingest.size)
    order = Order(images.weights, seed, "text_to_image")
    size = params.ingest.size
    time_ids_6 = _time_ids(size)

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        items = [order[n] for n in numbers]
        captions = [
            random_caption(images.labels[i], numpy_rng(seed, "caption", n), p.drop_text, p.drop_label)
            for i, n in zip(items, numbers, strict=True)
        ]
        text, pooled = encode_text([(tokenizer, encoder_1), (tokenizer, encoder_2)], captions)
        added = {"text_embeds": pooled, "time_ids": time_ids_6.expand(len(items), 6)}
        return diffusion_loss(unet, scheduler, latents_NChw[items], text, added, seed, numbers, p.min_snr)

    modules = nn.ModuleDict({"unet": unet, "text_encoder": encoder_1, "text_encoder_2": encoder_2})
    task = Task("base: text to image", [modules], dict(modules.named_parameters()), loss, fingerprint)
    train(task, p, done.with_suffix(".safetensors"))
    pipe: Any = StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoder_1, text_encoder_2=encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=scheduler, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    with atomic_folder(done) as folder:
        pipe.to(dtype=torch.float16).save_pretrained(folder)
    return done


def train_decoder(params: Params, images: TrainingImages, diffusion: Path, work: Path) -> Path:
    """The pipeline of `diffusion` with a decoder that is used to the UNet: what a UNet draws is a little off the latents of any image,
    and a decoder that was only shown those makes specks of it. The encoder and with it all latents stay."""
    from diffusers import StableDiffusionXLPipeline

    from easyref.training.loss import denoised, encode_text, to_latents

    p, p_vae, p_image, seed = params.base.decoder, params.base.vae, params.base.text_to_image, params.seed
    assert p is not None and p_vae is not None and p_image is not None
    inputs = {"params": p.model_dump(), "images": images.content, "seed": seed, "diffusion": diffusion.name}
    done, fingerprint = _part("decoder", inputs, work)
    if done.exists():
        return done
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(diffusion, torch_dtype=torch.float32, add_watermarker=False)
    vae, unet, scheduler = pipe.vae, pipe.unet.eval().requires_grad_(False), pipe.scheduler
    vae.requires_grad_(False)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_()
    encoders = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    order = Order(images.weights, seed, "decoder")
    size = params.ingest.size

    @torch.no_grad()
    def guessed(pixels_B3HW: torch.Tensor, captions: list[str], numbers: Sequence[int]) -> torch.Tensor:
        """Latents of the images as the UNet guesses them under noise of any strength up to that of `max_timestep`."""
        latents_BChw, rngs = to_latents(vae, pixels_B3HW), [torch_rng(seed, "decoder noise", n) for n in numbers]
        t_B = torch.cat([torch.randint(p.max_timestep, (1,), generator=rng) for rng in rngs])
        noise_BChw = torch.stack([torch.randn(latents_BChw.shape[1:], generator=rng) for rng in rngs])
        noisy_BChw = scheduler.add_noise(latents_BChw, noise_BChw, t_B)
        text_BLX, pooled_BP = encode_text(encoders, captions)
        added = {"text_embeds": pooled_BP, "time_ids": _time_ids(size).expand(len(captions), 6)}
        return denoised(scheduler, noisy_BChw, t_B, unet(noisy_BChw, t_B, text_BLX, added_cond_kwargs=added).sample)

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        items, rngs = [order[n] for n in numbers], [numpy_rng(seed, "decoder", n) for n in numbers]
        labels = [{**images.labels[i], "colors": ""} for i in items]  # which may be others in a moment
        captions = [random_caption(label, rng, p_image.drop_text, p_image.drop_label) for label, rng in zip(labels, rngs, strict=True)]
        pixels = [swap_colours(x, p_vae.swap_colours, rng) for x, rng in zip(images.batch(items), rngs, strict=True)]
        pixels_B3HW = torch.stack(pixels)
        out_B3HW = vae.decode(guessed(pixels_B3HW, captions, numbers) / vae.config.scaling_factor).sample
        return pixel_loss(out_B3HW - pixels_B3HW, p_vae.edge_weight)

    train(Task("base: decoder", [vae, unet], dict(decoder.named_parameters()), loss, fingerprint), p, done.with_suffix(".safetensors"))
    with atomic_folder(done) as folder:
        shutil.copytree(diffusion, folder, dirs_exist_ok=True)
        vae.half().save_pretrained(folder / "vae")
    return done


def draw_text_grid(params: Params, images: TrainingImages, diffusion: Path, count: int = 36, steps: int = 30) -> bytes:
    """PNG of what the base draws from the whole captions of `count` training images drawn by seed, beside those images."""
    from diffusers import StableDiffusionXLPipeline
    from PIL import Image

    from easyref.evaluation.grid import text_grid
    from easyref.images import to_png

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(diffusion, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    items = [Order(images.weights, params.seed, "text grid")[n] for n in range(count)]
    prompts = [caption(images.labels[i], hide=()) for i in items]
    noise = [torch_rng(params.seed, "text grid", n) for n in range(count)]
    size = params.ingest.size
    drawn = pipe(prompts, height=size, width=size, num_inference_steps=steps, guidance_scale=5.0, generator=noise).images
    return to_png(text_grid([(p, Image.fromarray(images.pixels[i]), d) for p, i, d in zip(prompts, items, drawn, strict=True)]))


# -- captioning --------------------------------------------------------------------------------------------------------

#: Qwen2-VL's chat form: images as vision tokens, then the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def mllm_config(p: Captioning, ids: dict[str, Any], vocabulary: int) -> Any:
    """Of the small Qwen2-VL; `ids` are those of the SPECIAL tokens."""
    from transformers import Qwen2VLConfig

    half = p.width // p.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # time, height, width: Qwen2-VL's 2:3:3
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": p.width, "intermediate_size": p.intermediate,
            "num_hidden_layers": p.layers, "num_attention_heads": p.heads, "num_key_value_heads": p.kv_heads,
            "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
        },
        vision_config={
            "depth": p.vision_layers, "embed_dim": p.vision_width, "hidden_size": p.width, "num_heads": p.vision_heads,
            "mlp_ratio": 4, "patch_size": p.patch, "spatial_merge_size": 2, "temporal_patch_size": 1,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip


def build_mllm(p: Captioning, size: int, texts: list[str]):
    """A small Qwen2-VL with tokenizer (chat template inside) and image processor for `size`-pixel images."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    raw = train_tokenizer(texts, p.vocabulary, SPECIAL, clip=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    processor = Qwen2VLImageProcessorPil(
        patch_size=p.patch, merge_size=2, temporal_patch_size=1, min_pixels=size * size, max_pixels=size * size,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(mllm_config(p, ids, len(tokenizer))), tokenizer, processor


def train_captioning(params: Params, images: TrainingImages, work: Path) -> Path:
    """A Qwen2VLForConditionalGeneration folder with image processor, tokenizer and chat template."""
    p, seed = params.base.captioning, params.seed
    assert p is not None
    instruction = params.reference.instruction
    inputs = {"params": p.model_dump(), "images": images.content, "seed": seed, "instruction": instruction}
    done, fingerprint = _part("mllm", inputs, work)
    if done.exists():
        return done
    torch.manual_seed(seed)
    texts = [caption(label, hide=()) for label in images.labels]
    texts += [DESCRIBE, COMMON, instruction, "user assistant"]
    model, tokenizer, processor = build_mllm(p, params.ingest.size, texts)
    tokens = (params.ingest.size // p.patch // 2) ** 2
    grid = torch.tensor([[1, params.ingest.size // p.patch, params.ingest.size // p.patch]])
    patches = _patches(images, processor)
    order = Order(images.weights, seed, "captioning")
    pad, image_token = tokenizer.pad_token_id, model.config.image_token_id

    def sample(number: int) -> tuple[list[int], list[int], list[int]]:
        """Images, prompt ids and answer ids of one captioning sample."""
        rng = numpy_rng(seed, "captioning", number)
        if rng.random() < p.several_images:
            _, members = images.groups[rng.integers(len(images.groups))]
            chosen = rng.choice(members, min(len(members), int(rng.integers(2, p.max_images + 1))), replace=False).tolist()
            question, answer = COMMON, caption(common_labels([images.labels[i] for i in chosen]), hide=())
        else:
            chosen = [order[number]]
            question, answer = DESCRIBE, caption(images.labels[chosen[0]], hide=())
        content = [{"type": "image"}] * len(chosen) + [{"type": "text", "text": question}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens))["input_ids"]
        return chosen, prompt, tokenizer(answer + "<|im_end|>")["input_ids"]

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        samples = [sample(n) for n in numbers]
        total = sum(len(answer) for _, _, answer in samples)
        # samples of one and of several images apart: together most of the tokens would be padding
        parts = [[s for s in samples if len(s[0]) == 1], [s for s in samples if len(s[0]) > 1]]
        return torch.stack([summed(part) for part in parts if part]).sum() / total

    def summed(samples: list[tuple[list[int], list[int], list[int]]]) -> torch.Tensor:
        """Cross-entropy summed over the answer tokens."""
        longest = max(len(q) + len(a) for _, q, a in samples)
        ids = torch.tensor([q + a + [pad] * (longest - len(q) - len(a)) for _, q, a in samples])
        labels = torch.tensor([[-100] * len(q) + a + [-100] * (longest - len(q) - len(a)) for _, q, a in samples])
        items = [i for chosen, _, _ in samples for i in chosen]
        out = model(
            input_ids=ids, attention_mask=(ids != pad).long(), pixel_values=patches[items].flatten(0, 1).float(),
            image_grid_thw=grid.expand(len(items), 3), mm_token_type_ids=(ids == image_token).int(), use_cache=False,
        )  # fmt: skip
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")

    task = Task("base: captioning", [model], dict(model.named_parameters()), loss, fingerprint)
    train(task, p, done.with_suffix(".safetensors"))
    with atomic_folder(done) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
    return done


def _patches(images: TrainingImages, processor) -> torch.Tensor:
    """Vision patches of all training images, half precision [N, P, 3·patch²]."""
    from PIL import Image

    out = []
    for start in range(0, len(images.pixels), 512):
        part = [Image.fromarray(x) for x in images.pixels[start : start + 512]]
        out.append(processor(part, return_tensors="pt")["pixel_values"].half().view(len(part), -1, 3 * processor.patch_size**2))
    return torch.cat(out)

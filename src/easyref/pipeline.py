"""EasyRef: reference images + prompt → images, on torch, inside any SDXL pipeline of diffusers.

The reference encoder runs once a group of references; its tokens become keys and values once an image (not once a step) and
LoRA is merged into the weights, so a step costs the plain UNet plus one attention over T tokens. What is encoded is kept in memory
and, with `cache`, on disk: samples are encoded one by one and in two steps (images, text), so that it is the same to the bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image

from easyref.cache import DiskCache, made_here
from easyref.images import to_rgb
from easyref.model import attention, reference, weights
from easyref.model.adapter import Adapter
from easyref.model.attention import Scales
from easyref.model.reference import PrefixStart, ReferenceEncoder, ReferenceInputs, ReferenceProcessor, ReferenceSample, null_image
from easyref.model.schedule import AS_BASE, Schedule
from easyref.records import HUB, read_json, sha256_file
from easyref.runtime import Encoder, Engines
from easyref.seeds import torch_rng

START_BYTES = 256 * 2**20  # of references kept for the next prompt
TOKEN_BYTES = 64 * 2**20  # of samples kept for the next seed: 8,000 at nano, 128 at SDXL's size
SIZE_STEP = 8  # pixels; diffusers takes no others
Sample = tuple[tuple[str, ...], str, tuple[float, ...]]  # digests of the references, prompt, weights


@dataclass(frozen=True)
class Request:
    """One image to make. No references: the null reference, which is text alone. `weights`: how much each reference counts.

    `negative_references`: what the image is led away from, with the negative prompt; the null reference if there are none.
    """

    prompt: str
    references: Sequence[Image.Image]
    seed: int
    negative_prompt: str = ""
    weights: Sequence[float] | None = None
    negative_references: Sequence[Image.Image] = ()


class EasyRef:
    """A trained EasyRef attached to an SDXL pipeline (`self.pipe`)."""

    def __init__(
        self, pipe: Any, encoder: ReferenceEncoder | Encoder, processor: ReferenceProcessor, adapter: Adapter,
        disk: DiskCache | None = None, schedule: Schedule = AS_BASE,
    ) -> None:  # fmt: skip
        self.pipe, self.encoder, self.processor, self.adapter = pipe, encoder, processor, adapter
        self._measures = copy.deepcopy((pipe.tokenizer, pipe.tokenizer_2))  # those of the pipe change their padding while it draws
        self._before = pipe.scheduler if schedule != AS_BASE else None
        pipe.scheduler = schedule.of(pipe.scheduler)
        self.encoded: LRUCache = LRUCache(TOKEN_BYTES, getsizeof=lambda tokens: tokens.nbytes)  # tokens_TX by sample
        self.starts: LRUCache = LRUCache(START_BYTES, getsizeof=lambda start: start.nbytes)  # by the references' digests
        self.disk = disk or DiskCache(Path(), 0, None)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32, engines: Engines | None = None,
        device: str | None = None, cache: bool = False,
    ) -> EasyRef:  # fmt: skip
        """Load a checkpoint folder and its base models, on `device`; None: on the GPU when there is one.

        `base` is the folder that holds base models trained here (default: beside the checkpoint); hub ids need none.
        `engines`: exported graphs that draw in place of torch (easyref/runtime.py); no weights are loaded then.
        `cache`: what is encoded is kept for other processes too (easyref/cache.py).
        """
        folder = Path(folder)
        config = weights.read_config(folder)
        beside = _beside(folder, base)
        mllm = _base_place(config.mllm_id, config.mllm_revision, beside)
        if engines:
            engines.check(folder)
            pipe = engines.pipeline(_base_place(config.base_id, config.base_revision, beside), config.base_revision, dtype)
            pipe.set_progress_bar_config(disable=True)
            adapter: Any = Adapter.install(pipe.unet, config.reference.num_tokens, None, None)  # for its scales
            adapter.payload = engines.payload
            processor = ReferenceProcessor.from_pretrained(mllm, config.reference, config.mllm_revision)
            encoder = engines.encoder(mllm, config.mllm_revision, config.reference)
            easyref = cls(pipe, encoder, processor, adapter, schedule=config.schedule)
            made_by = engines.about
        else:
            easyref = cls.attach(cls.base_pipeline(folder, base, dtype, device), folder, base, dtype)
            made_by = [str(dtype), getattr(easyref.encoder.mllm.config, "_commit_hash", None)]  # the hub's
        if cache:
            about = [made_by, _digests(folder, mllm, config.has_mllm), made_here(easyref.device, reference.__file__)]
            easyref.disk = DiskCache.of_user(about)
        return easyref

    @staticmethod
    def base_pipeline(
        folder: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32, device: str | None = None
    ) -> Any:
        """The SDXL pipeline that a checkpoint belongs to, without EasyRef; arguments as of `from_pretrained`."""
        from diffusers import StableDiffusionXLPipeline

        folder = Path(folder)
        config = weights.read_config(folder)
        place = _base_place(config.base_id, config.base_revision, _beside(folder, base))
        pipe = StableDiffusionXLPipeline.from_pretrained(place, revision=config.base_revision, torch_dtype=dtype, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def attach(cls, pipe: Any, folder: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32) -> EasyRef:
        """Put a checkpoint into a pipeline that is there already: any SDXL pipeline (ControlNet, img2img, inpaint …)."""
        from transformers import Qwen2VLForConditionalGeneration

        folder = Path(folder)
        config = weights.read_config(folder)
        place = _base_place(config.mllm_id, config.mllm_revision, _beside(folder, base))
        revision: Any = config.mllm_revision
        mllm = Qwen2VLForConditionalGeneration.from_pretrained(place, revision=revision, dtype=dtype)
        encoder = ReferenceEncoder(mllm, config.reference, torch_rng("attach")).to(pipe.device).eval().requires_grad_(False)
        adapter = Adapter.install(
            pipe.unet, config.reference.num_tokens, config.lora_rank, config.lora_alpha, torch_rng("attach", "lora")
        )
        try:
            weights.load(folder, encoder, adapter)
            adapter.merge_lora()
            processor = ReferenceProcessor.from_pretrained(place, config.reference, config.mllm_revision)
            return cls(pipe, encoder, processor, adapter, schedule=config.schedule)
        except BaseException:
            adapter.uninstall()  # the pipeline is the caller's, who may try again
            raise

    def detach(self) -> None:
        """Take EasyRef out of the pipeline, which then draws as before it was attached. LoRAs of others stay."""
        self.adapter.uninstall()
        if self._before:
            self.pipe.scheduler, self._before = self._before, None

    @torch.no_grad()
    def encode(
        self, references: Sequence[Sequence[Image.Image]], prompts: Sequence[str], weights: Sequence[Sequence[float] | None] = ()
    ) -> torch.Tensor:
        """Packed reference keys and values [B, 1, T, W] of each sample; an empty list of references is the null reference.
        `weights`: for each sample none, or a weight for each reference.

        A sample is encoded once. A new prompt for references that were encoded before runs its text only.
        """
        if not self.adapter.installed:
            raise ValueError("EasyRef is detached from its pipeline; attach the checkpoint again")
        samples: list[tuple[Sample, list[Image.Image]]] = []
        for i, (images, prompt) in enumerate(zip(references, prompts, strict=True)):
            given = tuple(weights[i] or ()) if weights else ()
            if given and len(given) != len(images):
                raise ValueError(f"request {i}: {len(given)} weights for {len(images)} references; give one for each")
            filled = [to_rgb(image) for image in images] or [null_image()]
            samples.append(((tuple(_digest(image) for image in filled), prompt, given), filled))
        tokens: dict[Sample, torch.Tensor] = {}
        for sample, filled in samples:
            if sample not in tokens:
                tokens[sample] = self._tokens(sample, filled).to(self.device)
        rows = {sample: row for row, sample in enumerate(tokens)}
        unet = self.pipe.unet
        there = self.device if unet.device.type == "meta" else unet.device  # an offloaded UNet is elsewhere now than when it draws
        payload = self.adapter.payload(torch.stack(list(tokens.values())).to(there, unet.dtype)).to(self.device)
        return payload[[rows[sample] for sample, _ in samples]]

    def _tokens(self, sample: Sample, images: list[Image.Image]) -> torch.Tensor:
        """tokens_TX from memory, from disk, or encoded."""
        if sample not in self.encoded:
            kept = self.disk.get(self.device, "tokens", *sample)
            if kept is None:
                kept = {"tokens": self._encode(sample, images)}
                self.disk.put(kept, "tokens", *sample)
            self.encoded[sample] = kept["tokens"]
        return self.encoded[sample]

    def _start(self, digests: tuple[str, ...], images: list[Image.Image]) -> PrefixStart:
        """The prefix over the images from memory, from disk, or run."""
        assert isinstance(self.encoder, ReferenceEncoder)
        if digests in self.starts:
            return self.starts[digests].to(self.device)
        kept = self.disk.get(self.device, "start", digests)
        if kept is None:
            start = self.encoder.start(self.processor([images], [""]).to(self.device))
            self.disk.put(vars(start), "start", digests)
        else:
            start = PrefixStart(**kept)
        if start.nbytes <= self.starts.maxsize:
            self.starts[digests] = start
        return start

    def _encode(self, sample: Sample, images: list[Image.Image]) -> torch.Tensor:
        digests, prompt, given = sample
        if isinstance(self.encoder, Encoder):
            inputs = self.processor([images], [prompt])
            (tokens_TX,) = self.encoder(inputs, self._bias(inputs, given))
            return tokens_TX
        self.encoder.to(self.device)  # the pipeline may have moved since, or be offloaded
        start = self._start(digests, images)
        inputs = self.processor.batch([ReferenceSample(start.images, prompt)])
        (tokens_TX,) = self.encoder(self.encoder.prefix_from(start, inputs.to(self.device)), self._bias(inputs, given))
        if self.pipe.device.type != "meta":
            self.encoder.to(self.pipe.device)  # with an offloaded one off the GPU again
        return tokens_TX

    def _bias(self, inputs: ReferenceInputs, given: tuple[float, ...]) -> torch.Tensor | None:
        return self.processor.bias(inputs, [given]).to(self.device) if given else None

    @torch.no_grad()
    def __call__(
        self, requests: Sequence[Request], steps: int = 30, guidance: float = 7.5, scale: float | Scales = 1.0,
        height: int | None = None, width: int | None = None, window: tuple[float, float] = (0.0, 1.0), **pipe_options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Images of a batch of requests. Each request's noise depends on its own seed alone, not on the batch.

        `guidance` 1 switches the unconditional branch (null or negative references + negative prompt) off. `scale`: of all
        cross-attentions, or by block (`attention.set_scale`); a block that is not named gets none, as in diffusers. `height`, `width`:
        if not given, the pipeline's own, which is that of its image where it takes one. `window`: the share of the steps in which
        references count, as ControlNet's control_guidance_start and _end. `pipe_options` go to the pipeline.
        """
        self._set_scale(scale)  # first: values that a graph makes have it in them
        positive = self.encode([r.references for r in requests], [r.prompt for r in requests], [r.weights for r in requests])
        return self.draw(requests, positive, steps, guidance, scale, height, width, window, **pipe_options)

    @torch.no_grad()
    def draw(
        self, requests: Sequence[Request], positive: torch.Tensor, steps: int, guidance: float, scale: float | Scales,
        height: int | None = None, width: int | None = None, window: tuple[float, float] = (0.0, 1.0), **pipe_options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """`__call__` with the keys and values [B, 1, T, W] that stand for the references, of any number T of tokens."""
        for request in requests:
            self.check_prompt(request.prompt)
            self.check_prompt(request.negative_prompt)
        self._set_scale(scale)
        payload = positive
        if guidance > 1:
            null = self._unconditional(requests)
            # a token attended to several times counts as often in the softmax: all of them equally often changes nothing
            repeats = positive.shape[2] // null.shape[2]
            payload = torch.cat([null.repeat(1, 1, repeats, 1), positive])
        with self._embeds_per_request(payload), self._only_in(window):
            return self.pipe(
                prompt=[r.prompt for r in requests], negative_prompt=[r.negative_prompt for r in requests],
                num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
                generator=[torch.Generator().manual_seed(r.seed) for r in requests], ip_adapter_image_embeds=[payload],
                **pipe_options,
            ).images  # fmt: skip

    @contextmanager
    def _embeds_per_request(self, payload: torch.Tensor) -> Iterator[None]:
        """Hand `payload` [B or 2B, 1, T, W] to the denoising loop as it is.

        diffusers takes `ip_adapter_image_embeds` for ONE image prompt and repeats it for every prompt of the batch; B of them
        would become B·B, and every request would see the references of all.
        """
        original = self.pipe.prepare_ip_adapter_image_embeds
        self.pipe.prepare_ip_adapter_image_embeds = lambda *_args, **_kwargs: [payload]
        try:
            yield
        finally:
            self.pipe.prepare_ip_adapter_image_embeds = original

    def _set_scale(self, scale: float | Scales) -> None:
        self.adapter.set_scale(0.0)
        self.adapter.set_scale(scale)

    @contextmanager
    def _only_in(self, window: tuple[float, float]) -> Iterator[None]:
        """References count in the steps that lie whole within `window`. Every SDXL pipeline calls its UNet once a step."""
        start, end = window
        if not 0 <= start <= end <= 1:
            raise ValueError(f"window {window}: give two shares of the steps, as (0.0, 0.6)")
        unet, step = self.pipe.unet, 0
        inside = dict(zip(attention.processors(unet), attention.scales(unet), strict=True))

        def before(*_: Any) -> None:
            nonlocal step
            total = self.pipe.num_timesteps
            self.adapter.set_scale(inside if start <= step / total and (step + 1) / total <= end else 0.0)
            step += 1

        hook = unet.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()
            self.adapter.set_scale(inside)

    @property
    def side(self) -> int:
        """Pixels of height and width that the base model was trained for."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that a scale may be given for."""
        return attention.blocks(self.pipe.unet)

    def check(self, scale: float | Scales, height: int | None, width: int | None) -> None:
        """ValueError for blocks that are not there and for sizes that are none of the model's."""
        attention.named_scales(self.pipe.unet, scale)
        for name, size in (("height", height), ("width", width)):
            if size is not None and (size % SIZE_STEP or not self.side // 2 <= size <= 2 * self.side):
                raise ValueError(f"{name} {size}: give a multiple of {SIZE_STEP} from {self.side // 2} to {2 * self.side}")

    def check_prompt(self, prompt: str) -> None:
        """ValueError when a text encoder would cut the prompt."""
        for tokenizer in self._measures:
            length = len(tokenizer(prompt).input_ids)
            if length > tokenizer.model_max_length:
                raise ValueError(
                    f"prompt of {length} tokens is over the text encoder's limit of {tokenizer.model_max_length}; shorten it"
                )

    def _unconditional(self, requests: Sequence[Request]) -> torch.Tensor:
        """The unconditional branch: null reference with the negative prompt (method.md §3), or negative references."""
        return self.encode([r.negative_references for r in requests], [r.negative_prompt for r in requests])


def _digest(image: Image.Image) -> str:
    """Of what the encoder sees of an image."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _digests(folder: Path, mllm: str, has_mllm: bool) -> list[str]:
    """Of all files that tokens depend on; what is from the hub goes by its commit."""
    local = [path for path in sorted(Path(mllm).rglob("*")) if path.is_file() and not (has_mllm and path.suffix == ".safetensors")]
    return [mllm if not local else "", *(sha256_file(path) for path in (folder / weights.CONFIG, folder / weights.WEIGHTS, *local))]


def _beside(folder: Path, base: str | Path | None) -> Path:
    """Where a checkpoint's base models are."""
    return Path(base) if base else folder.absolute().parent


def _base_place(model_id: str, revision: str | None, folder: Path) -> str:
    """A base model trained here lies at `folder`/id, one that the stage `base` fetched from the hub in `folder`/base; anything else is
    a hub id or a path."""
    local, fetched = folder / model_id, folder / "base" / HUB
    if local.exists():
        return str(local)
    for name, theirs in (read_json(fetched) if fetched.exists() else {}).items():
        if theirs == [model_id, revision]:
            return str(fetched.parent / name)
    if model_id.startswith("base/"):
        raise FileNotFoundError(f"{local}: base model missing beside the checkpoint; get it with `dvc pull base`")
    return model_id

"""`easyref plan`: what the stages would train, in how much memory and time, before anything is downloaded or run.

Every model is built by the code of a real run, but on torch's meta device: shapes and dtypes without weights. `Models.trainable`
chooses the trained tensors, and one microbatch is measured forward and backward (meter.py); so a frozen part that only passes gradients
on costs here what it costs there.

Units: parameters, bytes, FLOP (a multiply-add is two), seconds; on the device of each process.
Letters: B batch · L tokens of the MLLM · D its width · T reference tokens · W packed keys and values · C,h,w latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from easyref.config import Align, Captioning, Optimisation, Params, Stage, TextToImage
from easyref.evaluation.generations import CONDITIONS
from easyref.evaluation.mrbench import COMPARISON
from easyref.meter import DeviceKernels, matmul_rate, measure
from easyref.model import shapes
from easyref.model.attention import kv_layout, packed_width
from easyref.model.reference import PrefixStates
from easyref.progress import use_threads
from easyref.training import base
from easyref.training.align import PARTS, Readout, dealt
from easyref.training.ema import WIDTHS
from easyref.training.loss import diffusion_loss, encode_batch, encode_text, to_latents
from easyref.training.models import CHECKPOINT, DTYPES, Models, fresh_easyref
from easyref.training.stages import STAGES, parts, trains_mllm

P = TypeVar("P", bound=Optimisation)
META = torch.device("meta")
EFFICIENCY = 0.5  # share of a matrix product's speed that a training reaches: 0.51 to 0.54 in the nano stages on one CPU core
CHAT_TOKENS, TOKENS_A_REFERENCE = 20, 2  # of the chat form: around the message, around each image


@dataclass(frozen=True)
class Row:
    """One training, or the images that `evaluate` makes."""

    name: str
    images: int
    batch: int
    microbatch: int
    references: int  # of a sample, at most
    precision: str
    trained: int  # parameters
    frozen: int
    weights: int  # bytes of all parameters and buffers, in the dtypes of the run
    optimizer: int  # bytes of gradients, both moments of AdamW and the weight average
    activations: int  # bytes: the most that forward and backward of one microbatch hold besides
    encode: int  # bytes: the most that encoding images to latents holds, before the activations
    flop: float  # of one image
    processes: int = 1  # that share an update
    sharded: int = 0  # bytes of weights and optimizer on each under FSDP2; 0: it is not to be had

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + max(self.activations, self.encode)

    @property
    def memory_sharded(self) -> int:
        return self.sharded + max(self.activations, self.encode)

    def seconds(self, rate: float) -> float:
        """On devices with `rate` FLOP/s of large matrix products."""
        share = min(self.batch, _rounds(self.batch, self.microbatch, self.processes) * self.microbatch) / self.batch
        return self.images * share * self.flop / (rate * EFFICIENCY)


def _rounds(batch: int, microbatch: int, processes: int) -> int:
    """Microbatches of each process in an update, as `trainer.share` deals them out."""
    return -(-batch // (microbatch * processes))


def plan(params: Params, folder: Path, processes: int = 1) -> tuple[dict[str, int], dict[str, list[Row]]]:
    """Parameters of the base models, and all stages in order with what they train or make. `folder`: models/base. `processes`: that
    train the three stages together."""
    sizes = {name: _count([model]) for name, model in base_models(params, folder).items()}
    stages: dict[str, list[Row]] = {"ingest": [], "embed": [], "group": [], "split": [], "base": base_rows(params, folder)}
    stages |= training_rows(params, folder, tuple(STAGES), processes)
    drawn = evaluate_row(params, easyref_models(params, folder, None, "fp32"))
    more = len(COMPARISON.methods) - len(CONDITIONS) - 1  # `mrbench` finds those of `evaluate`, and a copy is not drawn
    baselines = replace(drawn, name="mrbench, without tuning", images=drawn.images // len(CONDITIONS) * more)
    return sizes, stages | {"evaluate": [drawn], "mrbench": [baselines], "report": []}


def training_rows(params: Params, folder: Path, names: Sequence[str], processes: int = 1) -> dict[str, list[Row]]:
    """Of the stages `names` among the three."""
    models = cache(partial(easyref_models, params, folder))  # LoRA of the full rank takes seconds to put in
    rows = {name: [stage_row(params, name, models, processes)] for name in names}
    if params.align and "pretrain" in rows:
        rows["pretrain"].insert(0, align_row(params, params.align, models, processes))
    return rows


def seconds(params: Params, folder: Path, names: Sequence[str], drawn: int) -> float:
    """About how long the training stages `names`, and drawing so many images, take on the device at hand."""
    rows = [row for rows in training_rows(params, folder, names).values() for row in rows]
    rows.append(replace(evaluate_row(params, easyref_models(params, folder, None, "fp32")), images=drawn))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {row.precision: matmul_rate(device, DTYPES[row.precision]) for row in rows}
    return sum(row.seconds(rates[row.precision]) for row in rows)


# -- models on the meta device -----------------------------------------------------------------------------------------


def base_models(params: Params, folder: Path) -> dict[str, Any]:
    """vae, unet, text_encoder, text_encoder_2, mllm in fp32: as training/base.py builds them, or as the hub has them."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, Qwen2VLForConditionalGeneration

    b, size = params.base, params.ingest.size
    with META:
        if b.source == "hub":
            return shapes.build(shapes.configs(str(b.diffusion_id), str(b.mllm_id), folder))
        assert b.vae and b.text_to_image and b.captioning
        text = base.text_config(b.text_to_image, b.text_to_image.vocabulary, bos_token_id=1, eos_token_id=0, pad_token_id=0)
        mllm = base.mllm_config(b.captioning, {name: i for i, name in enumerate(base.SPECIAL)}, b.captioning.vocabulary)
        return {
            "vae": base.build_vae(b.vae, size),
            "unet": base.build_unet(b.text_to_image, b.vae.latent_channels, size // 2 ** (len(b.vae.channels) - 1)),
            "text_encoder": CLIPTextModel(text),
            "text_encoder_2": CLIPTextModelWithProjection(text),
            "mllm": Qwen2VLForConditionalGeneration(mllm),
        }


def easyref_models(
    params: Params, folder: Path, lora_rank: int | None, precision: str, frozen_mllm: bool = False, recompute: Sequence[str] = ()
) -> Models:
    """What `load_models` gives, in the same dtypes, without weights."""
    m = base_models(params, folder)
    for name, model in m.items():
        if name in ("unet", "text_encoder", "text_encoder_2"):
            nn.Module.to(model, DTYPES[precision])  # diffusers' own `to` warns
        model.eval().requires_grad_(name == "mllm")
    prefix = DTYPES[precision] if frozen_mllm else torch.float32
    encoder, adapter = fresh_easyref(params, m["unet"], m["mllm"], lora_rank, prefix)
    none: Any = None
    models = Models(
        unet=m["unet"], vae=m["vae"], text_encoders=_text_encoders(m), scheduler=base.noise_schedule(), encoder=encoder,
        processor=none, adapter=adapter, accelerator=none, base_hash="",
    )  # fmt: skip

    def again() -> tuple[Any, Any]:
        """Around a block and around its second run: the backward pass has left the kernels that the first one was in."""
        return nullcontext(), DeviceKernels(precision)

    models.recompute(recompute, partial(CHECKPOINT, context_fn=again))
    return models


# -- trainings ---------------------------------------------------------------------------------------------------------


def base_rows(params: Params, folder: Path) -> list[Row]:
    """The four trainings of training/base.py, in its order; none if the base models come from the hub."""
    b, size = params.base, params.ingest.size
    if b.source == "hub":
        return []
    assert b.vae and b.text_to_image and b.decoder and b.captioning
    p_vae, p_image, p_decoder, p_text = b.vae, b.text_to_image, b.decoder, b.captioning
    m = base_models(params, folder)
    drawing = nn.ModuleList([m["unet"], m["text_encoder"], m["text_encoder_2"]])
    decoder = nn.ModuleList([m["vae"].post_quant_conv, m["vae"].decoder])

    def vae_loss() -> Tensor:
        pixels_B3HW = torch.empty(p_vae.microbatch, 3, size, size, device=META)
        return base.vae_loss(m["vae"], pixels_B3HW, _latents(params, m["vae"], p_vae.microbatch), p_vae)

    def decoder_loss() -> Tensor:
        pixels_B3HW = torch.empty(p_decoder.microbatch, 3, size, size, device=META)
        with torch.no_grad():
            text_BLX, added = _text_states(_text_encoders(m), p_decoder.microbatch)
            t_B = torch.zeros(p_decoder.microbatch, dtype=torch.int64, device=META)
            guessed_BChw = m["unet"](to_latents(m["vae"], pixels_B3HW), t_B, text_BLX, added_cond_kwargs=added).sample
        return base.pixel_loss(m["vae"].decode(guessed_BChw).sample - pixels_B3HW, p_vae.edge_weight)

    def row(name: str, p: Optimisation, trains: nn.Module, loss: Callable[[], Tensor], references: int, vae: Any | None) -> Row:
        modules = [trains, vae] if vae else [trains]
        return _row(params, f"base: {name}", p, modules, trains.parameters(), loss, references, "fp32", vae, encode_batch(size))

    return [
        row("captioning", p_text, m["mllm"], lambda: _caption_loss(params, m, p_text), p_text.max_images, None),
        row("vae", p_vae, m["vae"], vae_loss, 0, None),
        row("text to image", p_image, drawing, lambda: _image_loss(params, m, p_image), 0, m["vae"]),
        _row(params, "base: decoder", p_decoder, [m["vae"], drawing], decoder.parameters(), decoder_loss, 0, "fp32", None, 1),
    ]


def _caption_loss(params: Params, m: dict[str, Any], p: Captioning) -> Tensor:
    """Samples of one image and of several (here: of the most) apart, as in training/base.py."""
    several, losses = round(p.microbatch * p.several_images), []
    for batch, images in ((p.microbatch - several, 1), (several, p.max_images)):
        if batch:
            prompt = m["text_encoder"].config.max_position_embeddings
            states_BLD = _mllm_states(params, m["mllm"].model, batch, images, prompt, masked=batch > 1)  # a batch has padding
            labels_N = torch.empty(states_BLD.shape[:2], dtype=torch.int64, device=META).flatten()
            losses.append(F.cross_entropy(m["mllm"].lm_head(states_BLD).flatten(0, 1).float(), labels_N))
    return torch.stack(losses).sum()


def _image_loss(params: Params, m: dict[str, Any], p: TextToImage) -> Tensor:
    text_BLX, added = _text_states(_text_encoders(m), p.microbatch)
    latents_BChw = _latents(params, m["vae"], p.microbatch)
    return diffusion_loss(m["unet"], base.noise_schedule(), latents_BChw, text_BLX, added, 0, range(p.microbatch), p.min_snr)


def stage_row(params: Params, name: str, make: Callable[..., Models], processes: int = 1) -> Row:
    """One of the three stages, with the most references in every sample; what a run caches is computed once an image."""
    p = _of_each(getattr(params, name), processes)
    trains = parts(name, p)
    frozen = not trains_mllm(params, name, STAGES[name].starts_from is not None)
    models = make(p.lora_rank or None, p.precision, frozen, tuple(p.recompute))
    trained, _ = models.trainable(trains)

    def loss() -> Tensor:
        text_BLX, added = _text_states(models.text_encoders, p.microbatch)
        tokens_BTX = models.encoder(_prefix(params, models, p.microbatch, p.max_references))
        conditions = {**added, "image_embeds": [tokens_BTX[:, None]]}
        latents_BChw = _latents(params, models.vae, p.microbatch)
        return diffusion_loss(models.unet, models.scheduler, latents_BChw, text_BLX, conditions, 0, range(p.microbatch), p.min_snr)

    return _row(params, name, p, _modules(models), trained.values(), loss, p.max_references, p.precision, models.vae, 1, processes)


def align_row(params: Params, p: Align, make: Callable[..., Models], processes: int = 1) -> Row:
    """The warm start of the pretraining, on its models; text states and latents are computed once a caption and once an image."""
    stage, p = params.pretrain, _of_each(p, processes)
    models = make(stage.lora_rank or None, stage.precision, False, tuple(stage.recompute))
    trained, _ = models.trainable(PARTS)
    with META:
        (held_TE,) = dealt(_latents(params, models.vae, 1), params.reference.num_tokens)
        readout = Readout(held_TE, models.unet.config.cross_attention_dim)

    def loss() -> Tensor:
        tokens_BTX = models.encoder(_prefix(params, models, p.microbatch, p.max_references))
        return tokens_BTX.square().mean() + readout(tokens_BTX).square().mean()

    modules, parameters = [*_modules(models), readout], [*trained.values(), *readout.parameters()]
    return _row(params, "pretrain: align", p, modules, parameters, loss, p.max_references, stage.precision, models.vae, 1, processes)


def _of_each(p: P, processes: int) -> P:
    """An update's images are shared out (`trainer.share`); what each process has at once is no more than its part."""
    return p.model_copy(update={"microbatch": min(p.microbatch, -(-p.batch // processes))})


def evaluate_row(params: Params, models: Models) -> Row:
    """The images that are generated: all in one precision, LoRA merged, packed keys and values. The judges come on top."""
    p, references, dtype = params.evaluate, params.finetune_multi.max_references, DTYPES[params.evaluate.precision]
    for module in _modules(models):
        nn.Module.to(module, dtype)
    rows, width_W = p.batch * (2 if p.guidance > 1 else 1), packed_width(kv_layout(models.unet))
    latents_BChw, step_1 = _latents(params, models.vae, rows).to(dtype), torch.empty(1, device=META)
    with torch.no_grad():
        text_BLX, added = _text_states(models.text_encoders, rows)
        payload_B1TW = torch.empty(rows, 1, params.reference.num_tokens, width_W, device=META, dtype=dtype)
        conditions = {**added, "image_embeds": [payload_B1TW]}
        prompt = models.text_encoders[0][0].model_max_length
        read = measure(lambda: _mllm_states(params, models.encoder.mllm, p.batch, references, prompt), "fp32")
        step = measure(lambda: models.unet(latents_BChw, step_1, text_BLX, added_cond_kwargs=conditions).sample, "fp32")
        decode = measure(lambda: models.vae.decode(latents_BChw[: p.batch]).sample, "fp32")
    return Row(
        name="evaluate", images=(p.held_out_samples + p.held_in_samples) * len(CONDITIONS), batch=p.batch, microbatch=p.batch,
        references=references, precision=p.precision, trained=0, frozen=_count(_modules(models)), weights=_bytes(_modules(models)),
        optimizer=0, activations=max(read.peak, step.peak, decode.peak), encode=0,
        flop=(read.flop + p.steps * step.flop + decode.flop) / p.batch,
    )  # fmt: skip


def _row(
    params: Params, name: str, p: Optimisation, modules: Sequence[nn.Module], trained: Iterable[nn.Parameter],
    loss: Callable[[], Tensor], references: int, precision: str, vae: Any | None, encoded: int, processes: int = 1,
) -> Row:  # fmt: skip
    """Measure one microbatch of a training of `trained` while `modules` are in memory; `vae` first encodes so many images at once."""
    parameters, encode = list(trained), 0
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)  # as after the first microbatch: gradients add up in place
    cost = measure(loss, precision)
    if vae is not None:
        pixels_B3HW = torch.empty(encoded, 3, params.ingest.size, params.ingest.size, device=META)
        with torch.no_grad():
            encode = measure(lambda: to_latents(vae, pixels_B3HW), "fp32").peak
    moments = 2 if p.optimizer == "adamw" else 2 / 4  # of 8 bits instead of 32
    averages = (p.ema_images > 0) + (len(WIDTHS) if isinstance(p, Stage) and p.snapshot_images else 0)
    copies = 1 + moments + averages  # gradient, moments, weight averages: each in the dtype of its weight
    count, size = sum(w.numel() for w in parameters), sum(w.nbytes for w in parameters)
    weights, optimizer = _bytes(modules), round(copies * size)
    # As the paper's ZeRO-2: a share of all that trains, and for both passes the weights whole, in the precision they run in; gradients,
    # too, that add up over microbatches before they are shared out.
    several = _rounds(p.batch, p.microbatch, processes) > 1
    takes_shares = processes > 1 and p.optimizer == "adamw"  # trainer.py
    sharded = weights - size + (size + optimizer) // processes + count * DTYPES[precision].itemsize + several * size
    return Row(
        name=name, images=p.images, batch=p.batch, microbatch=p.microbatch, references=references, precision=precision,
        trained=count, frozen=_count(modules) - count, weights=weights, optimizer=optimizer,
        activations=cost.peak, encode=encode, flop=cost.flop / p.microbatch, processes=processes, sharded=sharded * takes_shares,
    )  # fmt: skip


# -- inputs of one microbatch, as shapes -------------------------------------------------------------------------------


class _Tokenizer:
    """Token ids of the right shape, for `encode_text`."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, captions: Sequence[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), self.model_max_length, dtype=torch.int64, device=META))


def _text_encoders(m: dict[str, Any]) -> list[tuple]:
    return [(_Tokenizer(e.config.max_position_embeddings), e) for e in (m["text_encoder"], m["text_encoder_2"])]


def _text_states(text_encoders: Sequence[tuple], batch: int) -> tuple[Tensor, dict[str, Any]]:
    """Text states [B, L, X] and SDXL's added conditions."""
    text_BLX, pooled_BP = encode_text(text_encoders, [""] * batch)
    return text_BLX, {"text_embeds": pooled_BP, "time_ids": torch.empty(batch, 6, device=META)}


def _latents(params: Params, vae: Any, batch: int) -> Tensor:
    """[B, C, h, w]."""
    side = params.ingest.size // 2 ** (len(vae.config.block_out_channels) - 1)
    return torch.empty(batch, vae.config.latent_channels, side, side, device=META)


def _prefix(params: Params, models: Models, batch: int, references: int) -> PrefixStates:
    """What the aggregator reads of samples with so many references each."""
    prompt = models.text_encoders[0][0].model_max_length
    states_BLD = _mllm_states(params, models.encoder.mllm, batch, references, prompt)
    mask_BL = torch.ones(states_BLD.shape[:2], dtype=torch.int64, device=META)
    return PrefixStates(states_BLD, mask_BL, mask_BL.expand(3, -1, -1))


def _mllm_states(params: Params, core: Any, batch: int, references: int, prompt_tokens: int, masked: bool = False) -> Tensor:
    """States [B, L, D] of the MLLM's layers in `core`: `ReferenceEncoder.prefix` without what looks at values, which meta tensors
    do not have. References are square."""
    r, vision, lm = params.reference, core.config.vision_config, core.language_model
    factor = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(params.ingest.size, params.ingest.size, factor, r.min_pixels, r.max_pixels)
    grid_3 = torch.tensor([1, height // vision.patch_size, width // vision.patch_size])
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = batch * references * int(grid_3.prod())
    pixels, places = torch.empty(patches, patch_width, device=META), torch.zeros(patches, 2, dtype=torch.int64, device=META)
    grids = grid_3.expand(batch * references, 3)
    images = core.get_image_features(pixels, grids, position_ids=places, return_dict=True).pooler_output
    text = _text_tokens(r.instruction, references, prompt_tokens)
    text_BLD = lm.embed_tokens(torch.zeros(batch, text, dtype=torch.int64, device=META))
    embeds_BLD = torch.cat([torch.cat(list(images)).to(text_BLD).unflatten(0, (batch, -1)), text_BLD], dim=1)
    length = embeds_BLD.shape[1]
    mask_B1LL = torch.ones(batch, 1, length, length, dtype=torch.bool, device=META) if masked else None
    positions_3BL = torch.zeros(3, batch, length, dtype=torch.int64, device=META)
    return lm(inputs_embeds=embeds_BLD, attention_mask=mask_B1LL, position_ids=positions_3BL, use_cache=False).last_hidden_state


def _text_tokens(instruction: str, references: int, prompt_tokens: int) -> int:
    """L without image tokens, about: a token a word, and a prompt of the most tokens that the text encoders take."""
    return CHAT_TOKENS + TOKENS_A_REFERENCE * references + len(instruction.split()) + prompt_tokens


def _modules(models: Models) -> list[nn.Module]:
    return [models.unet, models.vae, models.encoder, *(encoder for _, encoder in models.text_encoders)]


def _count(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


# -- output ------------------------------------------------------------------------------------------------------------

HEAD = ("", "images", "batch", "refs", "trained", "frozen", "weights", "optimizer", "activations", "memory", "FLOP/image", "time")
SHARDED = """
of each process: batch at once, memory with a copy of the model (DDP); sharded: memory with a share of what trains, its weights kept
between both passes (FSDP2, --fsdp_reshard_after_forward false); without buffers of the exchange · time: without the exchange"""
FOOT = """\
batch: images an update / at once in memory · refs: references of a sample, at most; memory and time take that many
optimizer: gradients, moments, weight average · activations: the most that one forward and backward hold besides
memory: the three together, or (*) weights and the VAE while it encodes the images before the training, if that is more;
without workspaces, fragmentation, validation · time: about; without validation, data and the VAE's encoding"""


def report(params: Params, folder: Path, tflops: float | None, as_json: bool, processes: int = 1) -> str:
    """The plan as a table of 120 columns or as JSON; times are for a device of `tflops` TFLOP/s, None: for the one at hand."""
    if tflops is not None and tflops <= 0:
        raise ValueError(f"--tflops {tflops:g}: give the TFLOP/s that a large matrix product reaches on the device, above 0")
    device = "given" if tflops else "cuda" if torch.cuda.is_available() else "cpu"
    use_threads(params.threads)
    sizes, stages = plan(params, folder, processes)
    precisions = sorted({row.precision for rows in stages.values() for row in rows})
    rates = {name: tflops * 1e12 if tflops else matmul_rate(torch.device(device), DTYPES[name]) for name in precisions}
    if as_json:
        values = {n: [_values(row, rates[row.precision]) for row in rows] for n, rows in stages.items()}
        head = {"preset": params.preset, "device": device, "flop_per_second": rates, "efficiency": EFFICIENCY, "base_models": sizes}
        return json.dumps(head | {"stages": values}, indent=2)
    speeds = ", ".join(f"{_short(rate)}FLOP/s in {name}" for name, rate in rates.items())
    devices = "one device" if processes == 1 else f"each of {processes} devices"
    lines = [
        f"preset {params.preset}, {params.ingest.size} px · parameters: "
        + ", ".join(f"{n} {_short(c).strip()}" for n, c in sizes.items()),
        f"{devices} ({device}): {speeds} as a matrix product, of which a training reaches about {EFFICIENCY:.0%}",
    ]
    if params.base.source == "hub":
        ids = {str(params.base.diffusion_id), str(params.base.mllm_id)} - shapes.DIFFUSION.keys() - shapes.MLLM.keys()
        lines += [f"{name}: shapes from {folder}" for name in sorted(ids)]
        if device == "cpu":
            lines += ["no CUDA device here, so times are those of this CPU; --tflops X plans for another device"]
    sharded = processes > 1
    heads = (*HEAD[:-2], "sharded", HEAD[-1]) if sharded else HEAD
    table: list[tuple[str, ...]] = [heads]
    for name, rows in stages.items():
        table += [_cells(row, rates[row.precision], sharded) for row in rows] or [
            (name, "from the hub" if name == "base" else "frozen extractors" if name == "embed" else "no model")
        ]
    full = [cells for cells in table if len(cells) == len(heads)]
    widths = [max(len(cells[0]) for cells in table), *(max(len(cells[i]) for cells in full) for i in range(1, len(heads)))]
    aligned = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=False))] for cells in table]
    return "\n".join([*lines, "", *(" ".join(cells).rstrip() for cells in aligned), "", FOOT + SHARDED * sharded])


def _values(r: Row, rate: float) -> dict[str, Any]:
    more = {"memory_sharded": r.memory_sharded} if r.sharded else {}
    return asdict(r) | {"memory": r.memory, "seconds": r.seconds(rate)} | more


def _cells(r: Row, rate: float, sharded: bool) -> tuple[str, ...]:
    weights, optimizer, activations, memory = (f"{n / 2**30:.2f} GiB" for n in (r.weights, r.optimizer, r.activations, r.memory))
    star = "*" if r.encode > r.optimizer + r.activations else ""
    counts = (_short(r.images), f"{r.batch}/{r.microbatch}", str(r.references or "-"), _short(r.trained), _short(r.frozen))
    share = f"{r.memory_sharded / 2**30:.2f} GiB" if r.sharded else "-"  # not all stages train together
    cost = share if sharded else _short(r.flop)
    return (r.name, *counts, weights, optimizer, activations, star + memory, cost, duration(r.seconds(rate)))


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 2.57 G."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:#.3g} {prefix}".replace(". ", " ")
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    """In the largest unit that gives at least two: 90 s, 14 min, 3 h, 5 d, 12 y."""
    for unit, size in (("y", 365 * 86400), ("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"

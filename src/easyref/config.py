"""Typed, complete parameters: one section per stage. The only reader of params.yaml and presets/*.yaml.

A file is complete, or an error names the key, the value and the fix: only options that are off unless asked for have a default.
Work is counted in images, never in steps, so batch size and the number of processes change nothing else.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

Share = Field(ge=0.0, le=1.0)
Rate = Field(gt=0.0, lt=1.0)
Part = Literal["reference_tokens", "final_layer", "projector", "reference_kv", "vision", "mllm", "lora"]  # what stages train


class ConfigError(ValueError):
    """A wrong parameter; the message is one line."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class IngestLimits(Section):
    """What an image of a heap must be like to be taken; the rest ends in rejects.parquet."""

    max_bytes: PositiveInt
    max_pixels: PositiveInt
    max_side: PositiveInt
    min_side: PositiveInt
    max_aspect: float = Field(ge=1)  # longer side over shorter
    max_frames: PositiveInt  # of an animation, of which the first counts
    max_metadata: PositiveInt  # bytes
    near_duplicate_distance: float = Field(ge=0)  # root mean square difference of 16×16 thumbnails, of 255
    max_reject_share: float = Share  # the stage fails above it
    seconds: float = Field(gt=0)  # for one image
    memory_mib: PositiveInt  # for one image
    workers: PositiveInt


class Model(Section):
    """A model of the hub at a pinned revision, or a folder (revision null)."""

    id: str
    revision: str | None


class Score(Model):
    """A transformers image classifier, and how much of `label` an image may have: a probability, or what a model of one label says."""

    label: str
    min: float | None
    max: float | None

    @model_validator(mode="after")
    def _limits(self) -> Score:
        if self.min is None and self.max is None:
            raise ValueError("min and max are null; give one of them")
        return self


class Ingest(Section):
    source: Literal["emoji", "folder", "tar", "table", "upstream"]
    path: str | None  # of the folder, the tar file or folder of tars, the table, the JSON; emoji has none
    size: int = Field(gt=0, multiple_of=8)  # pixels: the shorter side of every stored image; the VAE halves it three times
    palette: int = Field(ge=2, le=256)  # PNG colours of emoji
    shard_images: PositiveInt
    limits: IngestLimits
    scores: dict[Literal["nsfw", "aesthetic", "watermark"], Score] = {}  # by the reason why an image is not taken

    @model_validator(mode="after")
    def _path(self) -> Ingest:
        if (self.source == "emoji") != (self.path is None):
            raise ValueError("path belongs to every source but emoji; give it, or path: null")
        if self.source == "emoji" and self.scores:
            raise ValueError("scores are of a heap's images, emoji are drawn; leave them out")
        return self


class Subjects(Model):
    """A transformers object detector."""

    min_score: float = Share
    max_boxes: PositiveInt
    min_share: float = Share  # of the image's area


class Faces(Section):
    """ONNX files of the form that insightface's packs have (data/faces.py), and which faces count."""

    detector: str  # SCRFD with landmarks
    embedder: str  # ArcFace
    min_score: float = Share
    min_side: PositiveInt  # pixels of a box's shorter side
    max_faces: PositiveInt  # of an image, the largest


class Embed(Section):
    """What vectors are made with (data/embed.py); null: what comes inside (Lite0, MiniLM), or none (subjects, faces)."""

    batch: PositiveInt
    workers: PositiveInt
    images: Model | None  # CLIP or DINOv2
    texts: Model | None  # CLIP
    subjects: Subjects | None
    faces: Faces | None = None


class Likeness(Section):
    """When vectors are alike enough to make a group (data/learned.py)."""

    threshold: float = Field(gt=-1, lt=1)  # least mean cosine
    near_duplicate: float = Field(gt=-1, le=1)  # cosine from which two are the same picture
    neighbours: PositiveInt  # nearest ones that are looked at
    min_members: int = Field(ge=2)
    max_members: int = Field(ge=2)
    resolution: float | None = Field(default=None, gt=0)  # makes communities (the less, the larger); without, all members are alike

    @model_validator(mode="after")
    def _members(self) -> Likeness:
        if self.resolution and self.threshold < 0:
            raise ValueError(f"threshold {self.threshold} is below 0, which communities do not know; give 0 or more")
        if self.min_members > self.max_members:
            raise ValueError(f"min_members {self.min_members} is over max_members {self.max_members}; swap them")
        return self


class Group(Section):
    """`labels`: images with the same labels. `embeddings`: images that look alike."""

    by: Literal["labels", "embeddings"]
    likeness: dict[Literal["subject", "style", "tag", "identity"], Likeness]  # the kinds that are learned
    workers: PositiveInt
    memory_gib: float = Field(ge=0)  # vectors of a space that take more are read from disk, cell by cell
    kinds: list[Literal["subject", "person", "style", "given"]]  # of labels
    min_members: int = Field(ge=2)
    min_styles: int = Field(ge=2)  # a subject group spans at least so many styles


class Split(Section):
    held_out_share: float = Share  # of the concepts
    held_out_groups: PositiveInt
    held_in_groups: PositiveInt
    samples_per_group: PositiveInt  # leave-one-out samples of a held-out or held-in group
    max_references: PositiveInt
    near_duplicate_distance: float = Field(ge=0)  # root mean square difference of 16×16 thumbnails, of 255


class Restart(Section):
    """A second round of the learning rate (warm restart, arXiv 1608.03983): the first has fallen to zero at image `at`."""

    at: PositiveInt
    learning_rate: float = Rate
    cooldown_images: int = Field(ge=0)


class Optimisation(Section):
    """One training run. The learning rate is constant after `warmup_images`, then falls to zero over `cooldown_images`."""

    images: PositiveInt  # training length, in images seen
    batch: PositiveInt  # images an update
    microbatch: PositiveInt  # images at once in memory
    learning_rate: float = Rate
    weight_decay: float = Field(ge=0)
    warmup_images: int = Field(ge=0)
    cooldown_images: int = Field(ge=0)
    ema_images: int = Field(ge=0)  # half-life of the weight average, 0: none
    save_images: PositiveInt  # a checkpoint every so many images
    restart: Restart | None = None
    keep_states: PositiveInt = 1  # checkpoints that stay: an earlier one is taken when the newest cannot be read
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # moments in 8 bits (bitsandbytes): a quarter of their memory

    @model_validator(mode="after")
    def _divide(self) -> Optimisation:
        if self.batch % self.microbatch:
            raise ValueError(f"microbatch {self.microbatch} does not divide batch {self.batch}; use a divisor")
        first = self.restart.at if self.restart else self.images
        if self.warmup_images + self.cooldown_images > first:
            raise ValueError("warmup_images + cooldown_images is more than images (or restart.at); shorten them")
        if self.restart and self.restart.at + self.warmup_images + self.restart.cooldown_images > self.images:
            raise ValueError("restart.at + warmup_images + restart.cooldown_images is more than images; shorten them")
        return self


class VAE(Optimisation):
    channels: list[PositiveInt]
    layers: PositiveInt
    latent_channels: PositiveInt
    kl_weight: float = Field(ge=0)
    edge_weight: float = Field(ge=0)
    swap_colours: float = Share  # of the images that get red, green and blue in another order


class TextToImage(Optimisation):
    channels: list[PositiveInt]
    layers: PositiveInt
    transformer_layers: list[NonNegativeInt]  # of each level; 0: no cross-attention there
    head_dim: PositiveInt
    text_width: PositiveInt  # of each of the two text encoders
    text_layers: PositiveInt
    text_tokens: PositiveInt
    vocabulary: PositiveInt
    drop_text: float = Share
    drop_label: float = Share  # each label of a caption is left out with this probability
    min_snr: float | None = Field(gt=0)

    @model_validator(mode="after")
    def _levels(self) -> TextToImage:
        if len(self.transformer_layers) != len(self.channels):
            raise ValueError(
                f"transformer_layers has {len(self.transformer_layers)} levels, channels {len(self.channels)}; give as many"
            )
        return self


class Decoder(Optimisation):
    """The VAE's decoder, trained further on what the UNet makes of noised latents."""

    max_timestep: PositiveInt  # the strongest noise


class Captioning(Optimisation):
    vocabulary: PositiveInt
    width: PositiveInt
    intermediate: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    vision_width: PositiveInt
    vision_layers: PositiveInt
    vision_heads: PositiveInt
    patch: PositiveInt
    several_images: float = Share  # share of "what do these images have in common" samples
    max_images: PositiveInt


class Report(Section):
    """reports/data.html."""

    groups: PositiveInt  # of a contact sheet
    members: PositiveInt  # of a group on it
    rejects: PositiveInt  # examples of a reason


class Base(Section):
    """The frozen base models: trained here (`train`) or pulled from the hub at pinned revisions (`hub`)."""

    source: Literal["train", "hub"]
    diffusion_id: str | None
    diffusion_revision: str | None
    mllm_id: str | None
    mllm_revision: str | None
    vae: VAE | None
    text_to_image: TextToImage | None
    decoder: Decoder | None
    captioning: Captioning | None

    @model_validator(mode="after")
    def _source(self) -> Base:
        hub = (self.diffusion_id, self.diffusion_revision, self.mllm_id, self.mllm_revision)
        trained = (self.vae, self.text_to_image, self.decoder, self.captioning)
        given, empty, names = (
            (hub, trained, "diffusion_id, diffusion_revision, mllm_id, mllm_revision")
            if self.source == "hub"
            else (trained, hub, "vae, text_to_image, decoder, captioning")
        )
        if any(v is None for v in given) or any(v is not None for v in empty):
            raise ValueError(f"source {self.source} needs exactly {names}; set the others to null")
        return self


class Reference(Section):
    """The reference encoder (method.md §1). `paper` = (false, bidirectional, mrope), `released` = (true, causal, sequential)."""

    num_tokens: PositiveInt
    prefix_final_norm: bool
    final_layer_attention: Literal["bidirectional", "causal"]
    positions: Literal["mrope", "sequential"]
    layer: Literal[-1, -2, -3] = -1  # of the LLM, that the reference tokens join; other ones are an ablation
    # V_ref starts as a copy of the UNet's to_v (paper), or at zero: tokens of a fresh encoder are noise to the UNet, and a fast
    # learning rate silences noise sooner than it learns to read it
    value_init: Literal["text", "zero"]
    instruction: str
    min_pixels: PositiveInt
    max_pixels: PositiveInt
    max_references: PositiveInt


class Samples(Optimisation):
    """A training on references and prompts, and how its samples are drawn (training/inputs.py)."""

    drop_image: float = Share
    drop_text: float = Share
    drop_both: float = Share
    hide_labels: float = Share  # share of prompts that leave out what the references show
    invent_words: float = Field(default=0.0, ge=0, le=1)  # share of prompts whose subject is words that do not exist
    group_share: float = Share  # of samples whose references are the others of the target's group, not the target itself
    max_references: PositiveInt
    truncate: float = Share  # probability of keeping a random 2..R-1 of R > 2 references
    swap_colours: float = Share  # of the samples, whose images all get red, green and blue in another order
    mirror: float = Share  # of the samples, whose images are all mirrored
    keep_aspect: bool = False  # of the target, on about ingest.size² pixels; else its largest square (data/frames.py)
    face_share: float = Field(default=0.0, ge=0, le=1)  # of the targets with a face that are their own reference: only the face is
    crops: PositiveInt = 1  # places of that square along the longer side, from edge to edge; 1: the middle

    @model_validator(mode="after")
    def _crops(self) -> Samples:
        if self.keep_aspect and self.crops > 1:
            raise ValueError(f"keep_aspect leaves nothing to choose for crops {self.crops}; set crops to 1, or keep_aspect to false")
        return self

    @model_validator(mode="after")
    def _drops(self) -> Samples:
        if self.drop_image + self.drop_text + self.drop_both > 1:
            raise ValueError("drop_image + drop_text + drop_both is more than 1; lower them")
        return self


class Align(Samples):
    """Warm start of the pretraining (training/align.py)."""

    @model_validator(mode="after")
    def _whole_squares(self) -> Align:
        if self.keep_aspect or self.face_share:
            raise ValueError("keep_aspect and face_share are not for the warm start, whose tokens hold whole squares; leave them out")
        return self


class Stage(Samples):
    """One of the three training stages (method.md §4); what each one trains stands in training/stages.py."""

    new_part_rate: float = Field(ge=1.0)  # learning-rate factor of reference tokens, projector and K_ref/V_ref
    lora_rank: int = Field(ge=0)
    min_snr: float | None = Field(gt=0)  # weight of the loss over timesteps; null: the paper's plain mean
    precision: Literal["fp32", "bf16"]
    stored: Literal["fp32", "fp16"] = "fp32"  # the checkpoint's weights
    freeze: list[Part] = []  # parts that the stage trains otherwise
    recompute: list[Literal["unet", "mllm", "vision"]] = []  # whose blocks run again in the backward pass: less memory, more time
    compile: bool = False  # the blocks of UNet and MLLM by torch.compile
    cache_prefix: bool = False  # keep the states of a frozen MLLM, too; each is then computed alone
    noise_offset: float = Field(default=0.0, ge=0)  # deviation of a constant that each channel's noise gets in training
    prediction: Literal["epsilon", "v_prediction"] | None = None  # of the UNet; null: as what the stage starts from
    zero_terminal_snr: bool | None = None  # no signal at the last timestep; null: as what the stage starts from
    snapshot_images: NonNegativeInt = 0  # weight averages for `easyref ema` are stored every so many images, 0: none
    sample_images: NonNegativeInt = 0  # a picture of held-out samples every so many images, 0: none
    rates: dict[Part, Annotated[float, Field(gt=0)]] = {}  # learning-rate factors by part, in the place of new_part_rate or 1

    @model_validator(mode="after")
    def _options(self) -> Stage:
        for name in ("snapshot_images", "sample_images"):
            if getattr(self, name) % self.batch:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of batch {self.batch}; use one")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction v_prediction: without signal, the noise says nothing of the image")
        return self


class Loading(Section):
    """How a training's inputs get to the models (training/store.py, ahead.py); changes no result."""

    workers: NonNegativeInt  # threads that read and decode ahead of the model, 0: none
    memory_gib: float = Field(gt=0)  # for encodings and images, of a process
    disk_gib: float = Field(ge=0)  # for encodings of later runs, 0: none
    folder: str  # where; on a disk of this machine, also if several share the project


class Evaluate(Section):
    steps: PositiveInt
    guidance: float = Field(ge=1.0)
    scale: float = Field(ge=0.0)
    batch: PositiveInt
    held_out_samples: PositiveInt
    held_in_samples: PositiveInt
    grid_rows: PositiveInt
    bootstrap: PositiveInt
    precision: Literal["fp32", "bf16"] = "fp32"  # of all models that draw


class GroupLora(Section):
    """The baseline that tunes a LoRA of the base UNet on the references of a sample (training/group_lora.py)."""

    rank: PositiveInt
    steps: PositiveInt
    batch: PositiveInt  # images a step
    learning_rate: float = Rate
    together: PositiveInt  # samples tuned side by side


class MRBench(Section):
    """All baselines on the samples of `evaluate`, drawn with its settings."""

    lora: GroupLora
    seeds: int = Field(ge=2)  # of a sample, for variety
    seed_samples: PositiveInt
    counts: Annotated[list[PositiveInt], Field(min_length=1)]  # of references, given to the same samples
    count_samples: PositiveInt
    clip: Model | None  # clip_i, clip_t
    dino: Model | None  # dino_i
    face: str | None  # face_i: an ArcFace ONNX file, for images of aligned faces


class Release(Section):
    """What a model must reach to become champion: held-out fidelity with the right references."""

    min_fidelity: float
    min_gain: float  # over the champion on the same samples


class Params(Section):
    preset: str
    seed: int = Field(ge=0)
    threads: int = Field(ge=0)  # of torch, 0: all cores
    loading: Loading
    ingest: Ingest
    embed: Embed
    group: Group
    split: Split
    report: Report
    base: Base
    reference: Reference
    align: Align | None  # null: none, as in the paper
    pretrain: Stage
    finetune_single: Stage
    finetune_multi: Stage
    evaluate: Evaluate
    mrbench: MRBench
    release: Release

    @model_validator(mode="after")
    def _together(self) -> Params:
        for name in ("align", "pretrain", "finetune_single", "finetune_multi"):
            stage: Samples | None = getattr(self, name)
            if stage and stage.max_references > self.reference.max_references:
                raise ValueError(
                    f"{name}.max_references {stage.max_references} is over reference.max_references "
                    f"{self.reference.max_references}; lower it"
                )
        for before, after in (("pretrain", "finetune_single"), ("finetune_single", "finetune_multi")):
            has, wants = (getattr(self, name).lora_rank for name in (before, after))
            if has and has != wants:
                raise ValueError(f"{after}.lora_rank {wants} is not that of {before}, {has}, whose LoRA goes on; set both alike")
        for key, most in (("mrbench.counts", max(self.mrbench.counts)), ("split.max_references", self.split.max_references)):
            if most > self.reference.max_references:
                raise ValueError(f"{key} {most} is over reference.max_references {self.reference.max_references}; lower it")
        text = self.base.text_to_image
        if self.align and text and self.reference.num_tokens > text.text_tokens:
            raise ValueError(
                f"align needs a text token for each of reference.num_tokens {self.reference.num_tokens}, "
                f"base.text_to_image.text_tokens is {text.text_tokens}; raise it, or set align: null"
            )
        if self.reference.min_pixels > self.reference.max_pixels:
            raise ValueError("reference.min_pixels is over reference.max_pixels; swap them")
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises:
        ConfigError: one line with the key, the value and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such parameter file; run in the project folder, or `easyref preset nano`")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 from byte {error.start} on; save it as UTF-8") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}: not valid YAML{f' at line {where.line + 1}' if where else ''}; fix the indentation") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections of parameters, found {type(values).__name__}")
    return parse_params(values, str(path))


def parse_params(values: dict[str, Any], where: str = "parameters") -> Params:
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_one_line(error, values)}") from error


def _one_line(error: ValidationError, values: dict[str, Any]) -> str:
    first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    key = ".".join(str(part) for part in first["loc"]) or "parameters"
    value = first["input"]
    shown = f" = {value!r}" if not isinstance(value, dict) else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}{shown}: unknown key; {fix}"
    if first["type"] == "missing":
        return f"{key}: missing; add it (presets/nano.yaml shows every key)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "float_type" and isinstance(value, str) and (parts := re.fullmatch(r"([-+]?\d+)e([-+]?)(\d+)", value, re.I)):
        message += f"; to YAML this is text, write {parts[1]}.0e{parts[2] or '+'}{parts[3]}"
    return f"{key}{shown}: {message[0].lower()}{message[1:]}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    """Of the section at `path`, in which keys of a dictionary may stand between sections."""
    at: Any = Params
    for part in path:
        at = get_args(at)[1] if get_origin(at) is dict else _section(at).model_fields[str(part)].annotation
    return list(_section(at).model_fields)


def _section(annotation: Any) -> type[BaseModel]:
    return next(c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel))

"""The three stages of EasyRef (method.md §4) as a table, and the one function that runs any of them.

Stages differ by data: what is trained, which checkpoint they start from; where samples come from stands in the parameters.
Letters: B batch · L text tokens · T reference tokens · X cross-attention width · C,h,w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from easyref.config import Params, Stage
from easyref.data.captions import caption
from easyref.data.dataset import TrainingImages
from easyref.data.frames import Framing
from easyref.model import weights
from easyref.model.schedule import Schedule
from easyref.model.weights import CheckpointConfig
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file, sha256_json
from easyref.training.ahead import ahead
from easyref.training.align import align
from easyref.training.curves import write_curves
from easyref.training.ema import Averages
from easyref.training.engine import Engine
from easyref.training.inputs import NULL, Inputs, Sample, Sampler, keep_frozen, microbatches, open_store
from easyref.training.loss import diffusion_loss, encode_batch, noised
from easyref.training.models import DTYPES, Models, load_models
from easyref.training.samples import Pictures
from easyref.training.state import remove_state
from easyref.training.trainer import FREE, Task, train


@dataclass(frozen=True)
class Spec:
    trains: tuple[str, ...]  # names of ReferenceEncoder.parts() and Adapter.parts(); LoRA comes with its rank
    starts_from: str | None


ALIGNMENT = ("final_layer", "reference_tokens", "projector", "reference_kv")
STAGES = {
    "pretrain": Spec(ALIGNMENT, None),
    "finetune_single": Spec((*ALIGNMENT, "vision", "mllm"), "pretrain"),
    "finetune_multi": Spec((*ALIGNMENT, "vision", "mllm"), "finetune_single"),
}


def parts(name: str, p: Stage) -> tuple[str, ...]:
    """What the stage trains under its parameters. In the paper's pretraining LoRA has no rank."""
    lora = ("lora",) if p.lora_rank else ()
    return tuple(part for part in (*STAGES[name].trains, *lora) if part not in p.freeze)


def frozen_prefix(trains: Collection[str]) -> bool:
    return not {"vision", "mllm"} & set(trains)


def trains_mllm(params: Params, name: str, starts_from_another: bool) -> bool:
    """Whether the MLLM changes: in the stage, or in the warm start before it."""
    return not frozen_prefix(parts(name, getattr(params, name))) or (params.align is not None and not starts_from_another)


@dataclass(frozen=True)
class Stream:
    """The samples of a stage by image number, and what the trainer asks of them."""

    name: str
    p: Stage
    seed: int
    models: Models
    inputs: Inputs
    sample: Callable[[int], Sample]

    def loss(self, numbers: Sequence[int]) -> torch.Tensor:
        samples, keys = [self.sample(n) for n in numbers], [f"{self.name}/{n}" for n in numbers]
        return sample_loss(self.models, self.inputs, samples, self.seed, keys, self.p.min_snr, self.p.noise_offset)

    def split(self, numbers: range, most: int) -> list[list[int]]:
        return [[numbers[i] for i in part] for part in microbatches([self.sample(n) for n in numbers], most, self.inputs.size)]

    def describe(self, number: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        s, named = self.sample(number), [*self.inputs.images.sha256s, "null reference"]  # NULL is -1
        latents_1Chw = self.inputs.latents([s])
        _, t_1, _ = noised(self.models.scheduler, latents_1Chw, self.seed, [f"{self.name}/{number}"])
        fact = {"target": named[s.target], "references": [named[r] for r in s.references], "prompt": s.prompt, "timestep": t_1.item()}
        if s.face:
            fact["face"] = asdict(s.face)
        return fact, {f"latents/{number}": latents_1Chw[0]}

    def task(self, parameters: dict[str, nn.Parameter], depends: dict[str, Any], workers: int, **more: Any) -> Task:
        read = partial(ahead, sample=self.sample, load=self.inputs.load, workers=workers)
        modules = [self.models.encoder, self.models.unet]
        return Task(self.name, modules, parameters, self.loss, depends, split=self.split, ahead=read, describe=self.describe, **more)


def stream(params: Params, name: str, models: Models, inputs: Inputs) -> Stream:
    p, special = getattr(params, name), models.processor.tokenizer.all_special_tokens
    for sha256, label in zip(inputs.images.sha256s, inputs.images.labels, strict=True):
        text = caption(label, hide=())
        if odd := [token for token in special if token in text]:  # the MLLM would refuse it, at the same image each time
            fix = "change it and run ingest, group and split again"
            raise ValueError(f"the caption of image {sha256} ({label['source']}) holds {odd[0]}, a special token of the MLLM; {fix}")
    sample = lru_cache(4 * p.batch)(Sampler(inputs.images, p, params.seed, name))
    return Stream(name, p, params.seed, models, inputs, sample)


def run_stage(
    params: Params, name: str, data: Path, models_folder: Path, out: Path, curves: Path, work: Path, starts_from: str | None,
    allow: Collection[str] = (),
) -> None:  # fmt: skip
    """Run one stage of the table and write its checkpoint folder `out` and its training `curves`, from that of the stage
    `starts_from`. A killed run goes on from its state in `work`, on any number of processes; the state of a finished one is removed, so
    that the next call trains again. `allow`: values that may differ from those a state was saved under."""
    p = getattr(params, name)
    trains = parts(name, p)
    if starts_from and not (models_folder / starts_from / weights.WEIGHTS).exists():  # before the imports and models that take a minute
        before = models_folder / starts_from
        raise FileNotFoundError(f"{before}: no checkpoint, from which {name} starts; run `easyref {starts_from}` first, or `dvc pull`")
    hardware = use_threads(params.threads)
    models, checkpoint = start_models(params, name, models_folder, models_folder / starts_from if starts_from else None)
    engine = Engine(models.accelerator)
    engine.say(hardware)
    images = TrainingImages(data)
    start = sha256_file(models_folder / starts_from / weights.WEIGHTS) if starts_from else models.base_hash
    frozen = frozen_prefix(trains)
    store = open_store(params.loading, models, [p.precision, p.compile], models_folder / "base")
    inputs = Inputs(models, images, frozen, store, _framing(p, images, models), p.cache_prefix)
    validate = Validation(params, inputs, data)
    samples = stream(params, name, models, inputs)  # what it lacks is told before the work
    warm = work / "align.safetensors" if params.align and not starts_from else None
    if warm:
        align(params, inputs, validate.inputs, warm, engine, allow)
        engine.wait()
    if frozen:
        keep_frozen(store, models, sha256_file(warm) if warm else start if checkpoint.has_mllm else models.base_hash)
    trained, factors = models.trainable(trains, p.new_part_rate, p.rates)
    engine.say(f"{name}: trains {sum(t.numel() for t in trained.values()):,} parameters of {', '.join(trains)}")
    depends: dict[str, Any] = {
        "stage": name, "seed": params.seed, "images": images.content, "start": start,
        "reference": params.reference.model_dump(exclude_defaults=True),
    }  # fmt: skip
    if p.face_share:
        depends["faces"] = sha256_json(images.faces)
    if not starts_from:
        depends["align"] = params.align.model_dump(exclude=set(FREE)) if params.align else None
    watchers = (
        Averages(work / f"{name}.ema", p.snapshot_images, checkpoint),
        Pictures(work / f"{name}.samples", p.sample_images, validate.inputs, validate.of_kinds, params.seed),
    )
    more: dict[str, Any] = {"factors": factors, "validate": validate, "shard": True, "watchers": watchers}
    state = work / f"{name}.safetensors"
    task = samples.task(trained, depends, params.loading.workers, **more)
    train(task, p, state, engine, allow)
    tensors = engine.gather(weights.tensors(models.encoder, models.adapter, checkpoint.has_mllm))
    if not engine.main:
        return
    weights.save(out, tensors, checkpoint, DTYPES[p.stored])
    write_curves(state.with_suffix(".jsonl"), curves)
    if warm:
        write_curves(warm.with_suffix(".jsonl"), curves / "align")
        remove_state(warm)
    remove_state(state)


def start_models(params: Params, name: str, models_folder: Path, before: Path | None) -> tuple[Models, CheckpointConfig]:
    """The models as the stage starts with them, from the checkpoint `before`, and the config of the one that it will write."""
    p = getattr(params, name)
    with_mllm = trains_mllm(params, name, before is not None)
    models = load_models(params, models_folder, p.lora_rank or None, p.precision, not with_mllm)
    schedule = Schedule(prediction=p.prediction, zero_terminal_snr=p.zero_terminal_snr)
    if before:
        config = weights.load(before, models.encoder, models.adapter, fresh_lora=True)
        with_mllm |= config.has_mllm
        schedule = schedule.over(config.schedule)
    models.use(schedule)
    models.recompute(p.recompute)
    if p.compile:
        models.compile()
    return models, models.checkpoint_config(params, p, with_mllm)


def _framing(p: Stage, images: TrainingImages, models: Models) -> Framing:
    """The area is the square of the images' shorter side; sides are what VAE and UNet take whole, for SDXL at 1024 multiples of 64
    pixels (method.md §4)."""
    if not p.keep_aspect:
        return Framing()
    side = min(images.labels[0]["height"], images.labels[0]["width"])  # of all, by `ingest`
    vae, unet = (2 ** (len(model.config.block_out_channels) - 1) for model in (models.vae, models.unet))
    return Framing(side, vae * unet * max(1, side // (16 * vae * unet)))


def sample_loss(
    models: Models, inputs: Inputs, samples: list[Sample], seed: int, numbers: list[str], min_snr: float | None = None,
    noise_offset: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Mean error of what the UNet predicts of the targets under their references and prompts (method.md §4)."""
    latents_BChw = inputs.latents(samples)  # in fp32, and the noise schedule with it: in bf16 there is no noise at the first timesteps
    with models.autocast():
        text_BLX, pooled_BP = inputs.text_states([s.prompt for s in samples])
        tokens_BTX = inputs.reference_tokens(samples)
        conditions = {"text_embeds": pooled_BP, "time_ids": inputs.time_ids(samples), "image_embeds": [tokens_BTX[:, None]]}
        return diffusion_loss(models.unet, models.scheduler, latents_BChw, text_BLX, conditions, seed, numbers, min_snr, noise_offset)


class Validation:
    """Loss on the held-out samples at fixed noise and timesteps, with the right references, those of the next sample of the
    same kind, and the null reference: the cheapest early signal that references are used (right < shuffled < none)."""

    def __init__(self, params: Params, inputs: Inputs, data: Path) -> None:
        self.params, self.models = params, inputs.models
        table = read_table(data / "split" / "samples.parquet").filter(split="held_out").sort("kind", "sample_id")
        if not len(table):
            raise ValueError(f"{data / 'split'}: no held-out samples to judge the training by; `easyref split` says what to change")
        rows = list(table.iter_rows(named=True))
        self.images = TrainingImages(data, sorted({s for r in rows for s in (r["target"], *r["references"])}))
        place = {s: i for i, s in enumerate(self.images.sha256s)}
        refs = [tuple(place[s] for s in r["references"]) for r in rows]
        targets = [place[r["target"]] for r in rows]
        conditions: dict[str, list[tuple[int, ...]]] = {
            "right": refs,
            "shuffled": _shifted(refs, [r["kind"] for r in rows]),
            "none": [(NULL,)] * len(rows),
        }
        self.samples = {
            name: [Sample(t, r, row["prompt"]) for t, r, row in zip(targets, chosen, rows, strict=True)]
            for name, chosen in conditions.items()
        }
        self.of_kinds = [(row["kind"], sample) for row, sample in zip(rows, self.samples["right"], strict=True)]
        self.inputs = replace(inputs, images=self.images, frozen_prefix=False)

    def __call__(self) -> dict[str, float]:
        side = min(self.images.labels[0][name] for name in ("height", "width"))  # of all, by `ingest`
        result, most = {}, min(32, encode_batch(side))  # the references of a sample are as many as there are
        for name, samples in self.samples.items():
            losses = []
            for part in microbatches(samples, most, self.inputs.size, by_references=False):
                chosen, numbers = [samples[i] for i in part], [f"validation/{i}" for i in part]
                with torch.no_grad():
                    losses.append(sample_loss(self.models, self.inputs, chosen, self.params.seed, numbers).item() * len(part))
            result[f"held_out_{name}"] = sum(losses) / len(samples)
        return result


def _shifted(references: list[tuple[int, ...]], kinds: list[str]) -> list[tuple[int, ...]]:
    """References moved on by about half the samples within each kind."""
    out = list(references)
    for kind in set(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        for a, b in zip(places, np.roll(places, len(places) // 2), strict=True):
            out[a] = references[b]
    return out

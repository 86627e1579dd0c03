"""`easyref ablate NAME`: the three stages trained again with one thing changed, each variant evaluated on the same held-out samples.

Every variant is this project's own parameters with a few keys changed (`variants`) and all training lengths times `share`. At a small
share it says whether a change breaks learning, not how far it would get. How references are read and how many there are needs no
training: `easyref mrbench` compares that (`aggregation` and `references` in the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easyref.config import Params, parse_params
from easyref.evaluation.evaluate import EVALUATE, Evaluated, evaluate
from easyref.evaluation.metrics import paired_difference
from easyref.evaluation.report import ablation_png, interval
from easyref.evaluation.stage import Place
from easyref.plan import duration, seconds
from easyref.progress import use_threads
from easyref.records import read_json, sha256_file, sha256_json, write_bytes, write_json
from easyref.training.stages import STAGES, run_stage

CHAIN = tuple(STAGES)
LENGTHS = ("images", "warmup_images", "cooldown_images", "ema_images")
#: The paper's rows beside our variants, in their order (method.md §7): held-out CLIP-I, CLIP-T, DINO-I; SDXL on photographs.
PAPER = {
    "tokens": ("32 tokens: .813, .693, .591", "64 tokens: .833, .709, .614", "128 tokens: .827, .705, .611"),
    "layer": ("-1: .833, .709, .614", "-2: .831, .704, .616", "-3: .828, .702, .617"),
}
NOTES = (
    "Trained on {images} images, {share:.2g} of the lengths in the parameters, once each; {samples} held-out samples in {groups} "
    "groups. Loss: of the last stage, with the right references. Fidelity: cosine of centred Lite0 features of image and target. 95 % "
    "intervals over groups, differences paired; no interval has what another seed of the training would change. So short a training "
    "shows whether a change breaks learning, not how far it would get."
)
PAPER_NOTE = " The paper's figures are of SDXL on photographs, fully trained, in other metrics: compare the order of the rows alone."
Variants = Mapping[str, tuple[dict[str, Any], tuple[str, ...]]]  # name -> changed keys, stages that train


def variants(name: str, params: Params) -> Variants:
    """The variants of an ablation.

    Raises:
        ValueError: no such ablation.
    """
    text, tokens = params.base.text_to_image, params.reference.num_tokens
    most = text.text_tokens if params.align and text else 2 * tokens  # the warm start has a text token for each
    known: dict[str, Callable[[], Variants]] = {
        "tokens": lambda: {f"{n} tokens": ({"reference.num_tokens": n}, CHAIN) for n in (tokens // 2, tokens, min(2 * tokens, most))},
        "layer": lambda: {str(n): ({"reference.layer": n}, CHAIN) for n in (-1, -2, -3)},
        "attention": lambda: {word: ({"reference.final_layer_attention": word}, CHAIN) for word in ("bidirectional", "causal")},
        "stages": lambda: {"all": ({}, CHAIN)} | {f"no {left}": ({}, tuple(s for s in CHAIN if s != left)) for left in CHAIN},
        "drops": lambda: {
            f"{rate:g}": ({f"{s}.drop_{what}": rate for s in CHAIN for what in ("image", "text", "both")}, CHAIN)
            for rate in (0.0, 0.05, 0.1)
        },
    }
    if name not in known:
        inside = "; `easyref mrbench` has it" if name in ("aggregation", "references") else ""
        raise ValueError(f"ablation {name!r}: not one of {', '.join(known)}{inside}")
    return known[name]()


def ablate(params: Params, name: str, share: float, samples: int, data: Path, models: Path, out: Path, work: Path) -> dict[str, Any]:
    """Train and evaluate all variants; `metrics/ablate/NAME.json`, `reports/ablate/NAME.md` and `.png`. Given again after a kill, goes
    on."""
    if not 0 < share <= 1:
        raise ValueError(f"--share {share:g}: the share of the training lengths, above 0 and at most 1")
    chosen = variants(name, params)
    print(use_threads(params.threads))
    short = shortened(params, share)
    cost = {stages: seconds(short, models / "base", stages, 3 * samples) for _, stages in chosen.values()}
    about = duration(sum(cost[stages] for _, stages in chosen.values()))
    print(f"{name}: {len(chosen)} variants at {share:g} of the training lengths, at least {about} from nothing", flush=True)
    drawn, losses, trained_on = dict[str, Evaluated](), dict[str, float](), inputs(data, models)
    for variant, (keys, stages) in chosen.items():
        changed = shortened(change(params, keys), share)
        folder = work / sha256_json([changed.model_dump(), stages, trained_on])[:16]
        print(f"{name}: {variant}", flush=True)
        train_chain(changed, stages, data, models, folder)
        losses[variant] = read_json(folder / "metrics" / stages[-1] / "held_out.json")[-1]["held_out_right"]
        place = Place(changed, data, folder, stages[-1])
        drawn[variant] = evaluate(
            EVALUATE, place.samples, place.images, place.store.image, place.together(), changed.evaluate, seed=changed.seed,
            out=work, embedded=place.embedded, limits={"held_out": samples},
        )  # fmt: skip
    base = next((v for v, (keys, stages) in chosen.items() if change(params, keys) == params and stages == CHAIN), next(iter(chosen)))
    found = {
        variant: {
            "changed": chosen[variant][0], "stages": chosen[variant][1],
            **{k: v for k, v in of.result["held_out"].items() if k != "by_kind" and v}, "held_out_loss": losses[variant],
            "right_minus_base": over(of, drawn[base], params.evaluate.bootstrap, params.seed),
        }
        for variant, of in drawn.items()
    }  # fmt: skip
    length = sum(getattr(short, stage).images for stage in CHAIN) + (short.align.images if short.align else 0)
    result = {
        "variants": found, "base": base, "share": share, "images": length, "samples": samples, "seed": params.seed,
        "paper_clip_i_clip_t_dino_i": PAPER.get(name),
    }  # fmt: skip
    write_json(out / "metrics" / "ablate" / f"{name}.json", result)
    write_bytes(out / "reports" / "ablate" / f"{name}.png", ablation_png(name, found))
    page = f"# Ablation: {name}\n\n{table(result)}\n\n![]({name}.png)\n"
    write_bytes(out / "reports" / "ablate" / f"{name}.md", page.encode())
    return result


def over(variant: Evaluated, base: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """By metric: what the right references score more than under `base`, on the samples that both have; None where there are none."""
    mine, theirs = ({c.sample_id: i for i, c in enumerate(of.cases["held_out"])} for of in (variant, base))
    both = [name for name in mine if name in theirs]
    groups, found = np.array([variant.cases["held_out"][mine[name]].group_id for name in both]), dict[str, Any]()
    for metric, scores in variant.scores["held_out"].items():
        a, b = scores["right"][[mine[n] for n in both]], base.scores["held_out"][metric]["right"][[theirs[n] for n in both]]
        use = np.isfinite(a) & np.isfinite(b)
        found[metric] = paired_difference(a[use], b[use], groups[use], seed=seed, resamples=resamples) if use.any() else None
    return found


def inputs(data: Path, models: Path) -> list[str]:
    """Hashes of the data and of the base models: what was trained on other ones is not gone on with."""
    files = [data / "images" / "images.parquet", *sorted((data / "split").glob("*.parquet"))]
    return [sha256_file(file) for file in (*files, *sorted((models / "base").rglob("*.safetensors")))]


def train_chain(params: Params, stages: tuple[str, ...], data: Path, models: Path, folder: Path) -> None:
    """Checkpoints of `stages`, each from the one before, in `folder`; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to((models / "base").resolve())
    before = None
    for stage in stages:
        done = folder / f"{stage}.json"
        start = sha256_file(folder / before / "easyref.safetensors") if before else None
        if not done.exists() or read_json(done) != start:
            run_stage(params, stage, data, folder, folder / stage, folder / "metrics" / stage, folder / "work", before)
            write_json(done, start)
        before = stage


def change(params: Params, keys: dict[str, Any]) -> Params:
    """`params` with dotted keys changed, checked as a file is."""
    values = params.model_dump()
    for key, value in keys.items():
        section, field = key.split(".")
        values[section][field] = value
    return parse_params(values, "ablate")


def shortened(params: Params, share: float) -> Params:
    """All training lengths of the stages times `share`, in whole batches. How often they save and validate stays."""
    values = params.model_dump()
    for name in ("align", *CHAIN):
        if p := values[name]:
            p |= {key: round(p[key] * share) for key in LENGTHS}
            p["images"] = max(1, -(-p["images"] // p["batch"])) * p["batch"]
            if p["restart"]:
                p["restart"] |= {key: max(1, round(p["restart"][key] * share)) for key in ("at", "cooldown_images")}
    return parse_params(values, "ablate")


def table(result: dict[str, Any]) -> str:
    """The variants in Markdown: held-out fidelity, what it is over the base's, what the right references bring, the paper's figures;
    and how to read it."""
    base, paper = result["base"], result["paper_clip_i_clip_t_dino_i"] or ()
    heads = ["variant", "held-out loss", "fidelity", f"over {base}", "over shuffled references", "over none"]
    heads += ["paper: CLIP-I, CLIP-T, DINO-I"] if paper else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for number, (variant, entry) in enumerate(result["variants"].items()):
        f = entry["fidelity"]
        gaps = [entry["right_minus_base"]["fidelity"], f["right_minus_shuffled"], f["right_minus_none"]]
        cells = [variant, f"{entry['held_out_loss']:.4f}", f"{f['right']:.3f}", *map(interval, gaps)]
        cells[3] = "" if variant == base else cells[3]
        lines.append(f"| {' | '.join(cells + list(paper[number : number + 1]))} |")
    first = next(iter(result["variants"].values()))["fidelity"]
    notes = NOTES.format(images=result["images"], share=result["share"], samples=first["samples"], groups=first["groups"])
    return "\n".join([*lines, "", notes + PAPER_NOTE * bool(paper)])

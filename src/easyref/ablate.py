"""`easyref ablate NAME`: the three stages trained again with one thing changed, each variant evaluated on the same held-out samples.

Every variant is this project's own parameters with a few keys changed (`variants`) and all training lengths times `share`. At a small
share it says whether a change breaks learning, not how far it would get. How references are read and how many there are needs no
training: `easyref mrbench` compares that (`aggregation` and `references` in the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyref.config import Params, parse_params
from easyref.evaluation.evaluate import EVALUATE, evaluate
from easyref.evaluation.report import ablation_png
from easyref.evaluation.stage import Place
from easyref.progress import use_threads
from easyref.records import read_json, sha256_file, sha256_json, write_bytes, write_json
from easyref.training.stages import STAGES, run_stage

CHAIN = tuple(STAGES)
LENGTHS = ("images", "warmup_images", "cooldown_images", "ema_images", "save_images")
#: The paper's held-out CLIP-I, CLIP-T, DINO-I of the variants it has (method.md §7): SDXL on photographs.
PAPER = {
    "tokens": {"half": (0.813, 0.693, 0.591), "as set": (0.833, 0.709, 0.614), "double": (0.827, 0.705, 0.611)},
    "layer": {"-1": (0.833, 0.709, 0.614), "-2": (0.831, 0.704, 0.616), "-3": (0.828, 0.702, 0.617)},
}
Variants = Mapping[str, tuple[dict[str, Any], tuple[str, ...]]]  # name -> changed keys, stages that train


def variants(name: str, params: Params) -> Variants:
    """The variants of an ablation.

    Raises:
        ValueError: no such ablation.
    """
    text, tokens = params.base.text_to_image, params.reference.num_tokens
    most = text.text_tokens if params.align and text else 2 * tokens  # the warm start has a text token for each
    known: dict[str, Callable[[], Variants]] = {
        "tokens": lambda: {
            word: ({"reference.num_tokens": n}, CHAIN)
            for word, n in {"half": tokens // 2, "as set": tokens, "double": min(2 * tokens, most)}.items()
        },
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
    """Train and evaluate all variants; `metrics/ablate/NAME.json` and `reports/ablate/NAME.png`. Given again after a kill, goes on."""
    if not 0 < share <= 1:
        raise ValueError(f"--share {share:g}: the share of the training lengths, above 0 and at most 1")
    chosen = variants(name, params)
    print(use_threads(params.threads))
    found: dict[str, Any] = {}
    for variant, (keys, stages) in chosen.items():
        changed = shortened(change(params, keys), share)
        folder = work / "ablate" / sha256_json([changed.model_dump(), stages])[:16]
        print(f"{name}: {variant}")
        train_chain(changed, stages, data, models, folder)
        place = Place(changed, data, folder, stages[-1])
        drawn = evaluate(
            EVALUATE, place.samples, place.images, place.store.image, place.together(), changed.evaluate, seed=changed.seed,
            out=work / "evaluate", limits={"held_out": samples},
        )  # fmt: skip
        metrics = {k: v for k, v in drawn.result["held_out"].items() if k != "by_kind" and v}
        found[variant] = {"changed": keys, "stages": stages, **metrics}
    about = {"share": share, "samples": samples, "seed": params.seed, "paper_clip_i_clip_t_dino_i": PAPER.get(name)}
    result = {"variants": found, **about}
    write_json(out / "metrics" / "ablate" / f"{name}.json", result)
    write_bytes(out / "reports" / "ablate" / f"{name}.png", ablation_png(name, found))
    return result


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
    """All training lengths of the stages times `share`, in whole batches."""
    values = params.model_dump()
    for name in ("align", *CHAIN):
        if p := values[name]:
            p |= {key: max(p["batch"] if key in ("images", "save_images") else 0, round(p[key] * share)) for key in LENGTHS}
            p |= {key: -(-p[key] // p["batch"]) * p["batch"] for key in ("images", "save_images")}
    return parse_params(values, "ablate")


def table(result: dict[str, Any]) -> str:
    """The variants in Markdown: held-out fidelity, what the right references bring, and the paper's figures."""
    lines = ["| variant | fidelity | over shuffled | over none | paper: CLIP-I, CLIP-T, DINO-I |", "|---" * 5 + "|"]
    paper = result["paper_clip_i_clip_t_dino_i"] or {}
    for variant, entry in result["variants"].items():
        f = entry["fidelity"]
        gaps = [f"{g['mean']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]" for g in (f["right_minus_shuffled"], f["right_minus_none"])]
        lines.append(f"| {variant} | {f['right']:.3f} | {' | '.join(gaps)} | {', '.join(map(str, paper.get(variant, ())))} |")
    return "\n".join(lines)

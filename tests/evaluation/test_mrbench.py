"""MRBench with all its methods on real emoji, drawn by stand-ins whose answers are known; and the baselines themselves on real models:
the ways of reading references, and the LoRA of a group."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image, ImageChops

from easyref.config import Evaluate, GroupLora, MRBench, load_params
from easyref.data.shards import ImageStore
from easyref.evaluation import baselines
from easyref.evaluation.evaluate import Evaluated
from easyref.evaluation.generations import Painter
from easyref.evaluation.judges import Similarity
from easyref.evaluation.mrbench import COMPARISON, _large_cases, mrbench
from easyref.evaluation.probes import fit_dual
from easyref.evaluation.report import ROWS, chosen_rows, write_report
from easyref.evaluation.stage import Place
from easyref.evaluation.summary import table
from easyref.model import lora
from easyref.pipeline import EasyRef, Request
from easyref.training.group_lora import clip, group_lora, side_by_side, tuned

from .conftest import Emoji, groups_of
from .test_evaluate import Answers

torch.set_num_threads(1)
DRAWING = Evaluate(steps=2, guidance=2.0, scale=1.0, batch=5, held_out_samples=18, held_in_samples=6, grid_rows=2, bootstrap=500)
LORA = GroupLora(rank=4, steps=5, batch=4, learning_rate=0.01, together=2)
PARAMS = MRBench(lora=LORA, seeds=3, seed_samples=4, counts=[1, 2, 4], count_samples=6, clip=None, dino=None, face=None)


def mean_colour(items: Any) -> np.ndarray:
    """A model of images that is easy to check: [N, 3]."""
    return np.stack([np.asarray(i.convert("RGB"), np.float64).mean((0, 1)) for i in items])


def run(emoji: Emoji, out: Path, change: Any = None) -> tuple[Evaluated, dict[str, Answers]]:
    """Everything that reads the right references answers with the target, but average and lora: a reference."""
    answers = {
        reading: Answers(emoji, paste=reading in ("average", "lora")) for reading in ("together", "average", "concatenation", "lora")
    }
    painters = {reading: Painter(partial(answers.get, reading), reading) for reading in answers}  # type: ignore[arg-type]
    if change:
        painters["together"] = Painter(lambda: partial(change, answers["together"]), "together")
    painters["copy"] = Painter(lambda: baselines.copy, "copy")
    similarity = [Similarity("clip", mean_colour, lambda texts: np.ones((len(texts), 3)))]
    arguments: dict[str, Any] = {"load": emoji.load, "painters": painters, "p": PARAMS, "drawing": DRAWING, "seed": 0, "out": out}
    arguments["embedded"] = out / "no embeddings"
    return mrbench(emoji.samples, emoji.images, groups_of(emoji.images), **arguments, similarity=similarity), answers


@pytest.fixture(scope="module")
def found(emoji: Emoji, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easyref.evaluation.judges.fit_dual", partial(fit_dual, steps=40))
        return run(emoji, tmp_path_factory.mktemp("mrbench"))[0]


def test_every_method_is_on_the_same_samples_with_its_paired_difference(found: Evaluated) -> None:
    for split, count in (("held_out", 18), ("held_in", 6)):
        entry = found.result[split]["fidelity"]
        assert entry["samples"] == count and {*COMPARISON.names, "ceiling"} <= set(entry)
        for name in set(COMPARISON.names) - {"easyref"}:
            gap = entry[f"easyref_minus_{name}"]
            assert gap["low"] <= gap["mean"] <= gap["high"] and gap["mean"] == pytest.approx(entry["easyref"] - entry[name])
        # a pasted reference is what `copy` draws; the target itself is perfect
        assert entry["average"] == entry["lora"] == entry["copy"] < 0.9 and entry["easyref"] == pytest.approx(1, abs=1e-3)
        assert entry["concatenation"] == entry["easyref"] and entry["easyref_minus_copy"]["low"] > 0
    tables = found.result["held_out"]
    assert set(tables["by_kind"]) == {"subject", "person", "style"}
    numbers = {str(len(case.right)) for case in found.cases["held_out"]}
    assert set(tables["by_references"]) == numbers
    assert sum(entry["fidelity"]["samples"] for entry in tables["by_references"].values()) == 18


def test_a_configured_model_is_two_metrics_more(found: Evaluated, emoji: Emoji) -> None:
    case = found.cases["held_out"][0]
    target, drawn = mean_colour([emoji.load(case.target), Image.open(found.images[case, "shuffled"])])
    scores = found.scores["held_out"]
    assert scores["clip_i"]["shuffled"][0] == pytest.approx(target @ drawn / np.linalg.norm(target) / np.linalg.norm(drawn))
    assert scores["clip_t"]["shuffled"][0] == pytest.approx(drawn.sum() / np.linalg.norm(drawn) / 3**0.5)
    colours = mean_colour([emoji.load(sha) for sha in case.right])
    cosines = colours @ target / np.linalg.norm(colours, axis=1) / np.linalg.norm(target)
    assert scores["clip_i"]["ceiling"][0] == pytest.approx(cosines.mean())
    assert scores["clip_i"]["easyref"][0] == pytest.approx(1)


def test_a_configured_model_has_a_batch_of_images_in_memory(found: Evaluated, emoji: Emoji) -> None:
    """A thousand photographs at once are tens of GiB."""
    alive, most = 0, 0

    def load(sha: str) -> Image.Image:
        nonlocal alive, most
        image = emoji.load(sha).copy()
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(image, gone)
        return image

    def gone() -> None:
        nonlocal alive
        alive -= 1

    cases = found.cases["held_out"]
    model = Similarity("clip", mean_colour, None, batch=3)
    scores = model.scores([found.images[case, "copy"] for case in cases], cases, load)
    assert scores["clip_i"] == pytest.approx(found.scores["held_out"]["clip_i"]["copy"])
    assert most <= 6 < len(cases)


def test_real_images_are_nearer_to_the_data_than_others(found: Evaluated) -> None:
    distances = found.result["distribution"]["held_out"]
    assert distances["easyref"]["fid"] == pytest.approx(0, abs=1e-3), "it answers with the targets"
    assert distances["easyref"]["kid"] < distances["copy"]["kid"] < distances["text_only"]["kid"]


def test_more_references_are_the_same_samples_judged_beside_all(found: Evaluated) -> None:
    counts = found.result["counts"]
    assert list(counts) == ["1", "2", "4"]
    assert {entry["fidelity"]["samples"] for entry in counts.values()} == {6}
    assert len({entry["reference_fidelity"]["ceiling"] for entry in counts.values()}) == 1, "the same references judge"
    assert found.result["counts"]["1"]["fidelity"]["ceiling"] < 0.9


@pytest.mark.parametrize("broken", ["some", "all"])
def test_a_number_of_references_that_cannot_be_drawn_leaves_its_samples_out_everywhere(
    found: Evaluated, emoji: Emoji, tmp_path: Path, broken: str
) -> None:
    """As where four references are too many for a GPU: the same samples stand in every row, or the report does without."""
    out = shutil.copytree(next(iter(found.images.values())).parents[1], tmp_path / "out")
    large = sorted((out / "together").iterdir())
    cases = _large_cases(emoji.images, groups_of(emoji.images), PARAMS, 0)
    lost = {case.seed for case in cases[: 2 if broken == "some" else None]}
    for path in large:
        if int(path.name.split("-")[0]) in lost:
            path.unlink()

    def too_many(answers: Answers, requests: list[dict[str, Any]]) -> list[Image.Image]:
        if any(r["seed"] in lost and len(r["references"]) == 4 for r in requests):
            raise RuntimeError("out of memory")
        return answers(requests)

    again = run(emoji, out, too_many)[0]
    counts = again.result["counts"]
    assert {e["fidelity"]["samples"] for e in counts.values()} == {4} if broken == "some" else counts is None
    assert again.result["samples"]["failed"] == len(lost) and "out of memory" in again.result["samples"]["failures"][0]
    html = write_report(again, emoji.load, tmp_path / "evaluation.html", {}, False).read_text()
    assert ("How many references?" in html) == (broken == "some")


def test_diversity_compares_seeds(found: Evaluated) -> None:
    values = found.result["diversity"]
    assert values["easyref"]["mean"] == pytest.approx(0, abs=1e-6), "its answer is the target under every seed"
    assert values["text_only"]["mean"] > 0.5 and values["real"]["mean"] > 0.2
    assert values["seeds"] == 3 and values["samples"] == 4


def test_a_run_that_was_cut_off_draws_only_what_is_missing_and_says_the_same(found: Evaluated, emoji: Emoji) -> None:
    out = next(iter(found.images.values())).parents[1]
    lost = [path for (case, method), path in found.images.items() if method == "lora"][:3]
    for path in lost:
        path.unlink()
    again, answers = run(emoji, out)
    assert {reading: len(answer.asked) for reading, answer in answers.items()} == {
        "together": 0,
        "average": 0,
        "concatenation": 0,
        "lora": 3,
    }
    assert json.dumps(again.result, sort_keys=True) == json.dumps(found.result, sort_keys=True)


def test_the_report_is_one_file_that_says_the_numbers(found: Evaluated, emoji: Emoji, tmp_path: Path) -> None:
    about = {"command": "dvc repro <mrbench>"}
    html = write_report(found, emoji.load, tmp_path / "evaluation.html", about, emoji=True).read_text()
    assert not re.search(r"<script|https?://|<link|@import|url\(", html)
    assert len(re.findall(r'src="data:image/png;base64,', html)) == html.count("<img") == 4  # the grid, two splits, counts
    assert "repro &lt;mrbench&gt;" in html and "<mrbench>" not in html
    text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)))
    entry = found.result["held_out"]["fidelity"]
    gap = entry["easyref_minus_shuffled"]
    assert f"Fidelity to the target with EasyRef {entry['easyref']:.3f}, Shuffled {entry['shuffled']:.3f}" in text
    assert f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" in text
    own = write_report(found, emoji.load, tmp_path / "own.html", about, emoji=False).read_text()
    assert "Noto Emoji" in html and "Noto Emoji" not in own and "are emoji" not in own, "whoever has other images has other licences"
    assert "KID" in text and "CLIP-T" in text and "Nothing here is a claim about photographs" in text
    rows = chosen_rows(found, emoji.load)
    fidelity = dict(zip(found.cases["held_out"], found.scores["held_out"]["fidelity"]["easyref"], strict=True))
    order = found.cases["held_out"]
    assert [r.target.tobytes() for r in rows[:ROWS]] == [emoji.load(c.target).tobytes() for c in order[:ROWS]]
    best, worst = (sorted(order[ROWS:], key=lambda c: -fidelity[c])[i] for i in (0, -1))
    assert rows[ROWS].target.tobytes() == emoji.load(best.target).tobytes()
    assert rows[-1].target.tobytes() == emoji.load(worst.target).tobytes()


def test_the_table_for_people_has_every_method(found: Evaluated) -> None:
    head, _, *rows = table("held out", found.result["held_out"])
    assert [row.split("|")[1].strip().replace(" ", "_") for row in rows] == [
        *("easyref", "average", "concatenation", "lora", "text_only", "shuffled", "copy", "ceiling"),
    ]
    assert f"{found.result['held_out']['fidelity']['lora']:.3f}" in rows[3] and "clip i" in head


@pytest.fixture(scope="module")
def easyref() -> EasyRef:
    return EasyRef.from_pretrained("models/pretrain")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    store = ImageStore(Path("data/images"))
    return [store.image(sha) for sha in sorted(store.rows)[:5]]


def asked(pictures: list[Image.Image], *counts: int) -> list[dict[str, Any]]:
    return [{"prompt": f"cat {i}", "references": pictures[:n], "captions": ["cat"] * n, "seed": i} for i, n in enumerate(counts)]


def test_readings_join_the_tokens_of_single_references(easyref: EasyRef, pictures: list[Image.Image]) -> None:
    """K and V are made of the joined tokens, in the encoder's own code."""
    with torch.no_grad():
        inputs = easyref.processor([[image] for image in pictures[:3]], ["cat"] * 3)
        tokens_RTX = easyref.encoder(inputs)
        single = easyref.encode([[image] for image in pictures[:3]], ["cat"] * 3)
        mean, side = baselines.JOIN["average"](single), baselines.JOIN["concatenation"](single)
        assert torch.allclose(mean, easyref.adapter.payload(tokens_RTX.mean(0, keepdim=True)), atol=1e-5)
        assert torch.allclose(side, easyref.adapter.payload(tokens_RTX.flatten(0, 1)[None]), atol=1e-5)
        assert side.shape[2] == 3 * easyref.encoder.config.num_tokens


def test_one_reference_reads_the_same_in_every_way(easyref: EasyRef, pictures: list[Image.Image]) -> None:
    request = asked(pictures, 1)
    together = baselines.together(easyref, DRAWING)(request)[0]
    for reading in baselines.JOIN:
        other = baselines.joined(easyref, DRAWING, reading)(request)[0]
        assert max(high for _, high in ImageChops.difference(together, other).getextrema()) <= 1, reading


def test_a_batch_of_several_numbers_of_references_is_its_samples_one_by_one(easyref: EasyRef, pictures: list[Image.Image]) -> None:
    requests = asked(pictures, 3, 1, 2, 3)
    draw = baselines.joined(easyref, DRAWING, "concatenation")
    for whole, request in zip(draw(requests), requests, strict=True):
        alone = draw([request])[0]
        assert max(high for _, high in ImageChops.difference(whole, alone).getextrema()) <= 1


def test_repeated_null_tokens_are_the_null_reference(easyref: EasyRef, pictures: list[Image.Image]) -> None:
    """The same token twice is as the same token once: EasyRef's own tokens twice draw what they draw once."""
    request = [Request("cat", pictures[:2], 0)]
    payload = easyref.encode([pictures[:2]], ["cat"])
    once, twice = (easyref.draw(request, payload.repeat(1, 1, n, 1), 2, 3.0, 1.0)[0] for n in (1, 2))
    assert max(high for _, high in ImageChops.difference(once, twice).getextrema()) <= 1


def test_everything_is_drawn_and_tuned_under_ddim_whatever_the_base_comes_with(tmp_path: Path) -> None:
    """SDXL comes with Euler's scheduler."""
    diffusion = tmp_path / "base" / "diffusion"
    diffusion.mkdir(parents=True)
    (tmp_path / "pretrain").symlink_to(Path("models/pretrain").resolve())
    (tmp_path / "base" / "mllm").symlink_to(Path("models/base/mllm").resolve())
    for part in Path("models/base/diffusion").iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (diffusion / part.name).symlink_to(part.resolve())
    index = json.loads(Path("models/base/diffusion/model_index.json").read_text())
    (diffusion / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    euler: Any = EulerDiscreteScheduler
    euler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(diffusion / "scheduler")
    place = Place(load_params(Path("presets/nano.yaml")), Path("data"), tmp_path, "pretrain")
    for pipe in (place.easyref.pipe, place.base_pipe):
        assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.beta_end == 0.012


def test_a_group_lora_learns_its_references_and_leaves_the_base_as_it_was(pictures: list[Image.Image]) -> None:
    pipe = EasyRef.base_pipeline("models/pretrain")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    request = asked(pictures, 2)
    draw = group_lora(pipe, LORA, DRAWING, seed=0)
    first, again = draw(request)[0], draw(request)[0]
    assert first.tobytes() == again.tobytes(), "tuned anew from the same start"
    assert pipe.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    plain = pipe(prompt=["cat 0"], num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    assert first.tobytes() != plain.tobytes()
    with tuned(pipe, [pictures[:2]], [["cat"] * 2], LORA.model_copy(update={"steps": 25}), 0):
        after = reconstruction(pipe, pictures[:2])
    assert after < 0.97 * reconstruction(pipe, pictures[:2]), "the loss on the references falls"


def test_a_group_lora_is_tuned_in_half_precision(pictures: list[Image.Image]) -> None:
    pipe = EasyRef.base_pipeline("models/pretrain", dtype=torch.bfloat16)
    with tuned(pipe, [pictures[:2]], [["cat"] * 2], LORA.model_copy(update={"steps": 1}), 0):
        (image,) = pipe(prompt=["cat"], num_inference_steps=2, guidance_scale=2.0).images
    assert np.asarray(image).std() > 5


def test_loras_side_by_side_learn_what_peft_learns_for_each_alone(pictures: list[Image.Image]) -> None:
    """Loss and gradients of two samples in one call are those of peft's LoRA with the weights of either; clipped apart, too."""
    unet = EasyRef.base_pipeline("models/pretrain").unet.requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    x_KS, text, pooled = (torch.randn(6, *shape, generator=rng) for shape in ((8, 16, 16), (24, 256), (128,)))  # two samples in turn
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def loss(which: slice) -> torch.Tensor:
        n = len(x_KS[which])
        added = {"text_embeds": pooled[which], "time_ids": ids.expand(n, 6)}
        return unet(x_KS[which], torch.tensor([300.0]), text[which], added_cond_kwargs=added).sample.square().mean()

    with side_by_side(unet, 2, 4, torch.Generator().manual_seed(1)) as weights:
        for weight in weights:
            weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) / 10)
        whole = loss(slice(None))
        (whole * 2).backward()
        together = [weight.grad.clone() for weight in weights]  # type: ignore[union-attr]
        clip(weights, 0.01)
    lora.add(unet, 4, 4.0, torch.Generator().manual_seed(1))
    alone = []
    for sample in range(2):
        mine = [layer.weight.requires_grad_() for pair in lora.layers(unet).values() for layer in pair]
        for weight, given in zip(mine, weights, strict=True):
            weight.data.copy_(given[sample].T)
        alone.append(loss(slice(sample, None, 2)))
        gradients = torch.autograd.grad(alone[-1], mine)
        for ours, theirs in zip(together, gradients, strict=True):
            assert (ours[sample].T - theirs).norm() < 1e-2 * theirs.norm()
        for weight, gradient in zip(mine, gradients, strict=True):
            weight.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(mine, 0.01)
        for ours, theirs in zip(weights, mine, strict=True):
            assert (ours.grad[sample].T - theirs.grad).norm() < 1e-2 * theirs.grad.norm()  # type: ignore[index,operator,union-attr]
    assert whole.item() == pytest.approx(sum(x.item() for x in alone) / 2, rel=1e-5)


def test_the_gradients_of_a_sample_do_not_shrink_with_the_number_of_samples(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW would not show it, but clipping goes by their norm."""
    pipe, seen = EasyRef.base_pipeline("models/pretrain"), list[torch.Tensor]()
    pipe.unet.requires_grad_(False)
    monkeypatch.setattr("easyref.training.group_lora.clip", lambda weights, most: seen.append(weights[1].grad.clone()))
    for samples in (1, 3):
        with tuned(pipe, [pictures[:2]] * samples, [["cat"] * 2] * samples, LORA.model_copy(update={"steps": 1}), 0):
            pass
    alone, together = seen
    assert all((own - alone[0]).norm() < 1e-2 * alone.norm() for own in together)


def test_samples_tuned_side_by_side_do_not_see_each_other(pictures: list[Image.Image]) -> None:
    """Adam makes of rounding a step where a gradient is near zero, so pictures are alike, not equal."""
    pipe = EasyRef.base_pipeline("models/pretrain")
    requests = asked(pictures, 2, 3)
    draw = group_lora(pipe, LORA, DRAWING, seed=0)
    for whole, request in zip(draw(requests), requests, strict=True):
        alone, other = draw([request])[0], draw([request | {"references": pictures[-2:], "captions": ["cat"] * 2}])[0]
        assert distance(whole, alone) < 0.1 * distance(whole, other)
    last = requests[1] | {"references": [*pictures[:2], pictures[-1]]}
    assert draw([last])[0].tobytes() != alone.tobytes(), "every reference is trained on"


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@torch.no_grad()
def reconstruction(pipe: Any, references: list[Image.Image]) -> float:
    """Diffusion loss on the references at noise that no step of the tuning had."""
    from easyref.training.group_lora import _pixels
    from easyref.training.loss import diffusion_loss, encode_text

    pixels = torch.stack([_pixels(image, 64) for image in references])
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    text, pooled = encode_text([(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)], ["cat"] * 2)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    losses = [
        diffusion_loss(pipe.unet, pipe.scheduler, latents, text, added, 5, [f"{n}/{i}" for i in range(2)]).item() for n in range(8)
    ]
    return float(np.mean(losses))

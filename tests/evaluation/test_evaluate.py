"""A whole evaluation on real emoji. The generator is a stand-in that answers with real images: the real target for the
right references, some other real image otherwise. So every number has a known answer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from easyref.config import Evaluate
from easyref.evaluation.evaluate import EVALUATE, SPLITS, Evaluated, evaluate
from easyref.evaluation.generations import CONDITIONS, MUST_DIFFER, Case, Images, Painter, make_images, select_cases
from easyref.evaluation.judges import METRICS, Judge, RealImages
from easyref.evaluation.probes import fit_dual, load_evaluators

from .conftest import Emoji

PARAMS = Evaluate(steps=2, guidance=1.0, scale=1.0, batch=7, held_out_samples=30, held_in_samples=12, grid_rows=2, bootstrap=1000)
LIMITS = {"held_out": PARAMS.held_out_samples, "held_in": PARAMS.held_in_samples}


@dataclass
class Answers:
    """`generate` that knows the right answer; counts what it is asked for."""

    emoji: Emoji
    broken_prompt: str = ""
    paste: bool = False  # answer with the first reference instead of the target
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.right = {
            frozenset(references): target for target, references in self.emoji.samples.select("target", "references").iter_rows()
        }

    def __call__(self, requests: list[dict[str, Any]]) -> list[Image.Image]:
        if any(r["prompt"] == self.broken_prompt for r in requests):
            raise RuntimeError("no luck\nwith this one")
        self.asked += requests
        return [self.answer(r) for r in requests]

    def answer(self, request: dict[str, Any]) -> Image.Image:
        shas = [hashlib.sha256(image.tobytes()).hexdigest() for image in request["references"]]
        if self.paste and shas:
            return request["references"][0]
        others = random.Random(request["seed"]).choice(sorted(self.emoji.pixels))
        # A shuffled set may be the right set of another sample: the prompt tells the two apart.
        target = self.right.get(frozenset(shas), others)
        known = self.emoji.samples.filter((pl.col("target") == target) & (pl.col("prompt") == request["prompt"]))
        return self.emoji.pixels[target if len(known) else others]


def judged(emoji: Emoji, answers: Answers, out: Path, weights: str = "w", **change: Any) -> Evaluated:
    """`evaluate` of the stage, drawn by `answers`."""
    arguments: dict[str, Any] = {"samples": emoji.samples, "images": emoji.images, "params": PARAMS, "seed": 0, **change}
    arguments |= {"out": out, "embedded": out / "no embeddings"}
    return evaluate(EVALUATE, load=emoji.load, painters={"together": Painter(lambda: answers, weights)}, **arguments)


def made(
    cases: list[Case], emoji: Emoji, answers: Answers, out: Path, made_with: Any = "w", batch: int = 4
) -> tuple[Images, list[str]]:
    return make_images(cases, CONDITIONS, emoji.load, {"together": Painter(lambda: answers, made_with)}, out, batch)


@dataclass
class Run:
    result: dict[str, Any]
    table: pl.DataFrame
    answers: Answers
    out: Path


@pytest.fixture(scope="module")
def done(emoji: Emoji, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    out, answers = tmp_path_factory.mktemp("evaluate"), Answers(emoji)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easyref.evaluation.judges.fit_dual", partial(fit_dual, steps=40))
        found = judged(emoji, answers, out)
        yield Run(found.result, found.table(), answers, out)


def test_the_right_references_win_and_cover_the_whole_distance(done: Run) -> None:
    for split in ("held_out", "held_in"):
        for name in ("fidelity", "reference_fidelity", "concept"):  # 80 images teach no alignment of texts
            entry = done.result[split][name]
            assert entry["right_minus_shuffled"]["low"] > 0 and entry["right_minus_none"]["low"] > 0, (split, name)
        for name in ("reference_fidelity", "style", "tone", "concept", "text_alignment"):
            entry = done.result[split][name]
            if entry and entry["covered"] is not None:
                assert entry["covered"] == pytest.approx(1, abs=0.02), (split, name)
        fidelity = done.result[split]["fidelity"]
        assert fidelity["right"] == pytest.approx(1, abs=1e-3)
        assert fidelity["ceiling"] == done.result[split]["reference_fidelity"]["ceiling"] < 0.6, "not the target itself"


def test_numbers_agree_with_the_table_of_scores(done: Run) -> None:
    scores = done.table
    for kind in ("subject", "person", "style"):
        own = scores.filter((pl.col("split") == "held_out") & (pl.col("kind") == kind))
        for name in METRICS:
            entry = done.result["held_out"]["by_kind"][kind][name]
            for condition in (*(method.name for method in CONDITIONS), "ceiling"):
                mean = own.filter(pl.col("condition") == condition)[name].mean()
                assert (entry is None and mean is None) or entry[condition] == pytest.approx(mean)
    assert done.result["held_out"]["by_kind"]["person"]["tone"]["samples"] == 10
    assert done.result["held_out"]["by_kind"]["subject"]["tone"] is None  # things have no skin tone


def test_result_form(done: Run) -> None:
    entry = done.result["held_out"]["fidelity"]
    assert set(entry) == {
        *("right", "shuffled", "none", "ceiling", "covered", "samples", "groups"),
        *("right_minus_shuffled", "right_minus_none", "intervals"),
    }
    assert set(entry["right_minus_none"]) == {"mean", "low", "high"}
    assert entry["right_minus_none"]["mean"] == pytest.approx(entry["right"] - entry["none"])
    trust = done.result["extractor_trust"]
    assert trust["same_concept_auc"] > 0.9 and trust["concept"]["accuracy"] > 0.6
    assert trust["style"]["accuracy"] > trust["style"]["chance"]
    assert done.result["samples"]["held_out"]["samples"] == 30 and done.result["samples"]["failed"] == 0


def test_the_three_conditions_are_paired(done: Run) -> None:
    by_sample: dict[tuple[str, int], list[int]] = {}
    for request in done.answers.asked:
        by_sample.setdefault((request["prompt"], request["seed"]), []).append(len(request["references"]))
    assert len(by_sample) == 30 + 12
    for counts in by_sample.values():
        assert sorted(counts) == [0, max(counts), max(counts)]


def test_a_second_run_generates_nothing_and_says_the_same(done: Run, emoji: Emoji) -> None:
    answers = Answers(emoji)
    assert judged(emoji, answers, done.out).result == done.result
    assert answers.asked == []


def test_other_weights_or_settings_are_generated_again(done: Run, emoji: Emoji, tmp_path: Path) -> None:
    cases, _ = select_cases(emoji.samples, emoji.images, {"held_out": 3}, 0)
    for made_with, expected in ((["w", 2], 9), (["w", 2], 0), (["v", 2], 9), (["v", 3], 9), (["w", 2], 0)):
        answers = Answers(emoji)
        made(cases, emoji, answers, tmp_path, made_with)
        assert len(answers.asked) == expected, made_with


def test_an_image_cut_off_on_disk_is_made_again(emoji: Emoji, tmp_path: Path) -> None:
    cases, _ = select_cases(emoji.samples, emoji.images, {"held_out": 3}, 0)
    images, _ = made(cases, emoji, Answers(emoji), tmp_path)
    path, answers = images[cases[1], "shuffled"], Answers(emoji)
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    made(cases, emoji, answers, tmp_path)
    assert len(answers.asked) == 1 and path.read_bytes() == whole


def test_a_broken_sample_is_one_line_and_the_rest_is_kept(emoji: Emoji, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, _ = select_cases(emoji.samples, emoji.images, {"held_out": 8}, 0)
    bad = cases[3]
    prompts = [case.prompt for case in cases]
    images, problems = made(cases, emoji, Answers(emoji, bad.prompt), tmp_path, batch=5)
    lost = prompts.count(bad.prompt)
    assert len(images) == 3 * (8 - lost) and len(problems) == lost
    line = next(p for p in problems if bad.sample_id in p)
    assert line == f"sample {bad.sample_id} (right): RuntimeError: no luck with this one"
    assert line in capsys.readouterr().err
    assert set(tmp_path.rglob("*.png")) == set(images.values())


def test_a_reference_that_cannot_be_loaded_costs_only_its_sample(emoji: Emoji, tmp_path: Path) -> None:
    cases, _ = select_cases(emoji.samples, emoji.images, {"held_out": 6}, 0)
    bad = cases[2].right[0]

    def load(sha: str) -> Image.Image:
        if sha == bad:
            raise OSError("truncated")
        return emoji.load(sha)

    images, problems = make_images(cases, CONDITIONS, load, {"together": Painter(lambda: Answers(emoji), "w")}, tmp_path, batch=18)
    hit = [c for c in cases if bad in c.right or bad in c.shuffled]
    assert {case for case, _ in images} == {c for c in cases if c not in hit} and len(problems) == len(hit) >= 1


def test_a_model_that_cannot_be_loaded_ends_the_run_and_is_tried_once(emoji: Emoji, tmp_path: Path) -> None:
    cases, tries = select_cases(emoji.samples, emoji.images, {"held_out": 6}, 0)[0], []

    def load() -> Any:
        tries.append("once")
        raise FileNotFoundError("models/base/diffusion: base model missing")

    with pytest.raises(FileNotFoundError, match="base model missing"):
        make_images(cases, CONDITIONS, emoji.load, {"together": Painter(load, "w")}, tmp_path, batch=4)
    assert tries == ["once"]


def test_nothing_that_works_is_an_error_with_the_first_reason(emoji: Emoji, tmp_path: Path) -> None:
    def never(requests: list[dict[str, Any]]) -> list[Image.Image]:
        return []

    with pytest.raises(ValueError, match=r"first reason: sample .*generate returned 0 image"):
        judged(emoji, never, tmp_path)  # type: ignore[arg-type]


def test_many_that_fail_in_the_middle_are_no_figures_of_the_rest(emoji: Emoji, tmp_path: Path) -> None:
    """As where a GPU is lost; what was drawn is kept."""
    cases, _ = select_cases(emoji.samples, emoji.images, LIMITS, 0)
    answers = Answers(emoji)

    def lost(requests: list[dict[str, Any]]) -> list[Image.Image]:
        if len(answers.asked) > 2 * len(cases):
            raise RuntimeError("no GPU")
        return answers(requests)

    with pytest.raises(ValueError, match=r"of \d+ samples could not be drawn, too many .*first reason: sample .*no GPU"):
        judged(emoji, lost, tmp_path)  # type: ignore[arg-type]
    assert len(list(tmp_path.rglob("*.png"))) == len(answers.asked)


def test_a_split_without_samples_has_the_same_form(done: Run, emoji: Emoji) -> None:
    held_out = emoji.samples.filter(pl.col("split") == "held_out")
    result = judged(emoji, Answers(emoji), done.out, samples=held_out).result
    assert result["held_out"] == done.result["held_out"]
    assert result["held_in"] == {**dict.fromkeys(METRICS), "by_kind": {}}
    assert result["copying"]["held_in"] is None and result["samples"]["held_in"] == {"samples": 0, "groups": 0}


def test_missing_columns_and_unusable_samples_are_named(emoji: Emoji, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column.* split missing"):
        judged(emoji, Answers(emoji), tmp_path, images=emoji.images.drop("split"))
    for kept in (["train"], ["held_out", "held_in"]):
        images = emoji.images.filter(pl.col("split").is_in(kept))
        with pytest.raises(ValueError, match="run split again"):
            judged(emoji, Answers(emoji), tmp_path, images=images)
    for column, value, expected in (("prompt", " ", "no prompt"), ("references", [], "its group is empty")):
        broken = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(value)).otherwise(column).alias(column)
        cases, problems = select_cases(emoji.samples.with_columns(broken), emoji.images, LIMITS, 0)
        first = emoji.samples["sample_id"][0]
        assert problems == [f"sample {first}: {expected}{', no references' * (column == 'references')}; run split again"]
        assert cases and first not in [c.sample_id for c in cases]
    lost = emoji.samples["target"][0]
    cases, problems = select_cases(emoji.samples, emoji.images.filter(pl.col("sha256") != lost), LIMITS, 0)
    assert len(problems) >= 1 and "run split again" in problems[0]
    assert all(lost not in (c.target, *c.right, *c.shuffled) for c in cases)


def test_shuffled_references_are_as_many_and_show_something_else(emoji: Emoji) -> None:
    labels = {row["sha256"]: row for row in emoji.images.iter_rows(named=True)}
    cases, problems = select_cases(emoji.samples, emoji.images, {"held_out": 1000, "held_in": 1000}, 0)
    assert not problems and {c.kind for c in cases} == set(MUST_DIFFER)
    for case in cases:
        assert len(case.shuffled) == len(case.right) == len(set(case.shuffled))
        assert not {case.target, *case.right} & set(case.shuffled)
        for name in MUST_DIFFER[case.kind] if len(MUST_DIFFER[case.kind]) == 1 else ():
            assert labels[case.target][name] not in {labels[sha][name] for sha in case.shuffled}
        if case.kind == "person":
            own = (labels[case.target]["style"], labels[case.target]["tone"])
            assert own not in {(labels[sha]["style"], labels[sha]["tone"]) for sha in case.shuffled}
    assert cases == select_cases(emoji.samples.reverse(), emoji.images, {"held_out": 1000, "held_in": 1000}, 0)[0]
    other = select_cases(emoji.samples, emoji.images, {"held_out": 1000, "held_in": 1000}, 1)[0]
    assert {c.sample_id: c.shuffled for c in other} != {c.sample_id: c.shuffled for c in cases}


def test_shuffled_references_come_from_a_group_that_shares_something_else() -> None:
    """Two groups of style A and one of style B: a style-A sample takes from B only, and no more than it needs."""
    shas = ["a1", "a2", "a3", "a4", "a5", "a6", "b1", "b2", "b3", "b4", "c1", "c2", "c3"]
    labels = {name: "" for name in ("subject", "gender", "tone")}
    images = pl.DataFrame([{**labels, "sha256": sha, "style": sha[0]} for sha in shas])

    def sample(group: str, target: str, references: list[str]) -> dict[str, Any]:
        about = {"sample_id": group, "group_id": group, "kind": "style", "split": "held_out", "prompt": "x"}
        return {**about, "target": target, "references": references}

    two_of_a = [sample("A1", "a1", ["a2", "a3"]), sample("A2", "a4", ["a5", "a6"])]
    for seed in range(10):
        table = pl.DataFrame([*two_of_a, sample("B", "b1", ["b2", "b3", "b4"])])
        cases = {c.sample_id: c for c in select_cases(table, images, {"held_out": 9}, seed)[0]}
        assert cases["A1"].shuffled == cases["A2"].shuffled == ("b2", "b3")
        assert len(cases["B"].shuffled) == 3 and set(cases["B"].shuffled) < {"a2", "a3", "a5", "a6"}  # from both
        table = pl.DataFrame([*two_of_a, sample("B", "b1", ["b2"]), sample("C", "c1", ["c2", "c3"])])
        cases = {c.sample_id: c for c in select_cases(table, images, {"held_out": 9}, seed)[0]}
        assert cases["A1"].shuffled == ("c2", "c3"), "one group with enough comes before several"
    cases, problems = select_cases(pl.DataFrame(two_of_a), images, {"held_out": 9}, 0)
    assert not cases and "evaluate more groups" in problems[0]


def test_a_small_selection_takes_turns_between_kinds_and_groups(emoji: Emoji) -> None:
    cases, _ = select_cases(emoji.samples, emoji.images, {"held_out": 12}, 0)
    assert [sum(c.kind == kind for c in cases) for kind in MUST_DIFFER] == [4, 4, 4]
    assert len({c.group_id for c in cases}) == 12


def test_copying_separates_a_generator_that_pastes_from_one_that_does_not(done: Run, emoji: Emoji, tmp_path: Path) -> None:
    out = tmp_path / "paste"
    (out).mkdir()
    for name in ("features.safetensors", "evaluators.safetensors"):
        (out / name).symlink_to(done.out / name)
    result = judged(emoji, Answers(emoji, paste=True), out).result
    assert result["copying"]["held_out"]["right"]["copied_reference"] == 1.0
    assert result["copying"]["held_out"]["right"]["nearer_to_reference"] == 1.0
    honest = done.result["copying"]["held_out"]
    assert honest["right"]["nearer_to_reference"] == 0.0
    assert honest["right"]["copied_reference"] == honest["real"]["copied_reference"] < 0.2
    assert honest["none"]["copied_training"] > 0.3  # its random real images come from the training split, too


def test_evaluators_see_the_training_split_only(done: Run, emoji: Emoji, tmp_path: Path) -> None:
    """Scrambled labels of all images outside the training split leave every evaluator as it was."""
    train = pl.col("split") == "train"
    scrambled = emoji.images.with_columns(
        pl.when(train).then("style").otherwise(pl.lit("noto")).alias("style"),
        pl.when(train).then("tone").otherwise(pl.lit("dark")).alias("tone"),
        pl.when(train).then("caption").otherwise(pl.lit("nonsense")).alias("caption"),
    )
    real = RealImages(scrambled, emoji.load, done.out / "features.safetensors", tmp_path / "no embeddings")
    Judge(real, SPLITS, 0, tmp_path / "evaluators.safetensors")
    found, expected = (load_evaluators(folder / "evaluators.safetensors")[0] for folder in (tmp_path, done.out))
    for name, evaluator in expected.items():
        for key, value in evaluator.tensors().items():
            assert np.array_equal(found[name].tensors()[key], value), (name, key)

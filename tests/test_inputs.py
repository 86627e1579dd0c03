"""Samples of the stages and their views on real images: what is drawn, and that all images of a sample are seen alike."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from easyref.config import Params, parse_params
from easyref.data.captions import caption
from easyref.data.dataset import SWAPS, TrainingImages
from easyref.training.align import seen_labels
from easyref.training.inputs import NULL, Inputs, Sample, Sampler
from easyref.training.models import load_models
from tests.projects import small_data

torch.set_num_threads(1)
NUMBERS = range(2000)


@pytest.fixture(scope="module")
def params() -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["split"] |= {"held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    values["finetune_multi"] |= {
        "swap_colours": 0.5,
        "mirror": 0.25,
        "group_share": 0.7,
        "drop_image": 0.1,
        "drop_text": 0.2,
        "drop_both": 0.05,
    }
    return parse_params(values)


@pytest.fixture(scope="module")
def images(params: Params, tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    data = tmp_path_factory.mktemp("small")
    small_data(data / "data", params, every=20)
    return TrainingImages(data / "data")


def test_samples_have_the_shares_of_their_parameters(params: Params, images: TrainingImages) -> None:
    p = params.finetune_multi
    samples = [Sampler(images, p, 0, "test")(n) for n in NUMBERS]
    plain = [s for s in samples if not images.labels[s.target]["tone"]]

    def share(chosen: list[bool]) -> float:
        return sum(chosen) / len(chosen)

    assert share([s.references == (NULL,) for s in samples]) == pytest.approx(0.15, abs=0.03)
    assert share([not s.prompt for s in samples]) == pytest.approx(0.25, abs=0.03)
    assert share([s.view >= len(SWAPS) for s in samples]) == pytest.approx(0.25, abs=0.03)
    assert share([s.view % len(SWAPS) > 0 for s in plain]) == pytest.approx(0.5, abs=0.05)
    assert all(s.view % len(SWAPS) == 0 for s in samples if images.labels[s.target]["tone"])  # skin keeps its colour
    assert {s.view for s in plain} == set(range(2 * len(SWAPS)))
    assert share([s.references == (s.target,) for s in samples]) == pytest.approx(0.85 * 0.3, abs=0.03)
    for sample in samples:
        assert f"in {images.labels[sample.target]['colors']}" not in sample.prompt
        if sample.references not in ((NULL,), (sample.target,)):
            assert sample.target not in sample.references and len(sample.references) <= p.max_references
            assert any({sample.target, *sample.references} <= set(members) for _, members in images.groups)


def test_target_and_references_are_seen_in_the_same_view(params: Params, images: TrainingImages) -> None:
    """Against pixels permuted and turned by numpy, the VAE and the vision tower called by hand."""
    models = load_models(params, Path("models"), None, "fp32")
    inputs = Inputs(models, images, frozen_prefix=True)
    for view, swap, step in ((0, (0, 1, 2), 1), (4, list(permutations(range(3)))[4], 1), (9, list(permutations(range(3)))[3], -1)):
        pixels = np.asarray(images.store.image(images.sha256s[5]))[:, ::step][..., list(swap)]
        x_13HW = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            latents = models.vae.encode(x_13HW).latent_dist.mean * models.vae.config.scaling_factor
        sample = Sample(5, (5,), "", view)
        torch.testing.assert_close(inputs.latents([sample]), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs.latents([Sample(3, (5,), ""), sample])[1:], latents, rtol=1e-5, atol=1e-5)
        patches = models.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(inputs.image_patches(5, view).pixel_values, patches)
    tokens = [inputs.reference_tokens([Sample(5, (5,), "", view)]) for view in (0, 4)]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_colours_of_a_swapped_image_are_named_as_seen(params: Params, images: TrainingImages) -> None:
    """A heart that is red stays red with green and blue swapped, and is blue with red and blue swapped."""
    heart = next(i for i, label in enumerate(images.labels) if label["colors"] == "red")
    inputs = Inputs.__new__(Inputs)
    inputs.images = images
    seen = {swap: seen_labels(inputs, Sample(heart, (heart,), "", view)) for view, swap in enumerate(SWAPS)}
    assert "in red" in caption(seen[(0, 1, 2)], hide=()) and seen[(0, 1, 2)] is images.labels[heart]
    assert "in red" in caption(seen[(0, 2, 1)], hide=())
    assert "in blue" in caption(seen[(2, 1, 0)], hide=())
    assert {name: value for name, value in seen[(2, 1, 0)].items() if name != "colors"} == {
        name: value for name, value in images.labels[heart].items() if name != "colors"
    }

"""The warm start of the pretraining on the shipped base models and a few real images."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from easyref.config import ConfigError, Params, parse_params
from easyref.data.captions import caption
from easyref.data.dataset import TrainingImages
from easyref.training.align import PARTS, align, dealt
from easyref.training.inputs import NULL, Inputs, Sample
from easyref.training.models import Models, load_models
from tests.projects import small_data

torch.set_num_threads(1)
ALIGN = {
    "images": 560,
    "batch": 8,
    "microbatch": 8,
    "save_images": 280,
    "warmup_images": 0,
    "cooldown_images": 280,
    "ema_images": 0,
    "group_share": 0.0,
    "swap_colours": 0.0,
    "mirror": 0.0,
}


@pytest.fixture
def params() -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    values["split"] |= {"held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    values["align"] |= ALIGN
    return parse_params(values)


def errors(models: Models, inputs: Inputs, items: list[int]) -> torch.Tensor:
    """Mean squared distances [items, items] of the tokens of reference i, without a prompt, from the text of caption j: the first T
    states of both encoders."""
    captions = ["" if i == NULL else caption(inputs.images.labels[i], hide=()) for i in items]
    parts = []
    for tokenizer, encoder in models.text_encoders:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        parts.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
    with torch.no_grad():
        tokens_NTX = inputs.reference_tokens([Sample(i, (i,), "") for i in items])
    states_NTX = torch.cat(parts, dim=-1)[:, : tokens_NTX.shape[1]]
    return (tokens_NTX[:, None] - states_NTX[None]).square().mean((2, 3))


@torch.no_grad()
def explained(models: Models, images: TrainingImages, items: Sequence[int], state: Path) -> float:
    """Share of the variance of the images' latents that the map in the state makes of the tokens of each as its own reference."""
    pixels = [np.asarray(images.store.image(images.sha256s[i]), np.float32) / 127.5 - 1 for i in items]
    latents = models.vae.encode(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).latent_dist.mean
    patches = F.pixel_unshuffle(latents * models.vae.config.scaling_factor, 2)  # [N, C * 4, 4, 4]
    wanted = patches.unflatten(1, (-1, 4)).permute(0, 3, 4, 2, 1).reshape(len(items), 16, 32)
    kept = load_file(state)
    weight, mean = (next(t for name, t in kept.items() if name.endswith(f"readout.{part}")) for part in ("map.weight", "mean"))
    tokens = models.encoder(models.processor([[images.store.image(images.sha256s[i])] for i in items], [""] * len(items)))
    error = (tokens @ weight.T + mean - wanted).square().mean()
    return 1 - (error / (wanted - wanted.mean(0)).square().mean()).item()


@pytest.mark.long
def test_tokens_become_the_text_states_of_their_own_images_caption(params: Params, tmp_path: Path) -> None:
    """On a few images seen many times, whose latents they hold, too; the null reference becomes the empty caption. Nothing but PARTS
    changes."""
    small_data(tmp_path / "data", params, every=80)
    models = load_models(params, Path("models"), None, "fp32")
    images = TrainingImages(tmp_path / "data")
    images.weights[4:] = 0
    inputs, others_too = Inputs(models, images, True), Inputs(models, images, False)
    before = {name: tensor.detach().clone() for name, tensor in models.named_parameters().items()}
    align(params, inputs, others_too, tmp_path / "align.safetensors")
    changed = {name for name, tensor in models.named_parameters().items() if not torch.equal(tensor, before[name])}
    assert changed == set(models.trainable(PARTS)[0])

    apart_NN = errors(models, inputs, [*range(4), NULL])
    others = [apart_NN[i, [j for j in range(5) if j != i]].min() for i in range(5)]
    assert all(apart_NN[i, i] < others[i] for i in range(5)), apart_NN
    assert apart_NN.diagonal().mean() < 0.8 * sum(others) / 5, apart_NN
    assert explained(models, images, range(4), tmp_path / "align.safetensors") > 0.5
    rows = [json.loads(row) for row in (tmp_path / "align.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if "held_out_latents" in row]
    assert len(held_out) == 3 and held_out[0]["held_out_explained"] < held_out[-1]["held_out_explained"] < 1
    first = range(min(128, len(images.labels)))  # the logged share, of images that were not trained on
    assert held_out[-1]["held_out_latents"] == pytest.approx(explained(models, images, first, tmp_path / "align.safetensors"), abs=1e-3)

    again = load_models(params, Path("models"), None, "fp32")
    align(params, Inputs(again, images, True), others_too, tmp_path / "align.safetensors")  # its state is read
    aligned = models.named_parameters()
    assert all(torch.equal(tensor, aligned[name]) for name, tensor in again.named_parameters().items())


def test_the_null_reference_holds_no_latents(params: Params, tmp_path: Path) -> None:
    """Trained on nothing else, it moves towards the empty caption, and the map to latents stays as it starts: their mean."""
    small_data(tmp_path / "data", params, every=160)
    values = params.model_dump() | {"align": {**params.align.model_dump(), "images": 16, "save_images": 16, "cooldown_images": 0}}  # type: ignore[union-attr]
    values["align"] |= {"drop_image": 1.0, "drop_text": 0.0, "drop_both": 0.0}
    models = load_models(params, Path("models"), None, "fp32")
    images = TrainingImages(tmp_path / "data")
    inputs = Inputs(models, images, False)
    before = models.encoder.reference_tokens.detach().clone()
    align(parse_params(values), inputs, inputs, tmp_path / "align.safetensors")
    assert not torch.equal(models.encoder.reference_tokens, before)
    kept = load_file(tmp_path / "align.safetensors")
    assert not kept["weights/readout.map.weight"].any()
    latents = inputs.latents([Sample(i, (i,), "") for i in range(len(images.labels))])
    torch.testing.assert_close(kept["weights/readout.mean"], dealt(latents.mean(0, keepdim=True), 16)[0], rtol=0, atol=1e-5)


def test_latents_are_dealt_out_patch_by_patch() -> None:
    latents_BChw = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    parts_BTE = dealt(latents_BChw, 8)
    assert parts_BTE.shape == (2, 8, 12)
    patch = [latents_BChw[1, :, y, x] for y in (2, 3) for x in (4, 5)]
    assert parts_BTE[1, 6].tolist() == torch.cat(patch).tolist(), "second row, third column, all channels"
    filled_BTE = dealt(latents_BChw, 3)  # in one row
    assert filled_BTE.shape == (2, 3, 36) and filled_BTE[:, 2].view(2, 4, 3, 3)[:, :, 2].count_nonzero() == 0
    assert filled_BTE[0, 1].view(4, 3, 3)[1, 2].tolist() == latents_BChw[0, :, 1, 5].tolist()


def test_more_reference_tokens_than_text_tokens_is_one_line() -> None:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["reference"]["num_tokens"] = 25
    with pytest.raises(ConfigError, match=r"align needs a text token for each of reference\.num_tokens 25, .* is 24; raise it"):
        parse_params(values)

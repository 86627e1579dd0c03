"""The warm start of the pretraining on the shipped base models and a few real images."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from easyref.config import ConfigError, Params, parse_params
from easyref.data.captions import caption
from easyref.data.dataset import TrainingImages
from easyref.training.align import PARTS, align, shares
from easyref.training.inputs import NULL, Inputs, Sample
from easyref.training.models import Models, load_models
from tests.projects import small_data

torch.set_num_threads(1)
ALIGN = {
    "images": 960,
    "batch": 16,
    "microbatch": 16,
    "save_images": 480,
    "warmup_images": 0,
    "cooldown_images": 480,
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


def test_tokens_become_the_text_states_of_their_own_images_caption(params: Params, tmp_path: Path) -> None:
    """On a few images seen many times; the null reference becomes the empty caption. Nothing but PARTS changes."""
    small_data(tmp_path / "data", params, every=80)
    models = load_models(params, Path("models"), None, "fp32")
    images = TrainingImages(tmp_path / "data")
    images.weights[8:] = 0
    inputs, held_out = Inputs(models, images, True), Inputs(models, images, False)
    before = {name: tensor.detach().clone() for name, tensor in models.named_parameters().items()}
    align(params, inputs, held_out, tmp_path / "align.safetensors")
    changed = {name for name, tensor in models.named_parameters().items() if not torch.equal(tensor, before[name])}
    assert changed == set(models.trainable(PARTS)[0])

    apart_NN = errors(models, inputs, [*range(8), NULL])
    others = [apart_NN[i, [j for j in range(9) if j != i]].min() for i in range(9)]
    assert all(apart_NN[i, i] < others[i] for i in range(9)), apart_NN
    assert apart_NN.diagonal().mean() < 0.5 * sum(others) / 9, apart_NN
    rows = [json.loads(row) for row in (tmp_path / "align.jsonl").read_text().splitlines()]
    for name in ("held_out_explained", "held_out_latents"):
        shares = [row[name] for row in rows if name in row]
        assert len(shares) == 3 and shares[0] < shares[-1] < 1, name
    assert shares[-1] > 0.1, "the latents of images that no training saw"

    again = load_models(params, Path("models"), None, "fp32")
    align(params, Inputs(again, images, True), held_out, tmp_path / "align.safetensors")  # done: its state is read, nothing is trained
    aligned = models.named_parameters()
    assert all(torch.equal(tensor, aligned[name]) for name, tensor in again.named_parameters().items())


def test_shares_of_the_latents_are_rows_of_the_image() -> None:
    latents_BChw = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    parts_BTE = shares(latents_BChw, 8)
    assert parts_BTE.shape == (2, 8, 6)
    assert parts_BTE[1, 5].tolist() == [*latents_BChw[1, :, 2, 2], *latents_BChw[1, :, 2, 3]], "half of row 2, all channels"
    with pytest.raises(ValueError, match=r"48 latent values, no multiple of reference\.num_tokens 5; change that"):
        shares(latents_BChw, 5)


def test_more_reference_tokens_than_text_tokens_is_one_line() -> None:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["reference"]["num_tokens"] = 25
    with pytest.raises(ConfigError, match=r"align needs a text token for each of reference\.num_tokens 25, .* is 24; raise it"):
        parse_params(values)

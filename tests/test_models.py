"""The models of a stage as it starts, on the shipped base: dtypes, initial values, and cached vision tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from easyref.config import Params, parse_params
from easyref.data.dataset import TrainingImages
from easyref.data.shards import ImageStore
from easyref.meter import Meter
from easyref.training import stages
from easyref.training.loss import noised
from easyref.training.models import Models, load_models

DATA, MODELS = Path("data"), Path("models")


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return TrainingImages(DATA, list(ImageStore(DATA / "images").rows)[:4])


def nano(section: str, **changes: Any) -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values[section] |= changes
    return parse_params(values)


@pytest.mark.parametrize("stage", ["pretrain", "finetune_multi"])
def test_bf16_rounds_the_frozen_base_and_nothing_that_is_trained(stage: str, images: TrainingImages) -> None:
    params = nano(stage, precision="bf16")
    p = getattr(params, stage)
    models = load_models(params, MODELS, p.lora_rank or None, p.precision)
    trained, _ = models.trainable(stages.parts(stage, p), p.new_part_rate)
    assert models.unet.conv_in.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    inputs = stages.Inputs(models, images, frozen_prefix="mllm" not in stages.STAGES[stage].trains)
    samples = [stages.Sample(0, (1, 2), "farmer"), stages.Sample(3, (stages.NULL,), "")]
    seen = []
    models.unet.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    stages.sample_loss(models, inputs, samples, 0, ["a", "b"], None).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in trained.values())
    exact = stages.Inputs(models, images, frozen_prefix=False).latents(samples)  # where nothing casts
    assert exact.dtype == torch.float32 and torch.equal(inputs.latents(samples), exact)
    assert torch.equal(seen[0], noised(models.scheduler, exact, 0, ["a", "b"])[0])


def test_rates_are_by_part_and_come_before_that_of_new_parts() -> None:
    p = nano("finetune_multi", new_part_rate=3.0, rates={"vision": 0.1, "lora": 2.0, "projector": 5.0}).finetune_multi
    models = load_models(nano("reference"), MODELS, p.lora_rank, "fp32")
    trained, factors = models.trainable(stages.parts("finetune_multi", p), p.new_part_rate, p.rates)
    assert factors.keys() == trained.keys() == models.named_parameters().keys()
    expected = {
        "encoder.reference_tokens": 3.0, "encoder.projector.": 5.0, "adapter.reference_kv.": 3.0, "adapter.lora.": 2.0,
        "encoder.mllm.visual.": 0.1, "encoder.mllm.language_model.": 1.0, "encoder.final_layer.": 1.0, "encoder.norm.": 1.0,
    }  # fmt: skip
    for prefix, factor in expected.items():
        assert {factors.pop(name) for name in trained if name.startswith(prefix)} == {factor}, prefix
    assert not factors
    with pytest.raises(ValueError, match="rates: vision is not trained in this stage, which trains final_layer, .* leave it out"):
        models.trainable(stages.ALIGNMENT, rates={"vision": 0.1})


@pytest.mark.parametrize("init", ["text", "zero"])
def test_reference_values_start_as_the_text_ones_or_at_zero(init: str) -> None:
    models = load_models(nano("reference", value_init=init), MODELS, None, "fp32")
    named, weights = models.adapter.named_parameters(), models.unet.state_dict()
    for name, tensor in named.items():
        _, *path, kind, _ = name.split(".")
        text = weights[f"{'.'.join(path)}.to_{kind}.weight"]
        assert torch.equal(tensor, torch.zeros_like(text) if kind == "v" and init == "zero" else text), name
    assert {name.split(".")[-2] for name in named} == {"k", "v"}


def test_a_frozen_prefix_with_cached_vision_gives_the_tokens_of_the_whole_encoder(images: TrainingImages) -> None:
    models = load_models(nano("reference"), MODELS, None, "fp32")
    frozen, whole = (stages.Inputs(models, images, frozen_prefix=frozen) for frozen in (True, False))
    first, second, null = (
        stages.Sample(0, (1, 2, 3), "farmer"),
        stages.Sample(3, (2, 0), "red apple"),
        stages.Sample(0, (stages.NULL,), ""),
    )
    for samples in ([first, null], [second, first]):  # the second batch finds vision tokens in the cache, in another order
        torch.testing.assert_close(frozen.reference_tokens(samples), whole.reference_tokens(samples), atol=1e-4, rtol=1e-4)
    assert frozen.reference_tokens([first]).requires_grad and len(frozen.store.kept) == 5  # of four images and the null one


def gradients(models: Models, images: TrainingImages) -> dict[str, torch.Tensor]:
    trained, _ = models.trainable((*stages.STAGES["finetune_multi"].trains, "lora"), 1.0)
    samples = [stages.Sample(0, (1, 2), "farmer"), stages.Sample(3, (1,), "")]
    stages.sample_loss(models, stages.Inputs(models, images, frozen_prefix=False), samples, 0, ["a", "b"], None).backward()
    found = {name: tensor.grad for name, tensor in trained.items()}
    assert all(tensor is not None for tensor in found.values())
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class Saved:
    """Bytes that the forward passes inside keep for the backward pass, each tensor once."""

    def __enter__(self) -> Saved:
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self.hooks.__exit__()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def test_recomputing_gives_the_same_gradients_and_keeps_less(images: TrainingImages) -> None:
    found, kept = [], []
    for parts in ([], ["vision"], ["unet", "mllm", "vision"]):
        models = load_models(nano("finetune_multi"), MODELS, 2, "fp32")
        models.recompute(parts)
        with Saved() as saved:
            found.append(gradients(models, images))
        kept.append(sum(saved.storages.values()))
    assert kept[0] > kept[1] > 2 * kept[2]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_half_precision_copies_of_trained_weights_are_held_no_longer_than_they_are_used(images: TrainingImages) -> None:
    models = load_models(nano("finetune_multi"), MODELS, 2, "bf16")
    models.recompute(["unet", "mllm", "vision"])
    gradients(models, images)
    with Meter() as meter:
        gradients(models, images)
    assert meter.peak < sum(2 * tensor.numel() for tensor in models.named_parameters().values())  # which their copies would take


@pytest.mark.long
def test_compiled_blocks_give_the_same_gradients(images: TrainingImages) -> None:
    plain = gradients(load_models(nano("finetune_multi"), MODELS, 2, "fp32"), images)
    models = load_models(nano("finetune_multi"), MODELS, 2, "fp32")
    models.compile()
    torch._dynamo.utils.counters.clear()
    compiled = gradients(models, images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4  # of every kind of block
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)

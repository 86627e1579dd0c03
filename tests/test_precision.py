"""Training in bf16: the frozen base models are rounded, what is trained is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from easyref.config import parse_params
from easyref.data.shards import ImageStore
from easyref.training import stages
from easyref.training.models import load_models


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps one precision for the whole process; a run has one process a stage."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stage", ["pretrain", "finetune_multi"])
def test_trained_tensors_and_their_gradients_are_fp32(stage: str) -> None:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values[stage] |= {"precision": "bf16"}
    params = parse_params(values)
    p = getattr(params, stage)
    models = load_models(params, Path("models"), p.lora_rank or None, p.precision)
    trained, _ = stages._trainable(models, stages.STAGES[stage], p)
    assert models.unet.conv_in.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    images = stages.TrainingImages(Path("data"), list(ImageStore(Path("data/images")).rows)[:4])
    inputs = stages.Inputs(models, images, frozen_prefix="mllm" not in stages.STAGES[stage].trains)
    samples = [stages.Sample(0, (1, 2), "farmer"), stages.Sample(3, (stages.NULL,), "")]
    stages._loss(models, inputs, samples, 0, ["a", "b"], None).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in trained.values())

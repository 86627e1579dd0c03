"""`easyref plan` against real models: the same trained tensors, bytes and FLOP as a real microbatch; the meter against arithmetic."""

import json
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from torch import nn

from easyref import plan
from easyref.config import Params, load_params, parse_params
from easyref.data.dataset import TrainingImages
from easyref.data.shards import ImageStore
from easyref.meter import DeviceKernels, Meter, measure
from easyref.model import shapes
from easyref.training import stages
from easyref.training.inputs import Seen
from easyref.training.models import load_models
from easyref.training.trainer import share

torch.set_num_threads(1)

DATA, MODELS = Path("data"), Path("models")
BASE = MODELS / "base"
#: As published: stable-diffusion-xl-base-1.0 and Qwen2-VL-2B-Instruct.
PUBLISHED = {
    "vae": 83_653_863,
    "unet": 2_567_463_684,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
    "mllm": 2_208_985_600,
}
META = torch.device("meta")


@pytest.fixture(scope="module")
def nano() -> Params:
    """The nano preset with small batches."""
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    for name in stages.STAGES:
        values[name] |= {"batch": 8, "microbatch": 4, "max_references": min(values[name]["max_references"], 3)}
    return parse_params(values)


@pytest.fixture(scope="module")
def planned(nano: Params) -> tuple[dict[str, int], dict[str, list[plan.Row]]]:
    return plan.plan(nano, BASE)


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return TrainingImages(DATA, sorted(ImageStore(DATA / "images").rows)[:12])


SAVING = [{"recompute": ["unet", "mllm", "vision"], "optimizer": "adamw8bit"}, {"recompute": ["unet"], "freeze": ["vision", "mllm"]}]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in stages.STAGES), *(("finetune_multi", o) for o in SAVING)])
def test_a_real_microbatch_costs_what_is_planned(name: str, options: dict, nano: Params, images: TrainingImages, monkeypatch) -> None:
    nano = parse_params(nano.model_dump() | {name: getattr(nano, name).model_dump() | options})
    p = getattr(nano, name)
    trains = stages.parts(name, p)
    frozen = stages.frozen_prefix(trains)
    models = load_models(nano, MODELS, p.lora_rank or None, p.precision, frozen)
    models.recompute(p.recompute)
    trained, _ = models.trainable(trains, p.new_part_rate)
    inputs = stages.Inputs(models, images, frozen)
    prompts = ["a", "b", "c", "d"]  # all different, so that no cache spares work; as long as planned, as what is shorter costs less
    samples = [
        stages.Sample(i, tuple(p.max_references * i + k for k in range(p.max_references)), prompt) for i, prompt in enumerate(prompts)
    ]
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    inputs.latents(samples)  # once an image: planned apart
    with Meter() as real:
        stages.sample_loss(models, inputs, samples, 0, [f"{name}/{i}" for i in range(4)], p.min_snr).backward()

    tokens = [models.processor.num_merged_tokens(inputs.image_patches(Seen(i))) for i in samples[0].references]
    monkeypatch.setattr(plan, "_text_tokens", lambda *_: len(models.processor.text(tokens, prompts[-1])) - sum(tokens))
    row = plan.stage_row(nano, name, partial(plan.easyref_models, nano, BASE))
    everything = [t for module in plan._modules(models) for t in (*module.parameters(), *module.buffers())]
    assert row.trained == sum(t.numel() for t in trained.values())
    assert row.frozen == sum(t.numel() for t in everything if isinstance(t, nn.Parameter) and not t.requires_grad)
    assert row.weights == sum(t.nbytes for t in everything)
    assert row.optimizer == (4 + 4 + (2 if p.optimizer == "adamw8bit" else 8)) * row.trained  # gradient, average, two moments
    assert row.flop * p.microbatch == real.flop
    assert row.activations == pytest.approx(real.peak, rel=0.04 if options else 0.02)  # with little kept, small things count


def test_the_warm_start_trains_the_encoder_and_the_map_to_latents(nano: Params, planned) -> None:
    encoder = load_models(nano, MODELS, None, "fp32").encoder
    warm, _ = planned[1]["pretrain"]
    assert warm.trained == sum(t.numel() for t in encoder.parameters()) + 256 * 32 + 16 * 32  # 8 × 8 × 8 latents in 16 shares of 32


def test_base_models_have_the_sizes_of_the_shipped_ones(nano: Params, planned) -> None:
    """Counted in the files; built from the parameters, and from the folder's configs for a hub id that is not known."""
    files = {f: BASE / "diffusion" / f for f in ("vae", "unet", "text_encoder", "text_encoder_2")} | {"mllm": BASE / "mllm"}
    shipped = {}
    for name, folder in files.items():
        with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
            shipped[name] = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert planned[0] == shipped
    with META:
        local = shapes.build(shapes.configs("someone/sdxl", "someone/qwen", BASE))
    assert {name: plan._count([model]) for name, model in local.items()} == shipped


def test_sdxl_is_planned_without_weights_and_network(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "socket", None)
    params = load_params("presets/sdxl.yaml")
    assert {name: plan._count([model]) for name, model in plan.base_models(params, tmp_path).items()} == PUBLISHED
    models = plan.easyref_models(params, tmp_path, None, "bf16")
    trained, _ = models.trainable(stages.parts("pretrain", params.pretrain))
    d, kv, x = 1536, 2 * 128, 2048
    layer = 2 * d * d + d + 2 * (d * kv + kv) + 3 * d * 8960 + 2 * d + d  # with the final norm
    projector = d * d + d + d * x + x + 2 * x
    reference_kv = (10 * 640 + 60 * 1280) * 2 * x
    assert sum(t.numel() for t in trained.values()) == 64 * d + layer + projector + reference_kv


@pytest.mark.long
def test_the_preset_for_24_gb_fits() -> None:
    _, rows = plan.plan(load_params("presets/sdxl-24gb.yaml"), Path("nowhere"))
    assert all(row.memory < 0.8 * 24e9 for stage in rows.values() for row in stage)


def test_an_unknown_hub_id_names_the_config_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"someone/sdxl: .*diffusion/unet/config\.json"):
        shapes.configs("someone/sdxl", "Qwen/Qwen2-VL-2B-Instruct", tmp_path)


def test_report_has_every_stage_and_fits_the_screen(nano: Params, planned, monkeypatch) -> None:
    monkeypatch.setattr(plan, "plan", lambda *_: planned)
    text, values = plan.report(nano, BASE, 0.1, False), json.loads(plan.report(nano, BASE, 0.1, True))
    assert max(map(len, text.splitlines())) <= 120
    assert list(values["stages"]) == list(yaml.safe_load(Path("dvc.yaml").read_text())["stages"])
    (_, first), (last,) = values["stages"]["pretrain"], values["stages"]["finetune_multi"]
    assert first["seconds"] == pytest.approx(nano.pretrain.images * first["flop"] / (0.1e12 * plan.EFFICIENCY))
    assert last["memory"] == last["weights"] + last["optimizer"] + last["activations"]
    drawing = planned[1]["base"][-1]
    assert replace(drawing, encode=10**12).memory == drawing.weights + drawing.optimizer + 10**12
    text = plan.report(nano, BASE, 0.1, False, 4)
    assert max(map(len, text.splitlines())) <= 140 and "each of 4 devices" in text and "FSDP2" in text
    with pytest.raises(ValueError, match="--tflops 0"):
        plan.report(nano, BASE, 0.0, False)


@pytest.mark.parametrize("processes", [3, 4])
def test_processes_share_the_images_and_what_trains(processes: int, nano: Params, planned) -> None:
    """Batch 8 in microbatches of 4: by the trainer's own shares; under FSDP2 by the bytes of a parameter."""
    alone = planned[1]["finetune_single"][0]
    row = plan.stage_row(nano, "finetune_single", partial(plan.easyref_models, nano, BASE), processes)
    ranks = [share(range(8), 4, SimpleNamespace(world=processes, rank=rank)) for rank in range(processes)]  # type: ignore[arg-type]
    most = max(sum(len(numbers) for numbers, _ in parts) for parts in ranks)
    assert row.microbatch == most and row.seconds(1e9) == pytest.approx(alone.seconds(1e9) * most / 8)
    assert row.weights + row.optimizer == alone.weights + alone.optimizer and row.activations < alone.activations
    each = 4 + 4 + 4 + 8  # bytes: weight, gradient, average, two moments
    expected = row.weights - 4 * row.trained + each * row.trained // processes + 4 * row.trained
    assert row.memory_sharded == expected + max(row.activations, row.encode)

    nano = parse_params(nano.model_dump() | {"finetune_single": nano.finetune_single.model_dump() | {"microbatch": 1}})
    several = plan.stage_row(nano, "finetune_single", partial(plan.easyref_models, nano, BASE), processes)
    assert several.sharded == expected + 4 * row.trained, "gradients add up over microbatches"

    nano = parse_params(nano.model_dump() | {"finetune_single": nano.finetune_single.model_dump() | {"optimizer": "adamw8bit"}})
    eighth = plan.stage_row(nano, "finetune_single", partial(plan.easyref_models, nano, BASE), processes)
    assert "memory_sharded" not in plan._values(eighth, 1e9), "the trainer refuses shares with moments in 8 bits"


def test_meter_counts_what_arithmetic_says() -> None:
    """Two Linear layers n → n on b rows, only one of them trained: 2bn² forward, as much for each gradient that is needed."""
    b, n = 4, 16
    for trained, products in (((True, True), 5), ((True, False), 4), ((False, True), 3)):
        with META:
            layers, x = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)), torch.empty(b, n)
        for layer, on in zip(layers, trained, strict=True):
            layer.requires_grad_(on)
            layer.weight.grad = torch.empty_like(layer.weight)
        assert measure(lambda f=layers, x=x: f(x), "fp32").flop == products * 2 * b * n * n
    with torch.no_grad():
        four = nn.Sequential(*layers, *layers)
        assert measure(lambda: four(x), "fp32").peak == 2 * 4 * b * n  # the input of a layer and its output, then freed


def test_meta_tensors_are_computed_on_as_a_device_would() -> None:
    """Attention keeps no matrix of all pairs; bf16 autocast has matrix products in half and norms in single precision."""
    with META:
        q = torch.empty(1, 2, 512, 8, requires_grad=True)
        x, linear, norm = torch.empty(3, 8), nn.Linear(8, 8), nn.LayerNorm(8)
    cost = measure(lambda: F.scaled_dot_product_attention(q, q, q), "fp32")
    assert cost.flop == (2 + 5) * 2 * 2 * 512 * 512 * 8
    assert cost.peak < 2 * 512 * 512 * 4
    with DeviceKernels("bf16"):
        half = linear(x)
        assert (half.dtype, norm(half).dtype) == (torch.bfloat16, torch.float32)

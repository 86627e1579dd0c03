"""`EasyRef.attach` on pipelines as a user has them: ControlNet, img2img, inpainting, a LoRA of the user's. And off again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DEISMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from easyref.model import weights
from easyref.model.schedule import Schedule
from easyref.pipeline import EasyRef, Request

BASE = Path("models/base/diffusion")
PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (0, 0, 64, 32))
KINDS: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLControlNetPipeline": {"image": PICTURE, "controlnet_conditioning_scale": 0.8},
    "StableDiffusionXLImg2ImgPipeline": {"image": PICTURE, "strength": 0.7},
    "StableDiffusionXLInpaintPipeline": {"image": PICTURE, "mask_image": MASK, "strength": 0.9},
}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights with a LoRA that counts, as a finetuned model has one."""
    folder, pretrained = tmp_path_factory.mktemp("models") / "finetuned", Path("models/pretrain")
    named, g = load_file(pretrained / "easyref.safetensors"), torch.Generator().manual_seed(0)
    config = weights.read_config(pretrained).model_copy(update={"lora_rank": 2, "lora_alpha": 2.0})
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE)
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down, up = f"adapter.lora.{name}.down.weight", f"adapter.lora.{name}.up.weight"
            named[down] = torch.randn(2, module.in_features, generator=g) * module.in_features**-0.5
            named[up] = torch.randn(module.out_features, 2, generator=g) * 0.02
    weights.save(folder, named, config, torch.float32)
    (folder.parent / "base").symlink_to(Path("models/base").resolve())
    return folder


@pytest.fixture
def style(base: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """A LoRA in the names that peft and diffusers write."""
    g, state = torch.Generator().manual_seed(1), {}
    for name, module in base.unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_k", "attn2.to_v")):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=g) * module.in_features**-0.5
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=g) * 0.3
    return state


def four(model: Any, **channels: int) -> Any:
    """The model with other channels; its weights where they fit."""
    torch.manual_seed(0)
    made = type(model).from_config(dict(model.config) | channels).eval()
    fitting = {k: v for k, v in model.state_dict().items() if v.shape == made.state_dict()[k].shape}
    made.load_state_dict(fitting, strict=False)
    return made


@pytest.fixture
def attach(checkpoint: Path) -> Iterator[Callable[[Any], EasyRef]]:
    """`EasyRef.attach`; a test that fails in between leaves the base models as they were, too."""
    attached: list[EasyRef] = []

    def attach(pipe: Any) -> EasyRef:
        attached.append(EasyRef.attach(pipe, checkpoint))
        return attached[-1]

    yield attach
    for easyref in attached:
        if easyref.pipe.unet.encoder_hid_proj is not None:
            easyref.detach()


@pytest.fixture
def make(base: StableDiffusionXLPipeline) -> Callable[[str], Any]:
    """A user's pipeline of that name over the same base models."""

    def make(name: str) -> Any:
        parts = {k: v for k, v in base.components.items() if v is not None}
        if "ControlNet" in name:
            torch.manual_seed(0)  # diffusers draws its embedding from the global generator
            control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16,) * 4)
            g = torch.Generator().manual_seed(2)
            for block in [*control.controlnet_down_blocks, control.controlnet_mid_block]:  # at first: no control
                block.weight.data.copy_(torch.randn(block.weight.shape, generator=g) * 0.05)
            parts["controlnet"] = control.eval()
        if "Inpaint" in name:  # diffusers inpaints with 4 latent channels only; ours have 8
            for part, channels in (("unet", {"in_channels": 4, "out_channels": 4}), ("vae", {"latent_channels": 4})):
                parts[part] = four(parts[part], **channels)
        pipe = getattr(diffusers, name)(**parts, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def plain(pipe: Any, options: dict[str, Any]) -> np.ndarray:
    g = torch.Generator().manual_seed(0)
    made = pipe(prompt="star", num_inference_steps=3, guidance_scale=3.0, height=64, width=64, generator=g, **options)
    return np.asarray(made.images[0]).astype(int)


def drawn(easyref: EasyRef, color: str, options: dict[str, Any], scale: float = 1.0) -> np.ndarray:
    request = Request("star", [Image.new("RGB", (64, 64), color)], seed=0)
    return np.asarray(easyref([request], 3, 3.0, scale, **options)[0]).astype(int)


def test_the_size_is_that_of_the_control_image(make: Callable[[str], Any], attach: Callable[[Any], EasyRef]) -> None:
    name = "StableDiffusionXLControlNetPipeline"
    easyref = attach(make(name))
    assert drawn(easyref, "red", KINDS[name] | {"image": PICTURE.resize((96, 64))}).shape == (64, 96, 3)


@pytest.mark.parametrize("name", KINDS)
def test_references_work_in_every_pipeline_and_leave_no_trace(
    name: str, make: Callable[[str], Any], attach: Callable[[Any], EasyRef]
) -> None:
    pipe, options = make(name), KINDS[name]
    before = plain(pipe, options)
    easyref = attach(pipe)
    red = drawn(easyref, "red", options)
    assert np.abs(red - drawn(easyref, "blue", options)).max() > 3 and np.abs(red - before).max() > 3
    np.testing.assert_array_equal(drawn(easyref, "red", options), red)
    if options:  # what is special of the pipeline still counts
        change = {"controlnet_conditioning_scale": 0.0} if "ControlNet" in name else {"image": PICTURE.point(lambda value: 255 - value)}
        assert np.abs(drawn(easyref, "red", options | change) - red).max() > 3
    easyref.detach()
    np.testing.assert_array_equal(plain(pipe, options), before)


def test_a_second_detach_does_nothing_and_the_progress_bar_stays(make: Callable[[str], Any], attach: Callable[[Any], EasyRef]) -> None:
    pipe = make("StableDiffusionXLPipeline")
    pipe.set_progress_bar_config(disable=False)
    first = attach(pipe)
    first.detach()
    second = attach(pipe)
    assert not pipe._progress_bar_config["disable"]
    pipe.set_progress_bar_config(disable=True)
    red = drawn(second, "red", {})
    first.detach()  # of another that is attached now
    np.testing.assert_array_equal(drawn(second, "red", {}), red)
    with pytest.raises(ValueError, match="detached from its pipeline; attach the checkpoint again"):
        drawn(first, "red", {})


def test_an_attach_that_fails_leaves_the_pipeline_as_it_was(
    make: Callable[[str], Any], attach: Callable[[Any], EasyRef], checkpoint: Path, tmp_path: Path
) -> None:
    """With a scheduler that the checkpoint cannot use; then with one that it can."""
    config = weights.read_config(checkpoint)
    asks = config.model_copy(update={"schedule": Schedule(zero_terminal_snr=True, prediction="v_prediction")})
    weights.save(tmp_path / "asks", load_file(checkpoint / "easyref.safetensors"), asks, torch.float32)
    pipe = make("StableDiffusionXLPipeline")
    pipe.scheduler = DEISMultistepScheduler.from_config(pipe.scheduler.config)
    before = plain(pipe, {})
    with pytest.raises(ValueError, match="DEISMultistepScheduler has no rescale_betas_zero_snr"):
        EasyRef.attach(pipe, tmp_path / "asks", checkpoint.parent)
    np.testing.assert_array_equal(plain(pipe, {}), before)
    assert drawn(attach(pipe), "red", {}).shape == (64, 64, 3)


def test_a_lora_of_the_user_beside_references(make: Callable[[str], Any], attach: Callable[[Any], EasyRef], style: dict) -> None:
    """Each changes the image, neither takes the other away, both leave no trace in either order."""
    pipe = make("StableDiffusionXLPipeline")
    before = plain(pipe, {})
    pipe.load_lora_weights(style, adapter_name="style")
    styled = plain(pipe, {})
    assert np.abs(styled - before).max() > 3
    with pytest.raises(ValueError, match="already carries LoRA layers; install EasyRef first"):
        attach(pipe)
    pipe.unload_lora_weights()

    easyref = attach(pipe)
    red = drawn(easyref, "red", {})
    pipe.load_lora_weights(style, adapter_name="style")
    both = drawn(easyref, "red", {})
    assert np.abs(both - red).max() > 3 and np.abs(both - drawn(easyref, "blue", {})).max() > 3
    pipe.set_adapters("style", 0.0)
    assert np.abs(drawn(easyref, "red", {}) - red).max() <= 1
    pipe.set_adapters("style", 1.0)
    np.testing.assert_array_equal(drawn(easyref, "red", {}), both)
    easyref.detach()
    np.testing.assert_array_equal(plain(pipe, {}), styled)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(plain(pipe, {}), before)

    easyref = attach(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(drawn(easyref, "red", {}), red)
    easyref.detach()
    np.testing.assert_array_equal(plain(pipe, {}), before)

"""An EasyRef that draws with exported graphs in place of its torch modules.

An engine is a callable with the signature of the torch module that it stands for. `Engines` holds one for each graph, of ONNX Runtime
or of TensorRT (trt.py), and `EasyRef` uses them where it would call UNet, reference encoder, reference keys and values, text encoders
and VAE decoder. Of the torch modules only their configurations are there (on the meta device): the graphs have the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyref.model.attention import scales
from easyref.model.flat import flat_inputs
from easyref.model.reference import ReferenceConfig, ReferenceInputs
from easyref.records import changed_file, read_json

MANIFEST = "manifest.json"
NAMES = ("unet", "reference_kv", "vae_decoder", "text_encoder", "text_encoder_2", "vision", "prefix", "aggregator")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
Outputs = Tensor | tuple[Tensor, ...]


class EngineError(RuntimeError):
    """Graphs that cannot be used here; the message says what is wrong and the fix."""


class Engine:
    """One ONNX graph in ONNX Runtime: tensors in by name, a tensor out, or several."""

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider") -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=[provider])
        if self.session.get_providers()[0] != provider:  # it falls back without a word
            taken = self.session.get_providers()[0]
            fix = "onnxruntime and onnxruntime-gpu share a folder: uninstall both, then install the one that has it, and what it needs"
            raise EngineError(f"{path}: asked for {provider}, ONNX Runtime took {taken}; {fix}")
        self.half = {value.name for value in self.session.get_inputs() if value.type == "tensor(float16)"}

    def __call__(self, **inputs: Tensor) -> Any:
        given = {name: value.detach().cpu().to(torch.float16 if name in self.half else value.dtype) for name, value in inputs.items()}
        feed = {name: value.contiguous().numpy() for name, value in given.items()}
        first, *others = (torch.from_numpy(value) for value in self.session.run(None, feed))
        return (first, *others) if others else first


def check_graphs(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of graphs that is whole.

    Raises:
        EngineError: a graph that is missing or not the one that was written.
    """
    if not (folder / MANIFEST).exists():
        raise EngineError(f"{folder}: no graphs; make them with `easyref export CHECKPOINT {folder}`")
    manifest = read_json(folder / MANIFEST)
    if name := changed_file(folder, manifest["files"]):
        raise EngineError(f"{folder / name}: missing or not what was written; make the graphs again")
    missing = [name for name in NAMES if f"{name}.onnx" not in manifest["files"]]
    if missing or "shapes" not in manifest:
        raise EngineError(f"{folder}: written by an older version, make the graphs again")
    return manifest


class Engines:
    """What draws, by the name of its graph. `manifest`: of the graphs; `how`: what runs them, with its version."""

    def __init__(self, engines: Mapping[str, Callable[..., Any]], manifest: dict[str, Any], how: str, device: str = "cpu") -> None:
        self.engines, self.manifest, self.device = engines, manifest, device
        self.about = [manifest["files"], how]  # what decides their outputs

    @classmethod
    def onnxruntime(cls, folder: Path, provider: str = "cpu") -> Engines:
        """The graphs of `folder` in ONNX Runtime."""
        import onnxruntime

        if provider not in PROVIDERS:
            raise EngineError(f"provider {provider!r}: not one of {', '.join(PROVIDERS)}")
        manifest = check_graphs(folder)
        made = {name: Engine(folder / f"{name}.onnx", PROVIDERS[provider]) for name in NAMES}
        return cls(made, manifest, f"onnxruntime {onnxruntime.__version__} {provider}")

    def check(self, checkpoint: Path) -> None:
        """EngineError unless the graphs are of this checkpoint."""
        files = {Path(name).name: digest for name, digest in self.manifest["inputs"]["files"].items() if not name.startswith("base/")}
        if name := changed_file(checkpoint, files):
            raise EngineError(f"{checkpoint / name}: not what the graphs were made of; `easyref export {checkpoint}` makes its own")

    def pipeline(self, place: str, revision: Any, dtype: torch.dtype) -> Any:
        """The SDXL pipeline at `place`: its configurations, tokenizers and scheduler, no weights; the graphs in their place."""
        from accelerate.hooks import ModelHook
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        parts: dict[str, Any] = {}
        with torch.device("meta"):
            model: Any
            for name, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
                parts[name] = model.from_config(model.load_config(place, subfolder=name, revision=revision))
            for name, model in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
                parts[name] = model(CLIPTextConfig.from_pretrained(place, subfolder=name, revision=revision))
                parts[name].forward = self._text(name)
        self.network = parts["unet"]
        self.network.forward = self._unet
        parts["vae"].decode = self._decoder(parts["vae"].config.scaling_factor)
        for part in parts.values():
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns
            part._hf_hook = ModelHook()  # of a module whose weights are elsewhere: diffusers asks it for the device
            part._hf_hook.execution_device = self.device
        return StableDiffusionXLPipeline.from_pretrained(place, revision=revision, torch_dtype=dtype, add_watermarker=False, **parts)

    def encoder(self, place: str, revision: Any, config: ReferenceConfig) -> Encoder:
        """In the place of a ReferenceEncoder over the Qwen2-VL at `place`."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        with torch.device("meta"):
            mllm = Qwen2VLModel(Qwen2VLConfig.from_pretrained(place, revision=revision))
        return Encoder(self, config, mllm)

    def payload(self, tokens_BTX: Tensor) -> Tensor:
        """Packed keys and values [B, 1, T, W]; the scale is in the values."""
        return self.engines["reference_kv"](tokens=tokens_BTX, scale=torch.tensor(scales(self.network)))[:, None]

    def _text(self, name: str) -> Callable[..., Any]:
        from transformers.modeling_outputs import BaseModelOutput
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        def forward(input_ids: Tensor, output_hidden_states: bool = True) -> Any:
            made = self.engines[name](input_ids=input_ids)
            if isinstance(made, tuple):
                states, pooled = made
                return CLIPTextModelOutput(text_embeds=pooled, hidden_states=(states, states))
            return BaseModelOutput(last_hidden_state=made, hidden_states=(made, made))  # the last but one is read

        return forward

    def _unet(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *_: Any, added_cond_kwargs: dict[str, Any],
        return_dict: bool = True, **given: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        unknown = [name for name, value in given.items() if value is not None]
        if unknown or return_dict:
            raise EngineError(f"the exported UNet takes no {unknown[0] if unknown else 'return_dict'}; draw with torch")
        step = torch.as_tensor(timestep)
        if step != step.long():
            raise EngineError(
                f"the exported UNet takes whole timesteps, not {float(step):.2f}; take a scheduler that has them, or torch"
            )
        (kv,) = added_cond_kwargs["image_embeds"]
        if not any(scales(self.network)):  # in this step, whatever is in the values
            kv = torch.zeros_like(kv)
        return (
            self.engines["unet"](
                sample=sample, timestep=step.long(), encoder_hidden_states=encoder_hidden_states,
                text_embeds=added_cond_kwargs["text_embeds"], time_ids=added_cond_kwargs["time_ids"].to(sample.dtype),
                reference_kv=kv[:, 0],
            ).to(sample.dtype),
        )  # fmt: skip

    def _decoder(self, scaling: float) -> Callable[..., tuple[Tensor]]:
        def decode(latents: Tensor, return_dict: bool = True, **_: Any) -> tuple[Tensor]:
            return (self.engines["vae_decoder"](latents=latents * scaling).to(latents.dtype),)  # the graph divides by it

        return decode


class Encoder:
    """Called like a ReferenceEncoder."""

    def __init__(self, engines: Engines, config: ReferenceConfig, mllm: Any) -> None:
        self.engines, self.config, self.mllm = engines.engines, config, mllm

    def __call__(self, inputs: ReferenceInputs, bias_BL: Tensor | None = None) -> Tensor:
        see, read = flat_inputs(inputs.to("cpu"), self.mllm, self.config.positions)
        embeds = self.engines["vision"](**see)
        states = self.engines["prefix"](image_embeds=embeds, **read)
        bias = torch.zeros(read["mask"].shape) if bias_BL is None else bias_BL
        return self.engines["aggregator"](states=states, positions=read["positions"], mask=read["mask"], bias=bias.to(states.dtype))

"""An EasyRef that draws with exported graphs in place of its torch modules.

An engine is a callable with the signature of the torch module that it stands for. `Engines` holds one for each graph, of ONNX Runtime
or of TensorRT (trt.py), and `EasyRef` uses them where it would call UNet, reference encoder, reference keys and values and VAE decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from easyref.model.attention import scales
from easyref.model.flat import flat_inputs
from easyref.model.reference import ReferenceInputs
from easyref.records import changed_file, read_json

MANIFEST = "manifest.json"
NAMES = ("unet", "reference_kv", "vae_decoder", "vision", "prefix", "aggregator")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class EngineError(RuntimeError):
    """Graphs that cannot be used here; the message says what is wrong and the fix."""


class Engine:
    """One ONNX graph in ONNX Runtime: tensors in by name, one tensor out."""

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider") -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=[provider])
        if self.session.get_providers()[0] != provider:  # it falls back without a word
            taken = self.session.get_providers()[0]
            raise EngineError(f"{path}: asked for {provider}, ONNX Runtime took {taken}; install what {provider} needs")
        self.half = {value.name for value in self.session.get_inputs() if value.type == "tensor(float16)"}

    def __call__(self, **inputs: Tensor) -> Tensor:
        given = {name: value.detach().cpu().to(torch.float16 if name in self.half else value.dtype) for name, value in inputs.items()}
        feed = {name: value.contiguous().numpy() for name, value in given.items()}
        return torch.from_numpy(self.session.run(None, feed)[0])


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
    """What draws, by the name of its graph."""

    def __init__(self, engines: Mapping[str, Callable[..., Tensor]], device: str = "cpu") -> None:
        self.engines, self.device = engines, device

    @classmethod
    def onnxruntime(cls, folder: Path, provider: str = "cpu") -> Engines:
        """The graphs of `folder` in ONNX Runtime."""
        if provider not in PROVIDERS:
            raise EngineError(f"provider {provider!r}: not one of {', '.join(PROVIDERS)}")
        check_graphs(folder)
        made = {name: Engine(folder / f"{name}.onnx", PROVIDERS[provider]) for name in NAMES}
        return cls(made)

    def install(self, easyref: Any) -> None:
        """Take the place of the torch modules of `easyref`."""
        pipe = easyref.pipe
        easyref.starts = LRUCache(0)  # the graph of the prefix runs whole
        easyref.encoder.forward = self._encoder(easyref.encoder)
        easyref.adapter.payload, self.network = self.payload, pipe.unet
        pipe.unet.forward, pipe.vae.decode = self._unet, self._decoder(pipe.vae.config.scaling_factor)

    def payload(self, tokens_BTX: Tensor) -> Tensor:
        """Packed keys and values [B, 1, T, W]; the scale is in the values."""
        return self.engines["reference_kv"](tokens=tokens_BTX, scale=torch.tensor(scales(self.network)))[:, None]

    def _encoder(self, encoder: Any) -> Callable[..., Tensor]:
        def forward(inputs: ReferenceInputs, bias_BL: Tensor | None = None) -> Tensor:
            see, read = flat_inputs(inputs.to("cpu"), encoder.mllm, encoder.config.positions)
            embeds = self.engines["vision"](**see)
            states = self.engines["prefix"](image_embeds=embeds, **read)
            bias = torch.zeros(read["mask"].shape) if bias_BL is None else bias_BL
            return self.engines["aggregator"](states=states, positions=read["positions"], mask=read["mask"], bias=bias.to(states.dtype))

        return forward

    def _unet(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *_: Any, added_cond_kwargs: dict[str, Any],
        return_dict: bool = True, **given: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        unknown = [name for name, value in given.items() if value is not None]
        if unknown or return_dict:
            raise EngineError(f"the exported UNet takes no {unknown[0] if unknown else 'return_dict'}; draw with torch")
        (kv,) = added_cond_kwargs["image_embeds"]
        if not any(scales(self.network)):  # in this step, whatever is in the values
            kv = torch.zeros_like(kv)
        return (
            self.engines["unet"](
                sample=sample, timestep=torch.as_tensor(timestep).long(), encoder_hidden_states=encoder_hidden_states,
                text_embeds=added_cond_kwargs["text_embeds"], time_ids=added_cond_kwargs["time_ids"].to(sample.dtype),
                reference_kv=kv[:, 0],
            ).to(sample.dtype),
        )  # fmt: skip

    def _decoder(self, scaling: float) -> Callable[..., tuple[Tensor]]:
        def decode(latents: Tensor, return_dict: bool = True, **_: Any) -> tuple[Tensor]:
            return (self.engines["vae_decoder"](latents=latents * scaling).to(latents.dtype),)  # the graph divides by it

        return decode

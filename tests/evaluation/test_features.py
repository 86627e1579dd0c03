"""Features of real images are Lite0's whoever made them: the stage `embed`, an earlier evaluation, or this one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from easyref.config import Embed
from easyref.data.embed import embed
from easyref.data.extractors import Lite0
from easyref.data.shards import ImageStore
from easyref.evaluation.features import PROBED, real_features
from easyref.records import write_table

COUNT = 40


@dataclass
class Images:
    store: ImageStore
    loaded: list[str] = field(default_factory=list)

    def load(self, sha: str) -> Image.Image:
        self.loaded.append(sha)
        return self.store.image(sha)

    @property
    def names(self) -> list[str]:
        return self.store.table["sha256"].to_list()[::-1]  # not in the order of the embeddings


@pytest.fixture
def images(tmp_path: Path) -> Images:
    folder = shutil.copytree("data/images", tmp_path / "images")
    table = ImageStore(folder).table
    half = [table.filter(shard=shard).head(COUNT // 2) for shard in table["shard"].unique().sort()[:2]]
    write_table(folder / "images.parquet", pl.concat(half))
    return Images(ImageStore(folder))


@pytest.fixture
def embedded(images: Images, tmp_path: Path) -> Path:
    embed(
        Embed(batch=16, workers=1, images=None, texts=None, subjects=None),
        images.store.folder,
        tmp_path / "embedded",
        tmp_path / "work",
    )
    return tmp_path / "embedded"


def test_what_embed_has_is_not_computed_again(images: Images, embedded: Path, tmp_path: Path) -> None:
    found = real_features(images.names, images.load, Lite0(), tmp_path / "kept", embedded)
    assert len(images.loaded) == PROBED < COUNT
    made = Lite0().both([images.store.image(sha) for sha in images.names])
    for a, b in zip(found, made, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # of float16
    images.loaded.clear()
    again = real_features(images.names, images.load, Lite0(), tmp_path / "kept", tmp_path / "gone")
    assert not images.loaded and all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_rest_is_computed_and_kept_beside_what_was(images: Images, tmp_path: Path) -> None:
    first, rest, kept = images.names[:15], images.names[10:], tmp_path / "kept"
    one = real_features(first, images.load, Lite0(), kept, tmp_path / "no embeddings")
    assert images.loaded == first
    two = real_features(rest, images.load, Lite0(), kept, tmp_path / "no embeddings")
    assert images.loaded == images.names
    assert np.array_equal(one[0][10:], two[0][:5]) and np.array_equal(one[1][10:], two[1][:5])
    assert np.array_equal(one[0], real_features(first, images.load, Lite0(), kept, tmp_path / "no embeddings")[0])
    assert images.loaded == images.names, "those of the first call were not lost by the second"


@pytest.mark.parametrize("other", ["width", "values"])
def test_vectors_of_another_extractor_are_not_taken(
    images: Images, embedded: Path, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in embedded.glob("subject-*.npy"):
        vectors = np.load(file)
        np.save(file, vectors[:, :384] if other == "width" else vectors * np.float16(1.1))
    found = real_features(images.names, images.load, Lite0(), tmp_path / "kept", embedded)
    np.testing.assert_allclose(found[0], Lite0()([images.store.image(sha) for sha in images.names]), rtol=1e-3, atol=1e-3)
    assert len(images.loaded) == PROBED + COUNT and "not lite0's vectors" in capsys.readouterr().out


def test_features_of_another_size_are_not_taken(images: Images, tmp_path: Path) -> None:
    real_features(images.names[:4], images.load, Lite0(), tmp_path / "kept", tmp_path / "none")
    small = real_features(images.names[:4], images.load, Lite0(64), tmp_path / "kept", tmp_path / "none")
    np.testing.assert_allclose(small[0], Lite0(64)([images.store.image(sha) for sha in images.names[:4]]), rtol=1e-3, atol=1e-3)

"""Faces in images and whose they are, by two ONNX files as insightface's packs have them (buffalo_l: det_10g.onnx, w600k_r50.onnx).
SCRFD finds them (Guo et al., arXiv 2105.04714), ArcFace tells them apart (Deng et al., arXiv 1801.07698).

image → fitted into the detector's input, top left → a score, box and five landmarks for every anchor of three strides → the best of
those that overlap → turned upright by the landmarks, 112×112 pixels → unit vector. Numbers and conventions are insightface's.

Letters: H,W detector's input · A anchors of a stride · F faces · E vector's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from easyref import config
from easyref.data.embed import Box, Face
from easyref.data.extractors import Array

STRIDES = (8, 16, 32)  # pixels between anchors
ANCHORS = 2  # at each place
SIDES = (128, 640)  # pixels of the detector's inputs, where the file takes any: a face that fills the image is seen in the small one
OVERLAP = 0.4  # intersection over union above which only the better of two boxes stays
UPRIGHT = 112  # pixels: the side of ArcFace's input
#: Left eye, right eye, nose, left and right corner of the mouth of an upright face: x, y in pixels, whose centres are whole numbers.
LANDMARKS_52 = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


class Faces:
    """Images → faces of each, the largest first."""

    def __init__(self, p: config.Faces) -> None:
        self.p = p
        self.detector = SCRFD(Path(p.detector), "embed.faces", p.min_score)
        self.embedder = ArcFace(Path(p.embedder), "embed.faces")

    def __call__(self, items: Sequence[Image.Image]) -> list[list[Face]]:
        return [self._faces(image) for image in items]

    def _faces(self, image: Image.Image) -> list[Face]:
        found = []
        for score, corners, landmarks in zip(*self.detector(image), strict=True):
            left, top = (max(0, round(value)) for value in corners[:2].tolist())
            right, bottom = (min(most, round(value)) for value, most in zip(corners[2:].tolist(), image.size, strict=True))
            if min(right - left, bottom - top) >= self.p.min_side:
                found.append((Box(left, top, right, bottom, float(score)), landmarks))
        found.sort(key=lambda face: -face[0].area)
        found = found[: self.p.max_faces]
        if not found:
            return []
        vectors_FE = self.embedder([upright(image, landmarks) for _, landmarks in found])
        vectors_FE = vectors_FE / np.maximum(np.linalg.norm(vectors_FE, axis=1, keepdims=True), 1e-12)
        return [Face(box, vector) for (box, _), vector in zip(found, vectors_FE, strict=True)]


class SCRFD:
    """Image → scores [F], corners (left, top, right, bottom) [F, 4] and landmarks [F, 5, 2] of its faces, the surest first."""

    def __init__(self, path: Path, key: str, min_score: float) -> None:
        self.path, self.min_score = path, min_score
        self.session = open_session(path, key, (None, None), 3 * len(STRIDES), "SCRFD with landmarks, as det_10g.onnx")
        self.input = self.session.get_inputs()[0]
        height, width = self.input.shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        self.sizes_HW = [(height, width)] if fixed else [(side, side) for side in SIDES]
        self(Image.new("RGB", (8, 8)))  # a file of another form is told before the work

    def __call__(self, image: Image.Image) -> tuple[Array, Array, Array]:
        image = image.convert("RGB")
        found = [part for size_HW in self.sizes_HW for part in self._at_size(image, *size_HW)]
        scores_F, corners_F4, landmarks_F52 = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(-scores_F, kind="stable")
        kept = order[best_of_overlapping(corners_F4[order], OVERLAP)]
        return scores_F[kept], corners_F4[kept], landmarks_F52[kept]

    def _at_size(self, image: Image.Image, height: int, width: int) -> Iterator[tuple[Array, Array, Array]]:
        """Scores, corners and landmarks, in pixels of the image, of the faces found by each stride."""
        scale = min(height / image.height, width / image.width)
        fitted = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        grown = np.array(image.size) / fitted.size
        pixels_HW3 = np.zeros((height, width, 3), np.float32)
        pixels_HW3[: fitted.height, : fitted.width] = np.asarray(fitted)
        outputs = self.session.run(None, {self.input.name: (pixels_HW3.transpose(2, 0, 1)[None] - 127.5) / 128})
        for i, stride in enumerate(STRIDES):
            y, x = np.mgrid[: height // stride, : width // stride]
            anchors_A2 = np.stack([x, y], -1).reshape(-1, 2).repeat(ANCHORS, 0) * stride
            scores_A, sides_A4, offsets_A52 = self._of_stride(outputs[i :: len(STRIDES)], len(anchors_A2))
            corners_A4 = np.concatenate([anchors_A2 - sides_A4[:, :2] * stride, anchors_A2 + sides_A4[:, 2:] * stride], 1)
            landmarks_A52 = anchors_A2[:, None] + offsets_A52 * stride
            sure = (scores_A >= self.min_score) & np.isfinite(corners_A4).all(1) & np.isfinite(landmarks_A52).all((1, 2))
            yield scores_A[sure], corners_A4[sure] * np.tile(grown, 2), landmarks_A52[sure] * grown

    def _of_stride(self, outputs: Sequence[Array], count: int) -> tuple[Array, Array, Array]:
        """Of each anchor the score [A], the distances to four sides [A, 4] and the offsets of five landmarks [A, 5, 2], in strides."""
        if [output.size for output in outputs] != [count, 4 * count, 10 * count]:
            sizes = ", ".join(str(output.shape) for output in outputs)
            raise ValueError(f"{self.path}: {sizes} for {count} anchors; scores, boxes, five landmarks are wanted, as in det_10g.onnx")
        return outputs[0].reshape(count), outputs[1].reshape(count, 4), outputs[2].reshape(count, 5, 2)


class ArcFace:
    """Images of upright faces → [N, E]: 112×112, RGB, -1..1. Finds and turns no face."""

    def __init__(self, path: Path, key: str) -> None:
        self.session = open_session(path, key, (UPRIGHT, UPRIGHT), 1, "ArcFace, as w600k_r50.onnx")
        self.input = self.session.get_inputs()[0].name

    def __call__(self, items: Sequence[Image.Image]) -> Array:
        size = (UPRIGHT, UPRIGHT)
        small = [np.asarray(i.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32) for i in items]
        pixels_N3HW = np.stack(small).transpose(0, 3, 1, 2) / 127.5 - 1
        return np.concatenate([self.session.run(None, {self.input: one[None]})[0] for one in pixels_N3HW])


def best_of_overlapping(corners_F4: Array, overlap: float) -> list[int]:
    """Boxes, the best first → those that no better one that stays covers by more than `overlap` (non-maximum suppression)."""
    areas_F = np.prod(corners_F4[:, 2:] - corners_F4[:, :2], axis=1)
    kept, waiting = [], np.arange(len(corners_F4))
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        low = np.maximum(corners_F4[best, :2], corners_F4[waiting, :2])
        high = np.minimum(corners_F4[best, 2:], corners_F4[waiting, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        waiting = waiting[common <= overlap * (areas_F[best] + areas_F[waiting] - common)]
    return kept


def upright(image: Image.Image, landmarks_52: Array) -> Image.Image:
    """The face turned, scaled and moved to where its landmarks are nearest to LANDMARKS_52 by least squares (Umeyama's transform). With
    points as complex numbers that is z → a z + b. What is outside of the image is black. Pillow counts from the corners of pixels."""
    z_5, upright_5 = (points[:, 0] + 1j * points[:, 1] for points in (landmarks_52 + 0.5, LANDMARKS_52 + 0.5))
    centred_5 = z_5 - z_5.mean()
    a = (centred_5.conj() @ (upright_5 - upright_5.mean())) / max(float((abs(centred_5) ** 2).sum()), 1e-12)
    back = 1 / a if a else 1.0 + 0j  # landmarks that are one point say nothing
    move = z_5.mean() - back * upright_5.mean()
    affine = (back.real, -back.imag, move.real, back.imag, back.real, move.imag)
    return image.convert("RGB").transform((UPRIGHT, UPRIGHT), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


def open_session(path: Path, key: str, sides: tuple[int | None, int | None], outputs: int, kind: str) -> Any:
    """A file of the form `kind` in ONNX Runtime, on the GPU if this build of it has one, else on one thread. `key`: the parameter that
    asks for it; `sides`: of its input in pixels, None: any.

    Raises:
        FileNotFoundError, ValueError: missing, not ONNX, not of this form, or a GPU that cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such ONNX file; give {key} one that is {kind}, or set it to null")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{key} needs ONNX Runtime: pip install 'easyref[cpu]', or 'easyref[gpu]'") from error
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    provider = gpu if gpu in onnxruntime.get_available_providers() else cpu
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime raises many types
        raise ValueError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0][:120]}); get it again") from error
    if session.get_providers()[0] != provider:  # it falls back without a word
        raise ValueError(f"{path}: ONNX Runtime took no {provider}; install what it needs, or onnxruntime for onnxruntime-gpu")
    given, count = session.get_inputs(), len(session.get_outputs())
    shape, wanted = given[0].shape if given else [], (3, *sides)
    fits = len(given) == 1 and given[0].type == "tensor(float)" and len(shape) == 4
    fits = fits and all(not isinstance(side, int) or want in (side, None) for side, want in zip(shape[1:], wanted, strict=True))
    if not fits or count != outputs:
        raise ValueError(f"{path}: {len(given)} input {shape}, {count} outputs; {key} wants {kind} ({outputs} outputs)")
    return session

"""Faces by real ONNX files whose answers are known: a detector whose outputs are linear in single pixels, an embedder that answers with
the mean colour. Decoding, suppression and alignment against loops and numpy's least squares."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates

from easyref.config import Embed, Faces, Likeness, load_params
from easyref.data import faces
from easyref.data.embed import embed, read_space
from easyref.data.faces import LANDMARKS_52, SCRFD, STRIDES, ArcFace, best_of_overlapping, upright
from easyref.data.group import learned_groups, read_spaces
from easyref.data.shards import write_shard
from easyref.images import to_png
from easyref.records import IMAGE_COLUMNS, ROW_COLUMNS, read_table, write_table

WIDTHS = (1, 4, 10)  # of scores, boxes, landmarks


def write_graph(path: Path, nodes: list[Any], constants: dict[str, Any], shape: list[Any], outputs: list[str]) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [given], values, weights), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    save(model, path)
    return path


def write_detector(path: Path, linear: dict[tuple[int, int], tuple[Any, Any]], shape: tuple[Any, Any] = ("h", "w")) -> Path:
    """`linear`: (stride, width of the output) → weights [2 × width, 3] and offsets of what two anchors answer to their pixel."""
    nodes, constants, outputs = [], {}, []
    for width in WIDTHS:
        for stride in STRIDES:
            weight, offset = linear[stride, width]
            name = f"{width}-{stride}"
            kernel = np.zeros((2 * width, 3, stride, stride), np.float32)
            kernel[:, :, 0, 0] = weight
            constants |= {f"k{name}": kernel, f"b{name}": np.float32(offset), f"s{name}": np.array([-1, width])}
            nodes += [
                helper.make_node("Conv", ["x", f"k{name}", f"b{name}"], [f"c{name}"], strides=[stride, stride]),
                helper.make_node("Transpose", [f"c{name}"], [f"t{name}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"t{name}", f"s{name}"], [name]),
            ]
            outputs.append(name)
    return write_graph(path, nodes, constants, [1, 3, *shape], outputs)


def patch_detector(path: Path, shape: tuple[Any, Any] = ("h", "w")) -> Path:
    """Finds red pixels at stride 8: the box reaches 1 stride around, the landmarks are those of an upright face of 2 × 2 strides."""
    points = (LANDMARKS_52 / 56 - 1).ravel()
    nothing = {(s, w): (np.zeros((2 * w, 3)), np.full(2 * w, -1.0)) for s in STRIDES for w in WIDTHS}
    red = [[0.5, -0.5, -0.5], [0, 0, 0]]  # red: 1.5 - 1 …, the second anchor finds nothing
    own = {(8, 1): (red, [-0.6, -1.0]), (8, 4): (np.zeros((8, 3)), np.ones(8)), (8, 10): (np.zeros((20, 3)), np.tile(points, 2))}
    return write_detector(path, nothing | own, shape)


def colour_embedder(path: Path) -> Path:
    pooled = [helper.make_node("GlobalAveragePool", ["x"], ["y"]), helper.make_node("Flatten", ["y"], ["z"])]
    return write_graph(path, pooled, {}, ["n", 3, 112, 112], ["z"])


def test_faces_are_what_the_outputs_say(tmp_path: Path) -> None:
    """Every anchor in a loop; random weights, so that no two parts of an output can be exchanged."""
    rng = np.random.default_rng(0)
    linear = {(s, w): (rng.normal(0, 0.3, (2 * w, 3)), rng.uniform(0.5, 2, 2 * w)) for s in STRIDES for w in WIDTHS[1:]}
    linear |= {(s, 1): (np.abs(rng.normal(0.4, 0.2, (2, 3))), np.array([0.0, -0.1])) for s in STRIDES}
    pixels = np.zeros((640, 640, 3), np.uint8)
    pixels[::8, ::8] = np.where(rng.random((80, 80, 1)) < 0.02, rng.integers(120, 256, (80, 80, 3)), 0)
    expected = []
    for stride in STRIDES:
        for y in range(0, 640, stride):
            for x in range(0, 640, stride):
                point = (pixels[y, x] - 127.5) / 128
                of_anchors = [np.reshape(linear[stride, w][0] @ point + linear[stride, w][1], (2, w)) for w in WIDTHS]
                scores, sides, offsets = of_anchors
                for anchor in (0, 1):
                    if scores[anchor, 0] >= 0.3:
                        left, top, right, bottom = sides[anchor] * stride
                        corners = [x - left, y - top, x + right, y + bottom]
                        expected.append((scores[anchor, 0], corners, offsets[anchor].reshape(5, 2) * stride + [x, y]))
    expected.sort(key=lambda face: -face[0])
    kept: list[Any] = []
    for face in expected:
        if all(iou(face[1], other[1]) <= 0.4 for other in kept):
            kept.append(face)
    assert len(expected) > len(kept) > 50
    detector = SCRFD(write_detector(tmp_path / "d.onnx", linear, (640, 640)), "embed.faces", 0.3)
    for found, wanted in zip(detector(Image.fromarray(pixels)), zip(*kept, strict=True), strict=True):
        np.testing.assert_allclose(found, np.array(wanted), atol=1e-3)


def iou(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_a_box_goes_only_if_a_better_one_that_stays_covers_it() -> None:
    """The second is covered by the first, the third by the second alone."""
    assert best_of_overlapping(np.array([[0, 0, 10, 10], [3, 0, 13, 10], [7, 0, 17, 10], [50, 50, 60, 60.0]]), 0.4) == [0, 2, 3]
    assert best_of_overlapping(np.empty((0, 4)), 0.4) == []


def test_an_upright_face_has_its_landmarks_in_place_and_the_pixels_between() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    turn = 2.2 * np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    landmarks = LANDMARKS_52 @ turn.T + [160, 10] + rng.normal(0, 2, (5, 2))
    x, y = landmarks.T
    rows = np.concatenate([np.stack([x, -y, x * 0 + 1, x * 0], 1), np.stack([y, x, x * 0, x * 0 + 1], 1)])
    a, b, c, d = np.linalg.lstsq(rows, LANDMARKS_52.T.ravel(), rcond=None)[0]
    back = np.linalg.inv([[a, -b, c], [b, a, d], [0, 0, 1]])
    v, u = np.mgrid[:112, :112]
    where = np.tensordot(back, np.stack([u, v, np.ones_like(u)]), 1)
    found = np.asarray(upright(image, landmarks), float)
    inside = (where[0] > 1) & (where[0] < 398) & (where[1] > 1) & (where[1] < 298)
    assert inside.mean() > 0.7
    for channel in range(3):
        pixels = map_coordinates(np.asarray(image, float)[..., channel], [where[1], where[0]], order=1)
        assert np.abs(found[..., channel] - pixels)[inside].max() < 1.01  # whole numbers


def scene(*squares: tuple[int, int, int, str], size: tuple[int, int] = (256, 160)) -> Image.Image:
    """Squares of a colour around a red point: left, top, side, colour."""
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for left, top, side, colour in squares:
        draw.rectangle((left, top, left + side - 1, top + side - 1), colour)
        x, y, half = left + side // 2, top + side // 2, max(4, side // 8)
        draw.rectangle((x - half, y - half, x + half, y + half), "red")
    return image


@pytest.fixture
def p(tmp_path: Path) -> Faces:
    detector, embedder = patch_detector(tmp_path / "d.onnx"), colour_embedder(tmp_path / "e.onnx")
    return Faces(detector=str(detector), embedder=str(embedder), min_score=0.5, min_side=4, max_faces=3)


def test_a_face_is_found_where_it_is_at_any_size_of_the_image(p: Faces, tmp_path: Path) -> None:
    """A detector of 128 × 128 sees an image of 256 × 160 at half its size."""
    fixed = p.model_copy(update={"detector": str(patch_detector(tmp_path / "fixed.onnx", (128, 128)))})
    image = scene((48, 32, 32, "white"))  # its middle is (64, 48), at half size an anchor
    (face,) = faces.Faces(fixed)([image])[0]
    assert (face.box.left, face.box.top, face.box.right, face.box.bottom) == (48, 32, 80, 64)
    _, _, (landmarks,) = SCRFD(Path(fixed.detector), "embed.faces", 0.5)(image)
    np.testing.assert_allclose(landmarks, LANDMARKS_52 / 112 * 32 + [48, 32], atol=1e-4)
    assert np.linalg.norm(face.vector_E) == pytest.approx(1) and face.vector_E[0] > face.vector_E[1] > 0
    assert faces.Faces(fixed)([Image.new("RGB", (9, 300))]) == [[]]


def test_a_file_that_takes_any_size_sees_an_image_at_two(tmp_path: Path) -> None:
    """What detectors of one size find, the small one's boxes five times as large."""
    image = scene((100, 60, 320, "white"), (700, 300, 64, "white"), size=(1024, 640))
    files = [patch_detector(tmp_path / f"{shape}.onnx", shape) for shape in (("h", "w"), (128, 128), (640, 640))]
    any_size, *fixed = (SCRFD(file, "embed.faces", 0.5) for file in files)
    scores, corners, landmarks = (np.concatenate(parts) for parts in zip(*(one(image) for one in fixed), strict=True))
    order = np.argsort(-scores, kind="stable")
    kept = order[best_of_overlapping(corners[order], 0.4)]
    assert {round(box[2] - box[0]) for box in corners[kept]} == {26, 128}
    for found, wanted in zip(any_size(image), (scores, corners, landmarks), strict=True):
        assert np.array_equal(found, wanted[kept])


def test_the_largest_faces_stay_and_those_at_the_edge_are_cut(p: Faces, tmp_path: Path) -> None:
    """Box sizes come from the green of the point: the second channel moves the sides."""
    linear = {(s, w): (np.zeros((2 * w, 3)), np.full(2 * w, -1.0)) for s in STRIDES for w in WIDTHS}
    linear[8, 1] = ([[1, 0, 0], [0, 0, 0]], [0.0, -1.0])
    linear[8, 4] = (np.tile([[0, 2, 0]], (8, 1)), np.full(8, 2.5))  # black .5 strides, white 4.5
    linear[8, 10] = (np.zeros((20, 3)), np.tile((LANDMARKS_52 / 56 - 1).ravel(), 2))
    detector = write_detector(tmp_path / "sizes.onnx", linear, (640, 640))
    pixels = np.zeros((640, 640, 3), np.uint8)
    for (x, y), green in (((0, 0), 255), ((200, 200), 250), ((400, 80), 100), ((400, 400), 180), ((80, 400), 5)):
        pixels[y, x] = (255, green, 0)
    found = faces.Faces(p.model_copy(update={"detector": str(detector), "min_side": 20}))([Image.fromarray(pixels)])[0]
    boxes = [(f.box.left, f.box.top, f.box.right, f.box.bottom) for f in found]
    half = [round(8 * (2.5 + 2 * (green - 127.5) / 128)) for green in (250, 180, 255)]
    assert boxes == [(x - h, x - h, x + h, x + h) if x else (0, 0, h, h) for x, h in zip((200, 400, 0), half, strict=True)]
    assert all(f.box.score == pytest.approx(127.5 / 128) for f in found)


def test_arcface_gets_red_green_blue_from_minus_one_to_one(tmp_path: Path) -> None:
    colours = [Image.new("RGB", (64, 80), colour) for colour in ("red", "white", "black")]
    found = ArcFace(colour_embedder(tmp_path / "e.onnx"), "mrbench.face")(colours)
    assert found == pytest.approx(np.array([[1, -1, -1], [1, 1, 1], [-1, -1, -1]]), abs=1e-5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three shards of two images with faces of four colours, larger and smaller ones."""
    pictures = [
        scene((48, 32, 32, "white"), (160, 64, 32, "blue")), scene((96, 96, 32, "lime")), scene(),
        scene((16, 32, 32, "blue")), scene((160, 96, 32, "yellow"), (16, 16, 32, "white")), scene((64, 64, 32, "white")),
    ]  # fmt: skip
    folder, rows = tmp_path / "images", []
    for number in range(3):
        own = pictures[2 * number : 2 * number + 2]
        places = write_shard(folder / f"images-{number:05d}.tar", [to_png(image) for image in own])
        rows += [{**dict.fromkeys(IMAGE_COLUMNS, ""), "width": 256, "height": 160, **place} for place in places]
    write_table(folder / "images.parquet", pl.DataFrame(rows).select(IMAGE_COLUMNS))
    return folder


def test_embed_gives_faces_rows_of_their_own_and_changes_no_other(images: Path, tmp_path: Path, p: Faces) -> None:
    plain = Embed(batch=2, workers=1, images=None, texts=None, subjects=None)
    p = p.model_copy(update={"detector": str(patch_detector(tmp_path / "d256.onnx", (256, 256)))})
    with_faces = plain.model_copy(update={"faces": p})
    assert embed(plain, images, tmp_path / "plain", tmp_path / "work") == {"image": 6}
    assert embed(with_faces, images, tmp_path / "faces", tmp_path / "work") == {"face": 7, "image": 6}
    for space in ("subject", "style", "text"):
        before, after = (read_space(tmp_path / name, space, "image", tmp_path / "v.npy") for name in ("plain", "faces"))
        assert before[0].equals(after[0]) and np.array_equal(before[1], after[1])
        rows = read_table(tmp_path / "faces" / "rows-00000.parquet")
        assert np.isnan(np.load(tmp_path / "faces" / f"{space}-00000.npy")[(rows["part"] == "face").to_numpy()]).all()
    table, vectors = read_space(tmp_path / "faces", "face", "face", tmp_path / "v.npy")
    assert table["score"].min() > 0.5 and (table["right"] - table["left"]).to_list() == [16] * 7
    assert np.linalg.norm(np.asarray(vectors, float), axis=1) == pytest.approx(1, abs=1e-3)


def test_identity_groups_are_of_the_largest_faces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve people in four images each; in each a smaller face of another one, which would tie them all together."""
    rng = np.random.default_rng(2)
    people = np.linalg.qr(rng.normal(size=(64, 12)))[0].T
    rows, vectors = [], []
    for i in range(48):
        for person, side in ((i % 12, 60 + i % 5), ((i * 5 + 1) % 12, 40)):
            left = int(rng.integers(0, 40))
            rows.append((f"{i:02d}", "face", left, left, left + side, left + side, 0.9))
            v = people[person] + 0.06 * rng.normal(size=64)
            vectors.append(v / np.linalg.norm(v))
    shuffled = rng.permutation(len(rows))
    types = (pl.String, pl.String, *[pl.Int32] * 4, pl.Float32)
    schema = dict(zip(ROW_COLUMNS, types, strict=True))
    for number, part in enumerate(np.array_split(shuffled, 3)):
        write_table(tmp_path / "e" / f"rows-{number:05d}.parquet", pl.DataFrame([rows[i] for i in part], schema=schema, orient="row"))
        np.save(tmp_path / "e" / f"face-{number:05d}.npy", np.float16([vectors[i] for i in part]))
    likeness = Likeness(threshold=0.4, near_duplicate=0.999, neighbours=16, min_members=3, max_members=28)
    params = load_params("presets/nano.yaml").group.model_copy(update={"likeness": {"identity": likeness}})
    found = learned_groups(read_spaces(tmp_path / "e", ["identity"], tmp_path / "work"), params, tmp_path / "work", 0)
    assert sorted(found["members"].to_list()) == [[f"{i:02d}" for i in range(person, 48, 12)] for person in range(12)]
    assert set(found["kind"]) == {"identity"} and found["cohesion"].min() > 0.7
    assert read_spaces(tmp_path / "none", ["identity"], tmp_path / "work") == {}
    assert "identity: no faces in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "no such ONNX file; give embed.faces one that is SCRFD"),
        ("text", "ONNX Runtime cannot open it"),
        ("swapped", r"1 outputs; embed.faces wants SCRFD with landmarks, as det_10g.onnx \(9 outputs\)"),
        ("widths", "for 512 anchors; scores, boxes, five landmarks are wanted"),
        ("cuda", "ONNX Runtime took no CUDAExecutionProvider; install what it needs"),
    ],
)
def test_a_wrong_file_is_one_line(p: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str) -> None:
    path = tmp_path / "wrong.onnx"
    if fault == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif fault == "swapped":
        colour_embedder(path)
    elif fault == "widths":
        linear = {(s, w): (np.zeros((2 * w, 3)), np.zeros(2 * w)) for s in STRIDES for w in WIDTHS}
        monkeypatch.setattr(f"{__name__}.WIDTHS", (1, 10, 4))  # the graph's order of its outputs
        write_detector(path, linear)
    elif fault == "cuda":
        patch_detector(path)
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has it")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        faces.Faces(p.model_copy(update={"detector": str(path)}))
    assert "\n" not in str(error.value)


def test_a_detector_is_no_embedder(p: Faces) -> None:
    with pytest.raises(ValueError, match="9 outputs; embed.faces wants ArcFace"):
        faces.Faces(p.model_copy(update={"embedder": p.detector}))

"""`easyref serve` in a process of its own: drawings, limits, the queue, who is served; the same bits as `generate`."""

import asyncio
import base64
import gc
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from easyref.data.shards import ImageStore
from easyref.drawing import Artist, Reference, Settings, Wish
from easyref.records import sha256_bytes
from easyref.serve import check_host, create_app
from tests.serving import CHECKPOINT, running

LINES = {"Accept": "application/x-ndjson"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("serve", tmp_path_factory.mktemp("serve") / "log", "--max-waiting", "1") as address:
        yield address


@pytest.fixture(scope="module")
def image() -> bytes:
    store, buffer = ImageStore(Path("data/images")), io.BytesIO()
    store.image(next(iter(store.rows))).save(buffer, "PNG")
    return buffer.getvalue()


def ask(url: str, data: bytes | dict | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON (lines of it where asked for) and headers of the answer."""
    if isinstance(data, dict):
        data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"} | headers
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        lines = [json.loads(line) for line in answer.read().decode().splitlines()]
        return answer.status, lines if "Accept" in headers else lines[0], answer.headers


def idle(server: str) -> None:
    for _ in range(600):
        if ask(f"{server}/health")[1] == {"status": "ok", "drawing": 0, "waiting": 0}:
            return
        time.sleep(0.2)
    raise AssertionError("a drawing does not end")


@pytest.mark.long
def test_the_same_bits_as_here(server: str, image: bytes) -> None:
    """Two references, one uploaded and one in the request; the stream tells each step; settings come back when uploaded."""
    other = Image.open(io.BytesIO(image)).rotate(90)
    buffer = io.BytesIO()
    other.save(buffer, "PNG")
    status, kept, _ = ask(f"{server}/references?name=%2Fsecret%2Fa.png", image)
    assert (status, kept["name"], kept["sha256"], kept["settings"]) == (200, "a.png", sha256_bytes(image), None)
    assert ask(f"{server}/references/{kept['sha256']}")[1] == kept
    assert ask(f"{server}/references/{'0' * 64}")[0] == 404
    asked = {"prompt": "cat face", "negative_prompt": "robot", "steps": 3, "seed": 5, "num": 2, "weights": [2.0, 1.0]}
    controls = {"scale": {"up_blocks": 1.5, "mid_block": 1.0}, "window": [0.0, 0.7], "width": 96, "height": 64}
    asked |= controls | {"negative_references": [kept["sha256"]]}
    asked |= {"references": [kept["sha256"], base64.b64encode(buffer.getvalue()).decode()]}
    status, events, _ = ask(f"{server}/generate", asked, **LINES)
    assert status == 200 and events[0] == {"ahead": 0}
    assert [event["step"] for event in events if "step" in event] == [0, 1, 2, 3]
    made = [base64.b64decode(one["image"]) for one in events[-1]["images"]]
    torch.set_num_threads(1)
    artist = Artist.load(CHECKPOINT, "pretrain")
    references = [Reference.read(image, "a.png", 2.0), Reference.read(buffer.getvalue(), "references[1]", 1.0)]
    references.append(Reference.read(image, "a.png", negative=True))
    assert made == artist.draw(Wish.of(prompt="cat face", negative_prompt="robot", steps=3, **controls), references, [5, 6])
    settings = ask(f"{server}/references", made[1])[1]["settings"]
    assert Settings.model_validate(settings) == Settings.read(made[1])
    about = ask(f"{server}/model")[1]
    assert about["sha256"] == artist.sha256 == settings["model_sha256"]
    assert about["side"] == 64 and about["blocks"] == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    first, second = (ask(f"{server}/generate", {"prompt": "star", "steps": 1})[1]["images"][0] for _ in range(2))
    assert first["seed"] != second["seed"]


@pytest.mark.long
def test_what_is_wrong_is_one_line(server: str, image: bytes) -> None:
    for data, status, message in (
        ({"steps": 0}, 400, "steps 0: out of 1 to 200"),
        ({"num": 9}, 400, "num 9: out of 1 to 8"),
        ({"seed": -1}, 400, "seed -1: out of"),
        ({"references": ["/etc/passwd"]}, 400, r"references\[0\]: not base64"),
        ({"references": ["aGVsbG8="]}, 400, r"references\[0\]: not an image"),
        ({"references": ["ab" * 32]}, 400, r"references\[0\]: uploaded once, and not here any more; upload it again"),
        ({"references": [base64.b64encode(image).decode()], "weights": [0.0]}, 400, r"weights \[0.0\] of the references"),
        ({"references": ["x"] * 33}, 400, "references: 33, at most 32"),
        ({"negative_references": ["x"] * 33}, 400, "negative_references: 33, at most 32"),
        ({"negative_references": ["aGVsbG8="]}, 400, r"negative_references\[0\]: not an image"),
        ({"scale": {"up_blocks.7": 1}}, 400, "no cross-attention starts with 'up_blocks.7'"),
        ({"scale": {"mid_block": 11}}, 400, "scale: give a number from 0 to 10"),
        ({"window": [0.5, 0.2]}, 400, "window .*: ends before it starts"),
        ({"window": [0.5]}, 400, "window.1: Field required"),
        ({"width": 4096}, 400, "width 4096: give a multiple of 8 from 32 to 128"),
        ({"prompt": "very long " * 300}, 400, "prompt of .* tokens is over the text encoder's limit"),
        ({"prompt": "x" * 10**7}, 400, "prompt: String should have at most 10000 characters"),
        ({"negative_prompt": "x" * 10**7}, 400, "negative_prompt: String should have at most 10000 characters"),
        ({"guidance_scale": 9}, 422, "guidance_scale: Extra inputs are not permitted"),
        ({"prompt": 3}, 422, "prompt: Input should be a valid string"),
        ({"prompt": "x" * (65 * 2**20)}, 413, "over 64 MiB"),
    ):
        found = ask(f"{server}/generate", data)
        assert found[0] == status and re.match(message, found[1]["error"]) and len(found[1]["error"].splitlines()) == 1, found
    for data, status, message in (
        (b"hello", 400, "x.png: not an image"),
        (b"", 400, "x.png: an empty file"),
        (image[:900], 400, "broken"),
    ):
        found = ask(f"{server}/references?name=x.png", data)
        assert found[0] == status and message in found[1]["error"], found
    assert ask(f"{server}/nothing")[0] == 404 and ask(f"{server}/")[0] == 404


@pytest.mark.long
def test_too_many_are_told_when_to_come_again_and_who_leaves_stops_drawing(server: str) -> None:
    slow = {"prompt": "star", "steps": 200, "num": 8}
    idle(server)
    first = urllib.request.Request(f"{server}/generate", json.dumps(slow).encode(), {"Content-Type": "application/json"} | LINES)
    with urllib.request.urlopen(first, timeout=300) as drawing, ThreadPoolExecutor(1) as pool:
        while b'"step":1' not in drawing.readline():
            pass
        waits = pool.submit(ask, f"{server}/generate", {"prompt": "star", "steps": 1}, **LINES)
        while ask(f"{server}/health")[1]["waiting"] != 1:
            time.sleep(0.05)
        status, answer, headers = ask(f"{server}/generate", {"prompt": "star", "steps": 1})
        assert status == 503 and "too many wait" in answer["error"] and int(headers["Retry-After"]) >= 1
        begin = time.monotonic()
        drawing.close()
        _, events, _ = waits.result()
    assert events[0] == {"ahead": 1} and "images" in events[-1]
    idle(server)
    assert time.monotonic() - begin < 60  # 200 steps of 8 images take minutes


@pytest.mark.long
def test_pages_of_others_are_refused(server: str) -> None:
    port = server.rsplit(":", 1)[1]
    assert ask(f"{server}/health", Host=f"localhost:{port}")[0] == 200
    assert ask(f"{server}/health", Host=f"evil.example:{port}")[0] == 403
    assert ask(f"{server}/generate", {"steps": 1}, Origin="http://evil.example")[0] == 403
    assert ask(f"{server}/generate", {"steps": 1}, Origin="null")[0] == 403
    assert ask(f"{server}/health", Origin=server)[0] == 200
    assert ask(f"{server}/health", Host="[::1")[0] == 403 and ask(f"{server}/health", Origin="http://[")[0] == 403


@pytest.mark.long
def test_other_machines_need_the_token(tmp_path: Path) -> None:
    with running("serve", tmp_path / "log", "--host", "0.0.0.0", EASYREF_TOKEN="sécret") as address:
        here = address.replace("0.0.0.0", "127.0.0.1")
        basic = base64.b64encode("anyone:sécret".encode()).decode()
        assert ask(f"{here}/health")[0] == 200
        bearer = "Bearer sécret".encode().decode("latin-1")  # as it goes over the wire
        for given, status in (("", 401), ("Bearer other", 401), ("Basic !", 401), (bearer, 200), (f"Basic {basic}", 200)):
            found = ask(f"{here}/model", Authorization=given)
            assert found[0] == status and ("WWW-Authenticate" in found[2]) == (status == 401)


def test_who_waits_holds_no_pixels() -> None:
    """Sixteen drawings of 28 photographs would be 16 GiB."""

    class Slow:
        name, sha256, max_references, side, blocks = "", "", 28, 64, ()
        begun, go = threading.Event(), threading.Event()

        def check(self, *_: object) -> None:
            pass

        def draw(self, wish: Wish, references: list[Reference], seeds: list[int], step: object) -> list[bytes]:
            self.begun.set()
            assert self.go.wait(60)
            return [b"%d %d" % references[0].image.size]

    async def run() -> tuple[int, list[Any]]:
        app = create_app(Slow(), 9)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            asked = {"references": [base64.b64encode(buffer.getvalue()).decode()], "steps": 1}
            tasks = [asyncio.create_task(client.post("/generate", json=asked)) for _ in range(4)]
            while (await client.get("/health")).json()["waiting"] != 3:
                await asyncio.sleep(0.01)
            while not Slow.begun.is_set():
                await asyncio.sleep(0.01)
            gc.collect()  # what is in a circle only
            held = sum(isinstance(one, Image.Image) and one.size == (77, 78) for one in gc.get_objects())
            Slow.go.set()
            return held, [answer.json()["images"][0]["image"] for answer in await asyncio.gather(*tasks)]

    buffer = io.BytesIO()
    Image.new("RGB", (77, 78)).save(buffer, "PNG")
    gc.collect()
    held, images = asyncio.run(run())
    assert held == 1 and images == [base64.b64encode(b"77 78").decode()] * 4


def test_a_public_host_without_a_token_is_refused() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        check_host(host, None)
    check_host("0.0.0.0", "secret")
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        with pytest.raises(ValueError, match="set EASYREF_TOKEN"):
            check_host(host, None)


def test_images_are_kept_as_they_are(image: bytes) -> None:
    """A thumbnail is no larger than it must be, and has the colours of the file."""
    from easyref.serve import THUMBNAIL, look

    buffer = io.BytesIO()
    Image.new("RGB", (1000, 500), (200, 30, 40)).save(buffer, "BMP")
    found = look("a.bmp", buffer.getvalue())
    shown = Image.open(io.BytesIO(base64.b64decode(found.thumbnail.split(",")[1])))
    assert (found.width, found.height, shown.size) == (1000, 500, (THUMBNAIL, THUMBNAIL // 2))
    assert np.asarray(shown)[0, 0].tolist() == [200, 30, 40]

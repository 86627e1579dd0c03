"""`easyref ui` in headless Chromium with the shipped weights: what a person does, from dropping images to getting settings back."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref.data.shards import ImageStore
from easyref.drawing import Settings
from easyref.records import sha256_file
from tests.serving import running

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no browser (apt install chromium)")]
expect = playwright.expect
expect.set_options(timeout=120_000)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page in a browser that can reach nothing else; no error of the page goes unseen."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with (
        running("ui", tmp_path_factory.mktemp("ui") / "log", "--no-browser") as address,
        playwright.sync_playwright() as play,
        play.chromium.launch(executable_path=CHROMIUM, args=flags) as browser,
    ):
        page, faults = browser.new_page(), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: faults.append(request.url) if not request.url.startswith((address, "blob:", "data:")) else None
        )
        page.goto(address)
        expect(page.locator("#model")).to_contain_text("pretrain")
        yield page
        assert not faults


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, store = tmp_path_factory.mktemp("files"), ImageStore(Path("data/images"))
    for name, sha256 in zip(("a.png", "b.png"), store.rows, strict=False):
        store.image(sha256).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:500])
    return [folder / name for name in ("a.png", "b.png", "broken.png")]


def slide(page: Any, selector: str, value: str) -> None:
    page.locator(selector).fill(value)


def save(page: Any, number: int, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(".save").nth(number).click()
    download.value.save_as(folder / download.value.suggested_filename)
    return folder / download.value.suggested_filename


def test_two_references_to_pictures_and_back(page: Any, files: list[Path], tmp_path: Path) -> None:
    page.set_input_files("#files", files[:2])
    expect(page.locator("#references .tiles li")).to_have_count(2)
    slide(page, "#references .tiles li:nth-child(2) input", "2")
    page.fill("#prompt", "cat face")
    page.fill("#negative_prompt", "robot")
    slide(page, "#steps", "3")
    slide(page, "#scale", "1.5")
    page.fill("#num", "2")
    page.click("#go")
    expect(page.locator("figure img")).to_have_count(2)
    made = save(page, 1, tmp_path)
    seed = int(page.input_value("#seed"))  # random, and shown
    assert made.name == f"easyref-{seed + 1}.png" and Image.open(made).size == (64, 64)
    settings = Settings.read(made)
    assert settings
    assert (settings.prompt, settings.negative_prompt, settings.steps, settings.scale) == ("cat face", "robot", 3, 1.5)
    assert (settings.seed, settings.batch) == (seed + 1, [seed, seed + 1])
    assert [(r.name, r.sha256, r.weight) for r in settings.references] == [
        ("a.png", sha256_file(files[0]), 1.0), ("b.png", sha256_file(files[1]), 2.0)
    ]  # fmt: skip

    page.reload()  # the server still has the references
    expect(page.locator("#model")).to_contain_text("pretrain")
    assert page.locator("#references .tiles li").count() == 0 and page.input_value("#prompt") == ""
    page.set_input_files("#open", made)
    expect(page.locator("#references .tiles li")).to_have_count(2)
    found = [page.input_value(f"#{name}") for name in ("prompt", "negative_prompt", "steps", "scale", "seed")]
    assert found == ["cat face", "robot", "3", "1.5", str(seed + 1)]
    assert [page.locator("#references .tiles input").nth(i).input_value() for i in range(2)] == ["1", "2"]
    page.click("#go")
    expect(page.locator("figure img")).to_have_count(1)
    again = Settings.read(save(page, 0, tmp_path))
    assert again == settings.model_copy(update={"batch": [seed + 1]})


def test_images_to_avoid_and_what_stands_under_more(page: Any, files: list[Path], tmp_path: Path) -> None:
    """Into the picture, and back out of it after the page was loaded again."""
    page.reload()
    expect(page.locator("#model")).to_contain_text("pretrain")
    page.set_input_files("#files", files[0])
    page.set_input_files("#against_files", files[:2])  # one of them is a reference, too
    expect(page.locator("#against li")).to_have_count(2)
    page.fill("#prompt", "star")
    slide(page, "#steps", "2")
    page.click("#more summary")
    page.fill("#width", "96")
    page.fill("#height", "64")
    slide(page, "#window_end", "0.5")
    page.check("#by_block")
    assert page.locator("#blocks label span").all_inner_texts() == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    slide(page, "#blocks label:nth-child(3) input", "2.5")
    page.fill("#num", "1")
    page.click("#go")
    expect(page.locator("figure img")).to_have_count(1)
    made = save(page, 0, tmp_path)
    settings = Settings.read(made)
    assert settings and Image.open(made).size == (96, 64)
    assert settings.window == (0.0, 0.5) and settings.scale == dict.fromkeys(BLOCKS, 1.0) | {"mid_block": 2.5}
    assert [(r.name, r.negative) for r in settings.references] == [("a.png", False), ("a.png", True), ("b.png", True)]

    page.reload()
    expect(page.locator("#model")).to_contain_text("pretrain")
    page.set_input_files("#open", made)
    expect(page.locator("#against li")).to_have_count(2)
    expect(page.locator("#references li")).to_have_count(1)
    page.click("#go")
    expect(page.locator("figure img")).to_have_count(1)
    assert Settings.read(save(page, 0, tmp_path)) == settings

    page.fill("#width", "90")
    page.click("#more summary")  # closed: the browser shows the field all the same
    page.click("#go")
    expect(page.locator("#width")).to_be_visible()
    page.fill("#width", "64")
    slide(page, "#guidance", "1")
    page.click("#go")
    expect(page.locator("#notice")).to_have_text("negative references do nothing at guidance 1; raise it, or leave them out")
    page.reload()
    expect(page.locator("#model")).to_contain_text("pretrain")


def test_what_is_wrong_is_said_in_one_line(page: Any, files: list[Path], tmp_path: Path) -> None:
    before = page.locator("#references .tiles li").count()
    page.set_input_files("#files", files[2])
    expect(page.locator("#notice")).to_contain_text("broken.png: broken image data")
    (tmp_path / "text.png").write_text("hello")
    page.set_input_files("#files", [files[2], tmp_path / "text.png"])
    expect(page.locator("#notice")).to_have_text(re.compile("broken.png: broken image data.* · text.png: not an image"))
    page.set_input_files("#open", files[0])
    expect(page.locator("#notice")).to_contain_text("a.png: no settings in it")
    assert page.locator("#references .tiles li").count() == before
    page.fill("#prompt", "very long " * 200)
    page.click("#go")
    expect(page.locator("#notice")).to_contain_text("over the text encoder's limit")
    expect(page.locator("#go")).to_be_enabled()
    page.fill("#prompt", "star")


def test_weights_by_keyboard_and_mouse(page: Any, files: list[Path]) -> None:
    page.reload()
    page.set_input_files("#files", files[:2])
    sliders = page.locator("#references .tiles input")
    expect(sliders).to_have_count(2)
    sliders.nth(0).focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert sliders.nth(0).input_value() == "1.3"
    box = sliders.nth(1).bounding_box()
    place = lambda share: (box["x"] + share * box["width"], box["y"] + box["height"] / 2)  # noqa: E731
    page.mouse.move(*place(1 / 3))
    page.mouse.down()
    page.mouse.move(*place(1), steps=5)
    page.mouse.up()
    assert sliders.nth(1).input_value() == "3"
    assert page.locator("#references .weight").all_inner_texts() == ["×1.3", "×3.0"]


def test_every_button_is_reached_by_keyboard(page: Any, files: list[Path]) -> None:
    page.reload()
    expect(page.locator("#model")).to_contain_text("pretrain")
    for name, tiles in (("open", 0), ("files", 1), ("against_files", 2)):
        page.locator(f"#{name}").focus()
        chosen: list[Any] = []

        def keep(chooser: Any, chosen: list[Any] = chosen) -> None:
            chosen.append(chooser)

        page.once("filechooser", keep)
        for _ in range(20):  # headless Chromium leaves out a chooser that is asked for right after another one
            page.keyboard.press("Enter")
            page.wait_for_timeout(500)
            if chosen:
                break
        chosen[0].set_files(files[0])
        expect(page.locator("#notice")).to_be_visible(visible=name == "open")  # that it has no settings
        expect(page.locator(".tiles li")).to_have_count(tiles)


def test_a_server_that_dies_and_words_that_are_dropped(page: Any) -> None:
    """A stream that ends in the middle, as the browser tells it; text that is dragged into the prompt stays the browser's."""
    torn = """new ReadableStream({ start(c) {
        c.enqueue(new TextEncoder().encode('{"ahead":0}' + String.fromCharCode(10))); c.error(new TypeError('network error'))
    } })"""
    page.evaluate(f"window.fetch = async () => new Response({torn})")
    page.click("#go")
    expect(page.locator("#notice")).to_have_text("The server stopped in the middle; look at its log.")
    drop = """place => {
        const dragged = new DataTransfer(); dragged.setData('text/plain', 'words')
        const event = new DragEvent('drop', { dataTransfer: dragged, bubbles: true, cancelable: true })
        document.querySelector(place).dispatchEvent(event); return event.defaultPrevented
    }"""
    assert not page.evaluate(drop, "#prompt") and page.evaluate(drop, "#gallery")
    page.reload()
    expect(page.locator("#model")).to_contain_text("pretrain")


def test_a_lost_reference_is_asked_for_and_takes_its_place(page: Any, files: list[Path], tmp_path: Path) -> None:
    """Another server, that has never seen the references: the picture says which are missing."""
    from PIL.PngImagePlugin import PngInfo

    lost = Image.effect_noise((32, 32), 60).convert("RGB")
    lost.save(tmp_path / "lost.png")
    text = Settings(
        prompt="star", guidance=2.345, scale=4.2, seed=1, batch=[1], width=64, height=64, model="m", model_sha256="",
        backend="torch", made_with="",
        references=[
            {"name": "lost.png", "sha256": sha256_file(tmp_path / "lost.png"), "weight": 0.5},
            {"name": "a.png", "sha256": sha256_file(files[0]), "weight": 3},
        ],
    ).model_dump_json()  # fmt: skip
    chunks = PngInfo()
    chunks.add_itxt("easyref", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", pnginfo=chunks)
    page.set_input_files("#files", files[0])
    page.set_input_files("#open", tmp_path / "picture.png")
    expect(page.locator("#notice")).to_have_text("To draw it again, add its references too: lost.png")
    assert (page.input_value("#guidance"), page.input_value("#scale")) == ("2.345", "4.2")  # off and beyond the sliders
    page.set_input_files("#files", tmp_path / "lost.png")
    expect(page.locator("#references .tiles li")).to_have_count(2)
    expect(page.locator("#notice")).to_be_hidden()
    assert [page.locator("#references .tiles input").nth(i).input_value() for i in range(2)] == ["0.5", "3"]


def test_cancel(page: Any) -> None:
    count = page.locator("article").count()
    slide(page, "#steps", "100")
    page.fill("#num", "8")
    page.click("#go")
    expect(page.locator(".stage")).to_contain_text("Step")
    page.click(".cancel")
    expect(page.locator("article")).to_have_count(count)
    expect(page.locator("#go")).to_be_enabled()
    slide(page, "#steps", "1")
    page.fill("#num", "1")
    page.click("#go")
    expect(page.locator("article figure")).to_have_count(count + 1)

"""Real, openly licensed art for the nano preset: five emoji sets, rendered from SVG with exact labels.

Sources are five npm packages at pinned versions and checksums. A concept is identified by its Unicode code points, not by
its English name (names differ between generations): the skin-tone modifiers, the gender signs and the direction arrow
are taken out, so that all drawings of one role or thing share one `concept`, and the split can keep them together.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from easyref.images import to_png, to_rgb
from easyref.records import sha256_file


@dataclass(frozen=True)
class EmojiSet:
    style: str
    package: str
    version: str
    sha256: str
    licence: str


SETS = (
    EmojiSet("noto", "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
    EmojiSet("twemoji", "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
    EmojiSet("fluent", "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"),
    EmojiSet("notov1", "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0"),
    EmojiSet("emojione", "emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0"),
)
TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
MAN, WOMAN, PERSON = {"1f468", "2642"}, {"1f469", "2640"}, "1f9d1"
#: Symbols without a picture, flags (one rectangle each) and clock faces (24 nearly equal drawings) teach nothing here.
LEFT_OUT = re.compile(r"^flag|flag$|keycap|oclock|-thirty$|^(letter|regional-indicator|japanese|input|digit)-")
_TONE_IN_NAME = re.compile(r"-(medium-light|medium-dark|medium|light|dark)(-skin-tone|$)|-tone[1-5]$")
_GENDER_IN_NAME = re.compile(r"^(man|woman|person|men|women|people)-(?!and-)(with-|in-)?")


def fetch(emoji_set: EmojiSet, folder: Path) -> Path:
    """The package's tarball in `folder`, packed by npm when it is not there; its checksum is always verified."""
    target = folder / f"iconify-json-{emoji_set.package}-{emoji_set.version}.tgz"
    spec = f"@iconify-json/{emoji_set.package}@{emoji_set.version}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = ["npm", "pack", spec, "--silent", "--pack-destination", temporary]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            except FileNotFoundError as error:
                raise RuntimeError("npm: not found; install Node.js, or get the rendered images with `dvc pull ingest`") from error
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"npm pack {spec}: no answer in {error.timeout:g} s; try again, or `dvc pull ingest`") from error
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"npm pack {spec} failed: {error.stderr.strip()[-200:]}") from error
            next(Path(temporary).glob("*.tgz")).replace(target)
    if (found := sha256_file(target)) != emoji_set.sha256:
        raise ValueError(f"{target}: sha256 is {found}, expected {emoji_set.sha256}; delete the file and try again")
    return target


@dataclass(frozen=True)
class Icon:
    """One drawing before it is rendered: its SVG and its labels."""

    name: str
    svg: str
    code: tuple[str, ...]
    category: str
    style: str
    licence: str


def read_icons(archives: dict[EmojiSet, Path]) -> list[Icon]:
    """All drawings of all sets that have a code point, in a fixed order. Names of sets without code points are looked up
    in the others; a name nobody knows is left out (it might be a held-out concept under another name)."""
    contents = {s: _members(path) for s, path in archives.items()}
    codes: dict[str, str] = {}
    categories: dict[str, str] = {}
    for content in contents.values():
        by_name = {name: code for code, name in content["chars"].items()}
        for alias, target in content["icons"].get("aliases", {}).items():
            if target["parent"] in by_name and not target.get("hFlip"):
                by_name.setdefault(alias, by_name[target["parent"]])
        for name, code in by_name.items():
            codes.setdefault(name, code)
    for content in contents.values():
        if "Smileys & Emotion" in content["categories"]:
            for category, names in content["categories"].items():
                categories.update({codes[n]: category for n in names if n in codes and codes[n] not in categories})
    icons = []
    for emoji_set, content in contents.items():
        own = {name: code for code, name in content["chars"].items()}
        width, height = content["icons"].get("width", 16), content["icons"].get("height", 16)
        for name, icon in sorted(content["icons"]["icons"].items()):
            code = own.get(name) or (None if content["chars"] else codes.get(name))
            if code is None or LEFT_OUT.search(name) or categories.get(code) == "Flags" or icon.get("hidden"):
                continue
            w, h = icon.get("width", width), icon.get("height", height)
            left, top = icon.get("left", 0), icon.get("top", 0)
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {w} {h}">{icon["body"]}</svg>'
            code_points = tuple(c for c in code.split("-") if c != "fe0f")
            if sum(c in TONES for c in code_points) > 1 or (len(code_points) == 1 and code_points[0] in TONES):
                continue  # couples with two tones have no single exact label; a bare tone is a swatch
            category = categories.get(code, "Other")
            icons.append(Icon(name, svg, code_points, category, emoji_set.style, emoji_set.licence))
    return icons


def labels(icon: Icon) -> dict[str, str]:
    """Exact labels of a drawing: concept id, subject words, gender, tone, style, category."""
    tone = next((TONES[c] for c in icon.code if c in TONES), "")
    plain = [c for c in icon.code if c not in TONES]
    gender_signs = [c for c in plain if c in MAN | WOMAN]
    single = (len(gender_signs) == 1 and gender_signs != plain) or plain in (["1f468"], ["1f469"])
    gender = ("man" if gender_signs[0] in MAN else "woman") if single else ""
    subject = _TONE_IN_NAME.sub("", icon.name) if tone else icon.name
    if single:
        plain = [PERSON if c in ("1f468", "1f469") else c for c in plain if c not in ("2642", "2640")]
        subject = _GENDER_IN_NAME.sub("", subject)
    elif plain[:1] == [PERSON] or subject.startswith("person-"):
        gender, subject = "person", _GENDER_IN_NAME.sub("", subject)
    joined = [c for c in plain if c not in ("200d", "27a1")] or plain
    concept = "-".join(joined)
    subject = subject.replace("-facing-right", "").replace("-", " ").strip() or "person"
    return {
        "concept": concept, "subject": subject, "gender": gender, "tone": tone,
        "style": icon.style, "category": icon.category,
    }  # fmt: skip


def render(icon: Icon, size: int, palette: int) -> tuple[bytes, str]:
    """The drawing as PNG bytes (`size`×`size`, white background, `palette` colours) and its main colours in words."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=icon.svg, width=2 * size, height=2 * size))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (2 * size, 2 * size):
        square = Image.new("RGBA", (2 * size, 2 * size))
        square.paste(image, ((2 * size - image.width) // 2, (2 * size - image.height) // 2))
        image = square
    small = image.resize((size, size), Image.Resampling.BOX)
    return to_png(to_rgb(small), palette), " ".join(color_words(small))


def color_words(rgba: Image.Image, most: int = 3, least_share: float = 0.08) -> list[str]:
    """Up to `most` basic colour terms that cover at least `least_share` of the opaque pixels, largest first."""
    pixels: Any = np.asarray(rgba, dtype=np.float32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 127][:, :3] / 255
    if len(pixels) == 0:
        return []
    high, low = pixels.max(1), pixels.min(1)
    chroma = high - low
    r, g, b = pixels.T
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select([high == r, high == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4) * 60
    gray = chroma < 0.12
    names = np.select(
        [gray & (high > 0.85), gray & (high < 0.3), gray, (hue < 45) & (high < 0.65), (hue < 14) | (hue >= 345), hue < 38,
         hue < 70, hue < 160, hue < 195, hue < 255, hue < 290],
        ["white", "black", "gray", "brown", "red", "orange", "yellow", "green", "teal", "blue", "purple"], "pink",
    )  # fmt: skip
    values, counts = np.unique(names, return_counts=True)
    order = sorted(range(len(values)), key=lambda i: (-counts[i], values[i]))
    return [str(values[i]) for i in order if counts[i] >= least_share * len(pixels)][:most]


def _members(path: Path) -> dict:
    with tarfile.open(path) as tar:
        names = tar.getnames()

        def member(name: str) -> dict:
            file = tar.extractfile(name)
            if file is None:
                raise ValueError(f"{path}: member {name} is not a file")
            return json.load(file)

        chars = member("package/chars.json") if "package/chars.json" in names else {}
        metadata = member("package/metadata.json")
        return {"icons": member("package/icons.json"), "chars": chars, "categories": metadata["categories"]}

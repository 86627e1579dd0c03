"""One drawing: what is asked for, and PNG files that say how they were made.

`easyref generate`, `easyref ui`, `easyref serve` and the model in MLflow all draw through an `Artist`. The settings stand in the PNG as
text (`easyref`, JSON). With them and the same reference files the same machine draws the same bits again.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from easyref.images import open_image, png_text, to_png
from easyref.records import sha256_bytes, sha256_file

if TYPE_CHECKING:
    from PIL import Image

    from easyref.runtime import Engines

MAX_REQUESTS, MAX_REFERENCES, MAX_STEPS, MAX_SEED = 16, 32, 200, 2**63 - 1
MAX_BATCH = 8  # images that are drawn together
MAX_SCALE, MAX_NAMES = 10, 256  # of the references; of a scale by block
PNG_KEY = "easyref"
Share = Annotated[float, Field(ge=0, le=1)]
Prompt = Annotated[str, Field(max_length=10_000)]  # text encoders take some 77 tokens; a megabyte is a second of counting them
Side = Annotated[int, Field(ge=8, le=8192)]  # pixels; the model has narrower bounds


class Wish(BaseModel):
    """What to draw, and how; the references and the seed apart.

    `scale`: of the references, everywhere or by block (`{"up_blocks.0": 1.5}`; a block that is not named gets none). `window`: the
    share of the steps in which they count. `width`, `height`: pixels; the model's own if not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Prompt = ""
    negative_prompt: Prompt = ""
    steps: int = Field(default=30, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=1, le=50)
    scale: float | dict[str, float] = 1.0
    window: tuple[Share, Share] = (0.0, 1.0)
    width: Side | None = None
    height: Side | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        scales = list(self.scale.values()) if isinstance(self.scale, dict) else [self.scale]
        if not 0 < len(scales) <= MAX_NAMES or not all(0 <= scale <= MAX_SCALE for scale in scales):
            raise ValueError(f"scale: give a number from 0 to {MAX_SCALE}, or one for each of at most {MAX_NAMES} blocks")
        if self.window[0] > self.window[1]:
            raise ValueError(f"window {self.window}: ends before it starts")
        return self

    @classmethod
    def of(cls, **values: Any) -> Wish:
        """ValueError in one line."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(one_line(error)) from error


def parse_scale(text: str) -> float | dict[str, float]:
    """`1.5`, or by block `down_blocks=0.5,up_blocks.0=1.5`. ValueError in one line."""
    try:
        if "=" not in text:
            return float(text)
        return {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ValueError(f"--scale {text!r}: give a number, or numbers by block such as down_blocks=0.5,up_blocks.0=1.5") from error


def one_line(error: ValidationError) -> str:
    """Where a fault is, and what it is."""
    fault = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union the type that fits best
    where = ".".join(str(part) for part in fault["loc"] if "float" not in str(part))  # without names of types
    return f"{where}: {fault['msg']}" if where else fault["msg"].removeprefix("Value error, ")


class UsedReference(BaseModel):
    """`name` is the file's, without its folder; `sha256` is of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str
    weight: float
    negative: bool = False


class Settings(Wish):
    """How a PNG was made. `batch`: the seeds that were drawn together, on which the last bits depend."""

    seed: int
    batch: list[int]
    references: list[UsedReference]
    width: Side
    height: Side
    model: str
    model_sha256: str
    backend: str
    precision: str = "fp32"
    made_with: str

    @model_validator(mode="after")
    def _drawn(self) -> Settings:
        if self.seed not in self.batch or len(self.batch) > MAX_BATCH:
            raise ValueError(f"seed {self.seed} is not one of at most {MAX_BATCH} in batch")
        return self

    @classmethod
    def read(cls, source: Path | bytes, name: str = "") -> Settings | None:
        """Of a PNG; None where nothing says that easyref drew it. ImageError, ValueError in one line: no image, or torn settings."""
        text = png_text(source, PNG_KEY, name)
        if text is None:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            said = name or (str(source) if isinstance(source, Path) else "image")
            raise ValueError(f"{said}: settings of another version of easyref: {one_line(error)}") from error


@dataclass(frozen=True)
class Reference:
    """`negative`: what the picture is led away from."""

    name: str
    sha256: str
    image: Image.Image
    weight: float = 1.0
    negative: bool = False

    @classmethod
    def read(cls, source: Path | bytes, name: str = "", weight: float = 1.0, negative: bool = False) -> Reference:
        """From an image file or its bytes. ImageError if it is none."""
        image = open_image(source, name)
        if isinstance(source, bytes):
            return cls(name, sha256_bytes(source), image, weight, negative)
        return cls(source.name, sha256_file(source), image, weight, negative)


def find(used: Sequence[UsedReference], given: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    """The files that were used, in order: those `given`, or of that name in `folders`. FileNotFoundError names the first not found."""
    by_name = [folder / Path(one.name).name for folder in folders for one in used]
    files = {sha256_file(path): path for path in [*given, *by_name] if path.is_file()}
    for one in used:
        if one.sha256 not in files:
            raise FileNotFoundError(f"{one.name} (sha256 {one.sha256[:12]}…), a reference of the picture: not here; name it with --ref")
    return [files[one.sha256] for one in used]


class Artist:
    """A loaded model that signs what it draws."""

    def __init__(self, easyref: Any, folder: Path, name: str, backend: str = "torch", precision: str = "fp32") -> None:
        from easyref.model.weights import WEIGHTS

        self.easyref, self.name, self.backend, self.precision = easyref, name, backend, precision
        self.sha256 = sha256_file(folder / WEIGHTS)
        self.max_references: int = min(easyref.encoder.config.max_references, MAX_REFERENCES)
        self.side: int = easyref.side
        self.blocks = easyref.blocks

    @classmethod
    def load(
        cls, folder: Path, name: str, engines: Engines | None = None, backend: str = "torch", precision: str = "fp32",
        base: Path | None = None,
    ) -> Artist:  # fmt: skip
        """Of a checkpoint folder; `name` goes into the pictures. `precision`: fp32 or bf16, of the weights without `engines`."""
        import torch

        from easyref.pipeline import EasyRef

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return cls(EasyRef.from_pretrained(folder, base, dtype, engines, cache=True), folder, name, backend, precision)

    def check(self, wish: Wish, references: Sequence[Reference]) -> None:
        """ValueError in one line for what would fail in the middle of the work."""
        from easyref.model.reference import check_weights

        positive, negative = _parted(references)
        for kind, some in (("references", positive), ("negative references", negative)):
            if len(some) > self.max_references:
                raise ValueError(f"{len(some)} {kind}, the model takes at most {self.max_references}; give fewer")
        if positive:
            check_weights([reference.weight for reference in positive])
        if negative and wish.guidance <= 1:
            raise ValueError("negative references do nothing at guidance 1; raise it, or leave them out")
        self.easyref.check(wish.scale, wish.height, wish.width)
        self.easyref.check_prompt(wish.prompt)
        self.easyref.check_prompt(wish.negative_prompt)

    def draw(
        self, wish: Wish, references: Sequence[Reference], seeds: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> list[bytes]:
        """PNG files, one a seed, drawn together. `on_step` is told how many steps are done; what it raises ends the drawing."""
        from easyref.pipeline import Request

        self.check(wish, references)
        positive, negative = _parted(references)
        images, weights, against = [r.image for r in positive], [r.weight for r in positive], [r.image for r in negative]
        given = None if all(weight == 1.0 for weight in weights) else weights
        requests = [Request(wish.prompt, images, seed, wish.negative_prompt, given, against) for seed in seeds]

        def step(_pipe: Any, number: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
            if on_step:
                on_step(number + 1)
            return given

        drawn = self.easyref(
            requests, wish.steps, wish.guidance, wish.scale, wish.height, wish.width, wish.window, callback_on_step_end=step
        )
        used = [UsedReference(name=r.name, sha256=r.sha256, weight=r.weight, negative=r.negative) for r in references]
        pairs = zip(seeds, drawn, strict=True)
        return [to_png(image, text={PNG_KEY: self._settings(wish, used, seed, seeds, image)}) for seed, image in pairs]

    def _settings(self, wish: Wish, used: list[UsedReference], seed: int, seeds: Sequence[int], image: Image.Image) -> str:
        return Settings(
            **wish.model_dump(exclude={"width", "height"}), seed=seed, batch=list(seeds), references=used, width=image.width,
            height=image.height, model=self.name, model_sha256=self.sha256, backend=self.backend,
            precision=self.precision, made_with=f"easyref {version('easyref')}, torch {version('torch')}",
        ).model_dump_json()  # fmt: skip


def _parted(references: Sequence[Reference]) -> tuple[list[Reference], list[Reference]]:
    """What the picture shall be like, and what it is led away from."""
    return [r for r in references if not r.negative], [r for r in references if r.negative]


class GenerateRequest(BaseModel):
    """One image to make, as asked for over HTTP."""

    model_config = ConfigDict(extra="forbid")  # an option of another name would have no effect

    references: list[str] = Field(description="base64 of image files, or paths below EASYREF_REFERENCES")
    prompt: str
    weights: list[float] | None = Field(default=None, description="how much each reference counts; 1 each if not given")
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scale: float | dict[str, float] | None = Field(default=None, description="of the references; or by block, others get none")
    negative_references: list[str] | None = Field(default=None, description="what the picture is led away from")
    window: list[float] | None = Field(default=None, description="the share of the steps in which references count, as [0, 0.6]")
    width: int | None = None
    height: int | None = None

    def wish(self) -> Wish:
        """With defaults, within limits. ValueError in one line."""
        for name, low, high in (("steps", 1, MAX_STEPS), ("guidance", 1, 50), ("seed", 0, MAX_SEED)):
            if (value := getattr(self, name)) is not None:
                within(name, value, low, high)
        return Wish.of(**{name: value for name in Wish.model_fields if (value := getattr(self, name)) is not None})

    def read(self, known: Callable[[str], tuple[str, bytes] | None] = lambda _: None) -> list[Reference]:
        """The references, then the negative ones. `known`: name and bytes of a file that is there already, by what stands for it."""
        weights = self.weights or [1.0] * len(self.references)
        if len(weights) != len(self.references):
            raise ValueError(f"{len(weights)} weights for {len(self.references)} references; give one for each")
        against = self.negative_references or []
        found = []
        for kind, texts, counts in (("references", self.references, weights), ("negative_references", against, [1.0] * len(against))):
            if len(texts) > MAX_REFERENCES:
                raise ValueError(f"{kind}: {len(texts)}, at most {MAX_REFERENCES}; send fewer")
            for i, (text, weight) in enumerate(zip(texts, counts, strict=True)):
                name, data = known(text) or (f"{kind}[{i}]", _file(text, f"{kind}[{i}]"))
                found.append(Reference.read(data, name, weight, kind != "references"))
        return found


class GenerateResponse(BaseModel):
    """`image` is base64 of a PNG file."""

    image: str
    seed: int

    @classmethod
    def of(cls, png: bytes, seed: int) -> GenerateResponse:
        return cls(image=base64.b64encode(png).decode(), seed=seed)


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value}: out of {low} to {high}")


def _file(text: str, name: str) -> bytes:
    """Bytes of a reference. A path is taken only from the folder in EASYREF_REFERENCES: a server would otherwise open any file of its
    machine for whoever asks."""
    allowed = os.environ.get("EASYREF_REFERENCES")
    if allowed and len(text) < 4096 and "\0" not in text:
        path = (Path(allowed) / text).resolve()
        if path.is_relative_to(Path(allowed).resolve()) and os.path.isfile(path):  # of others, not even whether they are there
            return path.read_bytes()
    if re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{name}: uploaded once, and not here any more; upload it again")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: not base64 of an image file; paths are taken only below EASYREF_REFERENCES") from error

"""The registered model as MLflow runs it (models from code): requests with references → PNG images.

A reference is base64 of an image file. A path is taken only from the folder in EASYREF_REFERENCES: a scoring server would otherwise
open any file of its machine for whoever asks.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pydantic import BaseModel, Field

MAX_REQUESTS, MAX_REFERENCES, MAX_STEPS = 16, 32, 200


class GenerateRequest(BaseModel):
    """One image to make."""

    references: list[str] = Field(description="base64 of image files, or paths below EASYREF_REFERENCES")
    prompt: str
    weights: list[float] | None = Field(default=None, description="how much each reference counts; 1 each if not given")
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scale: float | None = None


class GenerateResponse(BaseModel):
    """`image` is base64 of a PNG file."""

    image: str
    seed: int


class EasyRefModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from easyref.pipeline import EasyRef
        from easyref.registry import check_bundle

        bundle = Path(context.artifacts["bundle"])
        check_bundle(bundle)
        self.easyref = EasyRef.from_pretrained(bundle / "checkpoint", base=bundle)

    def predict(self, context: Any, model_input: list[GenerateRequest], params: dict[str, Any] | None = None) -> list[GenerateResponse]:
        from easyref.pipeline import Request

        if len(model_input) > MAX_REQUESTS:
            raise ValueError(f"{len(model_input)} requests at once, at most {MAX_REQUESTS}; send them in parts")
        responses = []
        for request in model_input:
            steps = within("steps", 30 if request.steps is None else request.steps, 1, MAX_STEPS)
            guidance = within("guidance", 3.0 if request.guidance is None else request.guidance, 1.0, 50.0)
            scale = within("scale", 1.0 if request.scale is None else request.scale, 0.0, 10.0)
            seed = within("seed", request.seed or 0, 0, 2**63 - 1)
            if len(request.references) > MAX_REFERENCES:
                raise ValueError(f"references: {len(request.references)}, at most {MAX_REFERENCES}; send fewer")
            references = [read_reference(text, f"references[{i}]") for i, text in enumerate(request.references)]
            made = Request(request.prompt, references, int(seed), request.negative_prompt or "", request.weights)
            image = self.easyref([made], int(steps), guidance, scale)[0]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            responses.append(GenerateResponse(image=base64.b64encode(buffer.getvalue()).decode(), seed=int(seed)))
        return responses


def within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name} {value}: out of {low} to {high}")
    return value


def read_reference(text: str, name: str) -> Any:
    """Open a reference; ValueError in one line if it is neither an image in base64 nor a path that is allowed."""
    from easyref.images import open_image

    allowed = os.environ.get("EASYREF_REFERENCES")
    if allowed and len(text) < 4096 and (path := (Path(allowed) / text).resolve()).is_file():
        if not path.is_relative_to(Path(allowed).resolve()):
            raise ValueError(f"{name}: outside EASYREF_REFERENCES; give a path below it")
        return open_image(path)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: not base64 of an image file; paths are taken only below EASYREF_REFERENCES") from error
    return open_image(data, name)


set_model(EasyRefModel())

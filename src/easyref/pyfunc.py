"""The registered model as MLflow runs it (models from code): requests with references → PNG images."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from easyref.drawing import MAX_REQUESTS, Artist, GenerateRequest, GenerateResponse


class EasyRefModel(PythonModel):
    def load_context(self, context: Any) -> None:
        from easyref.registry import check_bundle

        bundle = Path(context.artifacts["bundle"])
        check_bundle(bundle)
        self.one = Lock()  # MLflow's server calls from several threads
        self.artist = Artist.load(bundle / "checkpoint", "easyref", base=bundle)

    def predict(self, context: Any, model_input: list[GenerateRequest], params: dict[str, Any] | None = None) -> list[GenerateResponse]:
        if len(model_input) > MAX_REQUESTS:
            raise ValueError(f"{len(model_input)} requests at once, at most {MAX_REQUESTS}; send them in parts")
        asked = [(request.wish(), request.read(), request.seed or 0) for request in model_input]
        with self.one:
            return [GenerateResponse.of(self.artist.draw(wish, references, [seed])[0], seed) for wish, references, seed in asked]


set_model(EasyRefModel())

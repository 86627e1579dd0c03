"""Stage `evaluate`: the finetuned model on held-out and held-in samples → metrics, report, plots and the grid."""

from __future__ import annotations

from pathlib import Path

from easyref import pipeline
from easyref.config import Params
from easyref.data.shards import ImageStore
from easyref.evaluation import generations
from easyref.evaluation.evaluate import evaluate
from easyref.evaluation.generations import select_cases
from easyref.evaluation.grid import grid_png, grid_rows
from easyref.evaluation.report import write_report
from easyref.evaluation.summary import summary
from easyref.model import reference
from easyref.model.weights import WEIGHTS
from easyref.pipeline import EasyRef, Request
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file, sha256_json, write_json

STAGE = "finetune_multi"
DRAWS = [Path(pipeline.__file__), Path(generations.__file__), *sorted(Path(reference.__file__).parent.glob("*.py"))]


def evaluate_stage(params: Params, data: Path, models: Path, out: Path, work: Path) -> None:
    """Evaluate the checkpoint of stage 3 and write `metrics/evaluate.json`, `reports/evaluation.html`, `reports/grid.png`."""
    print(use_threads(params.threads))
    p, checkpoint = params.evaluate, models / STAGE
    easyref = EasyRef.from_pretrained(checkpoint, base=models)
    store = ImageStore(data / "images")
    images = store.table.join(read_table(data / "split" / "images.parquet", ("sha256", "split")), on="sha256")
    samples = read_table(data / "split" / "samples.parquet")

    def generate(requests: list[dict]) -> list:
        return easyref([Request(**request) for request in requests], p.steps, p.guidance, p.scale)

    # what the images depend on besides their requests: weights, and the code that draws
    files = [checkpoint / WEIGHTS, *sorted((models / "base").rglob("*.safetensors")), *DRAWS]
    weights = sha256_json([sha256_file(file) for file in files])
    result = evaluate(samples, images, store.image, generate, p, seed=params.seed, weights=weights, out=work)
    write_json(out / "metrics" / "evaluate.json", result)
    cases, _ = select_cases(samples, images, {"held_out": p.held_out_samples}, params.seed)
    rows = grid_rows(cases, store.image, work, max(1, p.grid_rows // 3))
    if rows:
        grid_png(rows, out / "reports" / "grid.png")
    write_report(result, rows, out / "reports" / "evaluation.html")
    print(summary(out))

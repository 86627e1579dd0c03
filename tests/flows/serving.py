"""A small project with servers of its own, as `make up` starts them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from PIL import Image

from easyref.records import write_json

ROOT = Path(__file__).parents[2]

#: A training by the project's own loop, slow where a file `slow` lies.
COUNTER = """
import time
from pathlib import Path
import torch
from easyref.config import Optimisation
from easyref.training.trainer import Task, train
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.zeros(4))
def loss(numbers):
    time.sleep(0.25 if Path("slow").exists() else 0)
    x = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in numbers])
    return (x @ weight - x.sum(1)).square().mean()
length = dict(images=120, batch=1, microbatch=1, save_images=10, warmup_images=0, cooldown_images=0)
p = Optimisation(**length, learning_rate=0.01, weight_decay=0.0, ema_images=0)
train(Task("counter", [], {"weight": weight}, loss, {}), p, Path(".work/counter.safetensors"))
Path("counter").write_text(repr(weight.tolist()))
Path(".work/counter.safetensors").unlink()
"""


def make_project(place: Path) -> None:
    """The project with stages that only write what a release needs."""
    for name in ("params.yaml", "prefect.yaml", "presets"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place / name)
    for name in ("flows", "export", "data"):
        (place / name).symlink_to(ROOT / name)
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to(ROOT / "models" / "base")
    (place / "out").mkdir()
    write_json(place / "better.json", evaluation(0.2))
    Image.new("RGB", (8, 8)).save(place / "picture.png")
    (place / "counter.py").write_text(COUNTER)
    stages = {
        "embed": {"cmd": "echo vectors > vectors", "outs": ["vectors"]},
        "counter": {"cmd": f"{sys.executable} counter.py", "outs": ["counter"]},
        "finetune_multi": {"cmd": f"cp -r {ROOT}/models/pretrain models/finetune_multi", "outs": ["models/finetune_multi"]},
        "evaluate": {
            "cmd": "mkdir -p metrics reports && cp better.json metrics/evaluate.json && cp picture.png reports/grid.png",
            "deps": ["models/finetune_multi", "better.json"],
            "outs": ["metrics/evaluate.json", "reports/grid.png"],
        },
        "mrbench": {
            "cmd": "echo report > reports/evaluation.html",
            "deps": ["metrics/evaluate.json"],
            "outs": ["reports/evaluation.html"],
        },
    }
    (place / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (place / ".dvc").mkdir()
    (place / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")


def evaluation(fidelity: float) -> dict:
    figures = {"right": fidelity, "shuffled": 0.0, "none": 0.0}
    figures |= {name: {"mean": fidelity, "low": 0.0, "high": 1.0} for name in ("right_minus_shuffled", "right_minus_none")}
    return {"held_out": {"fidelity": figures}, "held_in": {"fidelity": figures}}


@contextmanager
def serving(place: Path, home: Path, **environment: str) -> Iterator[None]:
    """Servers for `place`, with a home of their own; `environment` says where they keep things."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("PREFECT_HOME", str(home / ".prefect"))
        for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        services_do("up", place)
        try:
            yield
        finally:
            services_do("down", place)


def services_do(what: str, place: Path) -> None:
    program = f"from pathlib import Path; from flows import services; services.{what}(Path({str(place)!r}))"
    done = run([sys.executable, "-c", program], ROOT)
    assert done.returncode == 0, done.stderr


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def easyref(place: Path, *words: str) -> str:
    done = run([sys.executable, "-m", "easyref.cli", *words], place)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""The README is true: each command in it is run here or by CI, its table of verbs is the verbs, its map of files is the files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from easyref.cli import app
from easyref.data.shards import ImageStore
from easyref.pipeline import EasyRef, Request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
VERBS |= {str(group.name) for group in app.registered_groups}


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table below a heading."""
    lines = README.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands() -> list[str]:
    """What a reader can type: lines of code blocks, `easyref …`, `make …` and `dvc …` in the text, verbs with their options."""
    parts = README.split("```")
    blocks = [line.split(" #")[0].strip() for block in parts[1::2] for line in block.splitlines()[1:]]
    inline = [span for span in code("".join(parts[::2])) if re.match(r"(easyref|make|dvc|prefect|mlflow) ", span)]
    options = [f"{code(verb)[0]} {code(does)[0]}" for verb, does in table("Verbs") if does.strip().startswith("`--")]
    return sorted({command for command in [*blocks, *inline, *options] if command})


def recipe(target: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    found = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return [line.split(" #")[0].strip() for line in found.stdout.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is small in the project, for commands that write."""
    place = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, place)
    for name in ("presets", "metrics"):
        shutil.copytree(ROOT / name, place / name)
    (place / "models").symlink_to(ROOT / "models")
    (place / ".dvc").mkdir()
    (place / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true"))
    return place


def run(words: list[str], place: Path) -> str:
    """What a command prints. `easyref` runs in this process: its imports cost more than most of what it does."""
    if words[0] == "easyref":
        threads = torch.get_num_threads()
        with chdir(place):
            shown = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        torch.set_num_threads(threads)
        assert shown.exit_code == 0, shown.stderr
        return shown.stdout
    done = subprocess.run([sys.executable, "-m", *words], cwd=place, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_command(command: str, place: Path) -> None:
    words = shlex.split(command)
    if words[0] == "make":  # by CI; `make run` below
        assert (
            command in ("make run", "make up", "make down", "make .venv/.installed")
            or command in (ROOT / ".ci" / "run").read_text().splitlines()
        )
    elif words[0] == "mlflow" or words[:3] == ["prefect", "flow-run", "cancel"] or words[:2] == ["dvc", "remote"]:
        text = "".join(path.read_text() for path in (ROOT / "tests" / "flows").glob("*.py"))  # these run it
        assert all(f'"{word}"' in text for word in words if word not in ("s3://bucket/dvc", "URL"))
    elif words[0] == "prefect":  # by tests/flows/test_services.py, with `make up` and `make down`
        deployments = {f"easyref/{d['name']}" for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
        assert words[:3] == ["prefect", "deployment", "run"] and words[3] in deployments
    elif words[1] in STAGES:  # by `dvc repro` of `make run`; what they do is tested stage by stage
        assert command == STAGES[words[1]]["cmd"]
    elif words[:2] == ["dvc", "pull"]:
        assert any(line.startswith("dvc pull") and set(words) <= set(line.split()) for line in recipe("test"))
    elif "VERB" in words:
        for verb in VERBS:
            shown = CliRunner().invoke(app, [verb if word == "VERB" else word for word in words[1:]])
            assert shown.exit_code == 0 and f"{verb} [OPTIONS]" in shown.output
    elif any(word.startswith("models:/") for word in words) or words[1] in ("release", "pull", "promote", "rollback", "trace"):
        assert words[1] in VERBS  # by tests/flows/test_services.py
    elif words[1] in ("ui", "serve"):  # by a test of its own, which starts it
        assert f'running("{words[1]}", ' in (ROOT / "tests" / f"test_{words[1]}.py").read_text()
    elif "--from" in words:
        assert '"--from"' in (ROOT / "tests" / "test_drawing.py").read_text()
    elif words[1] in ("upstream", "bench", "export", "convert", "trt", "ablate", "ema"):  # by a test of its own
        assert any(
            f'["{words[1]}", ' in path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != Path(__file__).name
        )
    elif "--backend" in words:  # by tests/export; tensorrt where a GPU is
        assert '"--backend"' in (ROOT / "tests" / "export" / "test_export.py").read_text()
    elif words == ["dvc", "repro"]:  # by `make run`, a stage at a time
        assert '"repro"' in (ROOT / "flows" / "stages.py").read_text()
    elif "--ref" in words:
        generate(words, place)
    elif words[1:] == ["generate"]:
        assert any(other.startswith("easyref generate --ref") for other in commands())
    elif words[1:] == ["preset"]:
        run([*words, "sdxl"], place)
        assert (place / "params.yaml").read_bytes() == (ROOT / "presets" / "sdxl.yaml").read_bytes()
        run([*words, "nano"], place)
    else:
        assert words[0] == "easyref" or words[1] in ("plots", "freeze"), "would run stages on the project's own models"
        assert run(words, place)


def generate(words: list[str], place: Path) -> None:
    """With real references and the shipped alignment weights, at two steps."""
    options, store = list(pairwise(words)), ImageStore(ROOT / "data" / "images")
    references = [value for name, value in options if name == "--ref"]
    for name, sha256 in zip(references, store.rows, strict=False):
        store.image(sha256).save(place / name)
    printed = run([*words, "--model", str(ROOT / "models" / "pretrain"), "--steps", "2"], place).splitlines()
    given = {"--seed": "0", "--num": "1", "--out": "out", **dict(options)}
    num = int(given["--num"])
    assert printed == [f"{given['--out']}/{int(given['--seed']) + i}.png" for i in range(num)]
    images = [Image.open(place / name) for name in printed]
    assert {image.size for image in images} == {(64, 64)}
    assert len({image.tobytes() for image in images}) == num


def test_the_line_of_python_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = (span for span in code(README) if span.startswith("EasyRef.from_pretrained("))
    names = {"EasyRef": EasyRef, "Request": Request, "image": Image.new("RGB", (64, 64), "red")}
    (image,) = eval(line, names)
    assert image.size == (64, 64)


def test_make_run_is_made_of_commands_that_exist() -> None:
    lines = [shlex.split(line) for line in recipe("run") if line.startswith(("easyref ", "dvc "))]
    assert not lines and recipe("run")[-1] == "python -m flows"


def test_table_of_verbs_is_the_verbs() -> None:
    assert {code(verb)[0] for verb, _ in table("Verbs")} == {f"easyref {verb}" for verb in VERBS}


def test_map_of_files_is_the_files() -> None:
    """Every path is there (later ones of a row beside the first), and every module is in a row or in a folder of one."""
    paths = set()
    for names, _ in table("Files"):
        first, *others = code(names)
        folder = Path(first).parent
        paths |= {Path(first), *(folder / name if (ROOT / folder / name).exists() else Path(name) for name in others)}
    assert not [str(path) for path in paths if not (ROOT / path).exists()]
    modules = {path.relative_to(ROOT) for path in (ROOT / "src" / "easyref").rglob("*.py") if path.name != "__init__.py"}
    assert not [str(path) for path in modules if not paths & {path, *path.parents}]

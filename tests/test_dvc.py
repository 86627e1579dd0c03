"""Changing one parameter re-runs exactly what depends on it. DVC itself decides, in a project with dvc.yaml's own stages, whose
commands are replaced by ones that write something new to each output."""

import inspect
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from dvc.cli import main as dvc
from dvc.repo import Repo

from easyref import cli
from easyref.config import Params
from easyref.training.curves import write_curves

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "easyref"
STAGES, PLOTS = yaml.safe_load((ROOT / "dvc.yaml").read_text()).values()
JUDGED = ["evaluate", "mrbench"]
TRAINED = ["base", "pretrain", "finetune_single", "finetune_multi"]
IMPORT = r"from easyref\.?([\w.]*) import (.+)"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a first `dvc repro`; every command notes its stage in the file `ran`."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "presets" / "nano.yaml", project / "params.yaml")
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for name, stage in pipeline["stages"].items():
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in [*stage["outs"], *stage.get("metrics", [])]]
        stage["cmd"] = [f"mkdir -p $(dirname {out}) && date +%s%N > {out}" for out in outs] + [f"echo {name} >> ran"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true"))
    assert sorted(reproduced(project)) == sorted(STAGES)
    assert reproduced(project) == []
    return project


def reproduced(project: Path) -> list[str]:
    """Stages whose commands `dvc repro` runs."""
    (project / "ran").write_text("")
    with chdir(project):
        Repo().reproduce()
    return (project / "ran").read_text().split()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ingest.palette", 32, [*STAGES]),
        ("embed.batch", 7, ["embed", "group", "split", "report", *TRAINED, *JUDGED]),
        ("group.min_styles", 2, ["group", "split", "report", *TRAINED, *JUDGED]),
        ("split.held_out_groups", 7, ["split", "report", *TRAINED, *JUDGED]),
        ("report.groups", 3, ["report"]),
        ("base.vae.kl_weight", 0.5, [*TRAINED, *JUDGED]),
        ("reference.instruction", "Draw: ", [*TRAINED, *JUDGED]),
        ("reference.num_tokens", 8, [*TRAINED[1:], *JUDGED]),
        ("pretrain.learning_rate", 0.5, [*TRAINED[1:], *JUDGED]),
        ("finetune_single.images", 64, [*TRAINED[2:], *JUDGED]),
        ("finetune_multi.truncate", 0.5, ["finetune_multi", *JUDGED]),
        ("evaluate.steps", 2, JUDGED),
        ("mrbench.lora.steps", 2, ["mrbench"]),
        ("seed", 7, ["group", "split", "report", *TRAINED, *JUDGED]),
        ("threads", 1, []),
        ("loading.workers", 1, []),
        ("preset", "mine", []),
    ],
)
def test_a_changed_parameter_runs_exactly_what_depends_on_it(project: Path, tmp_path: Path, key: str, value, expected) -> None:
    copy = shutil.copytree(project, tmp_path / "copy")
    values = yaml.safe_load((copy / "params.yaml").read_text())
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    assert section[name] != value
    section[name] = value
    (copy / "params.yaml").write_text(yaml.safe_dump(values))
    assert sorted(reproduced(copy)) == sorted(expected)


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_parameter_that_a_stage_reads_is_declared(stage: str) -> None:
    declared = STAGES[stage]["params"]
    found = reads(stage)
    if "models/base" in STAGES[stage].get("deps", []):
        found.discard("base")  # which base models they are: comes with models/base
    if stage in TRAINED[2:]:
        found.discard("align")  # only the first of the three warms up
    assert stage in {read.split(".")[0] for read in found}  # its own section, or nothing was found at all
    free = ("threads", "loading")  # they change no result
    undeclared = {read for read in found if not any(f"{read}.".startswith(f"{key}.") for key in (*declared, *free))}
    assert not undeclared


def reads(stage: str) -> set[str]:
    """`section` or `section.field` of Params that the source of a stage's verb and of all modules it imports names."""
    verb = inspect.getsource(getattr(cli, stage))
    text = verb + (inspect.getsource(cli._stage) if " _stage(" in verb else "")
    modules: set[Path] = set()
    for module, names in (todo := re.findall(IMPORT, text)):
        folder = SOURCE / module.replace(".", "/")
        new = {folder.with_suffix(".py"), *(folder / f"{name}.py" for name in re.findall(r"\w+", names))} - modules
        for path in filter(Path.is_file, new):
            modules.add(path)
            text += path.read_text()
            todo += re.findall(IMPORT, path.read_text())
    found = {stage} if "getattr(params, name)" in text else set()
    for section, field in re.findall(r"\b(?:params|values|load_params\(params\))\.([a-z_]+)(?:\.([a-z_]+))?", text):
        if section in Params.model_fields:
            inner = getattr(Params.model_fields[section].annotation, "model_fields", {})
            found.add(f"{section}.{field}" if field in inner else section)
    return found


def test_dvc_draws_the_curves_of_every_training(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "copy")
    shutil.rmtree(copy / "metrics")
    losses, held_out = (
        {"loss": 0.5, "learning_rate": 0.1},
        {"held_out_right": 1.5, "held_out_shuffled": 2.5, "held_out_none": 3.5, "held_out_explained": 4.5, "held_out_latents": 5.5},
    )
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps({'seen': seen, **row})}\n" for seen in (8, 16) for row in (losses, held_out)))
    for name in re.findall(r'_part\("(\w+)"', (SOURCE / "training" / "base.py").read_text()):
        write_curves(log, copy / "metrics" / "base", name)
    for stage in TRAINED[1:]:
        write_curves(log, copy / "metrics" / stage)
    write_curves(log, copy / "metrics" / "pretrain" / "align")
    with chdir(copy):
        assert dvc(["plots", "show", "--quiet", "--out", str(tmp_path / "html")]) == 0
    specs = re.findall(r"var spec = (\{.*\});?$", (tmp_path / "html" / "index.html").read_text(), re.MULTILINE)
    for plot, spec in zip(PLOTS, specs, strict=True):
        (definition,) = plot.values()
        fields = [field for y in definition["y"].values() for field in ([y] if isinstance(y, str) else y)]
        drawn = fields[0] if len(set(fields)) == 1 else "dvc_inferred_y_value"
        points = [(value["seen"], value[drawn]) for value in json.loads(spec)["data"]["values"]]
        assert points == [(seen, (losses | held_out)[field]) for field in fields for seen in (8, 16)]

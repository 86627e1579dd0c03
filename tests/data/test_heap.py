"""A folder of images without labels, from the first command to the page, and every command killed on its way."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from easyref.cli import app
from easyref.config import load_params
from easyref.data.group import group_stage
from easyref.records import read_json, read_table
from tests.processes import exit_code, start

STAGES = ("ingest", "embed", "group", "split", "report")
VIEWS = (5, 5, 5, 5, 2)  # pictures of each subject


def view(subject: int, number: int) -> Image.Image:
    """A thing of noise on white, a little moved and lighter in each of its pictures."""
    rng = np.random.default_rng([subject, number])
    noise = np.random.default_rng(subject).integers(0, 220, (5, 5, 3), np.uint8)
    thing = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (96, 96), "white")
    picture.paste(thing.point(lambda value: min(255, value + 12 * number)), tuple(rng.integers(4, 28, 2).tolist()))
    return picture


def run(stage: str) -> None:
    done = CliRunner().invoke(app, [stage], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heap")
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["ingest"] |= {"source": "folder", "path": "photos"}
    values["group"] |= {"by": "embeddings", "likeness": {kind: values["group"]["likeness"][kind] for kind in ("subject", "style")}}
    values["split"] |= {"held_out_share": 0.3, "held_out_groups": 2, "held_in_groups": 2}
    (folder / "photos").mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    for subject, views in enumerate(VIEWS):
        for number in range(views):
            view(subject, number).save(folder / "photos" / f"{number}{subject}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in STAGES:
            run(stage)
    return folder


def test_pictures_of_one_thing_become_a_group_a_split_and_a_page(project: Path) -> None:
    images = read_table(project / "data" / "images" / "images.parquet")
    assert len(images) == sum(VIEWS)
    thing = {sha256: name[1] for sha256, name in images.select("sha256", "source").iter_rows()}
    groups = read_table(project / "data" / "groups" / "groups.parquet").filter(kind="subject")
    pure = [members for members in groups["members"] if len({thing[m] for m in members}) == 1]
    assert len(pure) == len(groups) and len({thing[members[0]] for members in pure}) == len(VIEWS)
    assert read_json(project / "metrics" / "group.json") == {}  # no labels, nothing to score against
    split, samples = (read_table(project / "data" / "split" / f"{name}.parquet") for name in ("groups", "samples"))
    side = dict(read_table(project / "data" / "split" / "images.parquet").iter_rows())
    kept = [sorted(members) for members in split.filter(kind="subject")["members"]]
    whole = [members for members in groups["members"].to_list() if {side[m] for m in members} in ({"train"}, {"held_out"})]
    assert all(sorted(members) in kept for members in whole) and 2 in map(len, whole)  # pairs too
    captions = dict(images.select("sha256", "caption").iter_rows())
    assert len(samples) and all(prompt == captions[target] for target, prompt in samples.select("target", "prompt").iter_rows())
    page = (project / "reports" / "data.html").read_text()
    assert f"{sum(VIEWS)} images in 1 shard, " in page and "Least alike" in page and "http" not in page


def test_labels_that_a_heap_has_not_are_told_with_those_it_may_have(project: Path, tmp_path: Path) -> None:
    params = load_params(project / "params.yaml")
    params = params.model_copy(update={"group": params.group.model_copy(update={"by": "labels"})})
    with pytest.raises(ValueError, match=r"no groups of labels; .* own have only what their source says, group.kinds: \[given\]"):
        group_stage(params, project / "data", tmp_path / "group.json", tmp_path / "work")


def halted(folder: Path, stage: str, writes: int) -> None:
    """The command `stage`, which stops for ever when it is about to finish its file number `writes`."""
    os.chdir(folder)
    fsync, done = os.fsync, [0]

    def stop(handle: int) -> None:
        if done[0] == writes:
            Path("halted").touch()
            time.sleep(600)
        done[0] += 1
        fsync(handle)

    os.fsync = stop
    app([stage])


def made(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for place in ("data/groups", "data/split", "metrics", "reports")
        for file in sorted((folder / place).rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize(("stage", "writes"), [pytest.param("group", 1, marks=pytest.mark.long), ("split", 4), ("report", 0)])
def test_kill_9_and_again_gives_the_same_files(project: Path, tmp_path: Path, stage: str, writes: int, monkeypatch) -> None:
    whole = made(project)
    outs = {"group": ["data/groups", "metrics"], "split": ["data/split"], "report": ["reports"]}[stage]
    for name in ("data", "metrics", "reports", "params.yaml"):
        (shutil.copytree if (project / name).is_dir() else shutil.copy)(project / name, tmp_path / name)
    for name in outs:
        shutil.rmtree(tmp_path / name)
    process = start(halted, tmp_path, stage, writes)
    while not (tmp_path / "halted").exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    believed = {name: data for name, data in made(tmp_path).items() if ".tmp-" not in name}
    assert all(whole[name] == data for name, data in believed.items())  # none is half of one
    assert len(believed) < len(whole)
    monkeypatch.chdir(tmp_path)
    run(stage)
    assert made(tmp_path) == whole
    assert {path.name for path in Path(".work").rglob("*") if path.is_file()} <= {".lock"}

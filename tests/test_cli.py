"""Bad input of `easyref generate` is one clear line and a non-zero exit; nothing half-written is left."""

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from easyref import cli
from easyref.images import ImageError, open_image
from easyref.records import alone


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "easyref.cli", *arguments], check=False, capture_output=True, text=True, timeout=120)


def wide_png(path: Path) -> Path:
    header = struct.pack(">IIBBBBB", 60_000, 10, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.png", "no such file"),
        (lambda p: p, "a folder; name the image files in it"),
        (lambda p: (p / "text.png", (p / "text.png").write_text("hello"))[0], "not an image"),
        (lambda p: wide_png(p / "wide.png"), "60000x10 pixels is over the cap"),
    ],
)
def test_bad_reference_is_one_line(tmp_path: Path, make, message: str) -> None:
    out = tmp_path / "out"
    result = run("generate", "--ref", str(make(tmp_path)), "--prompt", "a cat", "--out", str(out))
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_missing_reference_option_and_missing_checkpoint(tmp_path: Path) -> None:
    assert run("generate", "--prompt", "a cat").returncode != 0
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    result = run("generate", "--ref", str(tmp_path / "a.png"), "--model", str(tmp_path / "nothing"))
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and "--model models/pretrain" in result.stderr


def test_an_option_of_another_backend_is_told(tmp_path: Path) -> None:
    result = run("generate", "--provider", "cuda", "--use-cuda-graph", "--backend", "torch", "--out", str(tmp_path / "out"))
    assert result.stderr.splitlines()[:2] == [
        "easyref: --provider does nothing with --backend torch, only with onnxruntime",
        "easyref: --use-cuda-graph does nothing with --backend torch, only with tensorrt",
    ]


@pytest.mark.parametrize("verb", ["generate", "ui", "serve"])
def test_half_precision_of_graphs_is_set_by_their_export(tmp_path: Path, verb: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    more = ("--ref", str(tmp_path / "a.png")) if verb == "generate" else ()
    result = run(verb, "--backend", "onnxruntime", "--precision", "bf16", *more)
    assert (
        result.returncode == 2
        and result.stderr == "easyref: --precision bf16 is torch's; `easyref export --dtype` sets that of graphs\n"
    )


def test_a_full_disk_is_one_line_and_leaves_what_was(tmp_path: Path) -> None:
    shutil.copytree("presets", tmp_path / "presets")
    (tmp_path / "params.yaml").write_text("as it was")
    command = f"ulimit -f 1; exec {sys.executable} -m easyref.cli preset nano"  # no file over 1 KiB
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "make room and give the command again" in result.stderr
    assert (tmp_path / "params.yaml").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "presets"]


def test_what_the_system_refuses_is_said_without_its_number(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = run("preset", "nano", "--params", str(tmp_path / "out" / "params.yaml"))
    assert result.returncode == 2 and result.stderr == f"easyref: {tmp_path / 'out'}: file exists\n"


@pytest.mark.parametrize(("error", "line"), [("RuntimeError('\\n  why\\n  where')", "why"), ("ValueError()", "ValueError")])
def test_an_error_of_a_library_is_its_first_line_with_words(error: str, line: str) -> None:
    code = f"def app(): raise {error}\nfrom easyref import cli\ncli.app = app\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"easyref: {line}\n")


def test_truncated_image_is_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match="broken image data"):
        open_image(path)


def test_import_of_the_cli_is_light() -> None:
    heavy = ("torch", "polars", "diffusers", "transformers", "PIL")
    code = f"import sys, easyref.cli, easyref.evaluation.summary; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_an_error_without_words_is_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def late() -> None:
        raise TimeoutError

    monkeypatch.setattr(cli, "app", late)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "easyref: TimeoutError\n"


@pytest.mark.parametrize("verb", [cli.ingest, cli.embed, cli.group])
def test_two_at_once_in_one_project_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb) -> None:
    """They would take each other's files away."""
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with alone(cli.WORK / "data"), pytest.raises(ValueError, match="another run is at work there"):
        verb()

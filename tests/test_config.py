"""Parameters are complete and typed; a mistake is one line that names the key, the value and the fix."""

from pathlib import Path

import pytest
import yaml

from easyref.config import ConfigError, load_params, parse_params

SCORE = {"id": "model", "revision": None, "label": "nsfw", "min": None, "max": 0.5}
PRESETS = sorted(Path("presets").glob("*.yaml"))


def nano() -> dict:
    return yaml.safe_load(Path("presets/nano.yaml").read_text())


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_are_complete(path: Path) -> None:
    assert load_params(path).preset == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["pretrain"].update(learningrate=1), "pretrain.learningrate = 1: unknown key; did you mean 'learning_rate'"),
        (lambda d: d["split"].update(held_out_groups="many"), "split.held_out_groups = 'many'"),
        (lambda d: d.pop("group"), "group: missing; add it"),
        (lambda d: d.update(grup=d.pop("group")), "params.yaml: grup: unknown key; did you mean 'group'?"),
        (lambda d: d["align"].update(yaml.safe_load("learning_rate: 2E-3")), "valid number; to YAML this is text, write 2.0e-3"),
        (lambda d: d["align"].update(yaml.safe_load("learning_rate: 1e3")), "to YAML this is text, write 1.0e+3"),  # 1.0e3 is, too
        (lambda d: d["pretrain"].update(microbatch=5), "microbatch 5 does not divide batch 32"),
        (lambda d: d["finetune_multi"].update(max_references=99), "finetune_multi.max_references 99 is over"),
        (lambda d: d["mrbench"].update(counts=[1, 64]), "mrbench.counts 64 is over reference.max_references 32"),
        (lambda d: d["split"].update(max_references=33), "split.max_references 33 is over reference.max_references 32"),
        (lambda d: d["finetune_single"].update(lora_rank=16), "finetune_single.lora_rank 16 is not that of pretrain, 32, whose LoRA"),
        (lambda d: d["base"].update(source="hub"), "source hub needs exactly diffusion_id"),
        (lambda d: d["pretrain"].update(prediction="epsilon", zero_terminal_snr=True), "pretrain: zero_terminal_snr needs prediction"),
        (lambda d: d["pretrain"].update(rates={"lore": 2.0}), "pretrain.rates.lore"),
        (lambda d: d["pretrain"].update(noise_offset=-0.1), "pretrain.noise_offset = -0.1: "),
        (lambda d: d["pretrain"].update(min_snr=0.0), "pretrain.min_snr = 0.0: input should be greater than 0"),
        (lambda d: d["base"]["text_to_image"].update(min_snr=-5.0), "base.text_to_image.min_snr = -5.0: "),
        (
            lambda d: d["group"]["likeness"]["subject"].update(treshold=1),
            "subject.treshold = 1: unknown key; did you mean 'threshold'",
        ),
        (lambda d: d["embed"].update(faces={"detector": "d.onnx"}), "embed.faces.embedder: missing; add it"),
        (lambda d: d["ingest"].update(size=63), "ingest.size = 63: input should be a multiple of 8"),
        (lambda d: d["ingest"].update(scores={"nsfw": SCORE}), "scores are of a heap's images"),
        (lambda d: d["ingest"].update(scores={"nsfw": SCORE | {"max": None}}), "ingest.scores.nsfw: min and max are null; give one"),
        (lambda d: d["pretrain"].update(drop_image=0.9), "is more than 1; lower them"),
    ],
)
def test_mistakes_name_key_value_and_fix(change, message: str) -> None:
    values = nano()
    change(values)
    with pytest.raises(ConfigError) as error:
        parse_params(values, "params.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes("ingest: {path: Gemälde}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"params.yaml: not UTF-8 from byte 18 on; save it as UTF-8$"):
        load_params(tmp_path / "params.yaml")

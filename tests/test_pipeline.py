"""The shipped base and alignment weights make pictures through the public pipeline; requests do not influence each other."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from PIL import Image

from easyref.model import attention
from easyref.pipeline import EasyRef, Request, _base_place
from easyref.records import HUB, write_json

CHECKPOINT = Path("models/pretrain")


@pytest.fixture(scope="module")
def easyref() -> EasyRef:
    if not CHECKPOINT.exists():
        pytest.fail("models/pretrain is missing; run `dvc pull base pretrain`")
    torch.set_num_threads(1)
    return EasyRef.from_pretrained(CHECKPOINT)


def reference(color: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    image.paste(color, (16, 16, 48, 48))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_an_image_depends_on_its_own_request_only(easyref: EasyRef) -> None:
    red = Request("farmer", [reference("red"), reference("darkred")], seed=3)
    blue = Request("cat face", [reference("blue")], seed=4)
    together = easyref([red, blue], steps=3, guidance=3.0)
    alone = easyref([red], steps=3, guidance=3.0)
    assert together[0].size == (64, 64)
    assert np.abs(pixels(together[0]) - pixels(alone[0])).max() <= 2  # rounding of batched kernels


def test_references_scale_and_seed_each_change_the_image(easyref: EasyRef) -> None:
    def make(color: str, seed: int = 0, scale: float = 1.0) -> np.ndarray:
        return pixels(easyref([Request("star", [reference(color)], seed)], steps=3, guidance=2.0, scale=scale)[0])

    same = make("red")
    np.testing.assert_array_equal(same, make("red"))
    assert np.abs(same - make("blue")).max() > 0
    assert np.abs(same - make("red", seed=1)).max() > 0
    np.testing.assert_array_equal(make("red", scale=0.0), make("blue", scale=0.0))


def test_weights_of_references(easyref: EasyRef) -> None:
    """Each sample of a batch has its own; one of 1 each is none; a heavy one pulls towards its reference."""
    both, prompts = [reference("red"), reference("blue")], ["star"]
    plain = easyref.encode([both], prompts)
    torch.testing.assert_close(easyref.encode([both], prompts, [[1.0, 1.0]]), plain)
    batch = easyref.encode([both, [], both], ["star"] * 3, [[9.0, 1.0], None, None])
    torch.testing.assert_close(batch[0], easyref.encode([both], prompts, [[9.0, 1.0]])[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(batch[2], plain[0], atol=1e-4, rtol=0)
    assert (batch[0] - plain[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="request 0: 1 weights for 2 references"):
        easyref.encode([both], prompts, [[1.0]])


def test_a_new_prompt_for_known_references_runs_its_text_only(easyref: EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    references = [reference("red"), reference("blue"), reference("green")]
    easyref.starts.clear()
    easyref.encoded.clear()
    fresh = easyref.encode([references], ["cat face, twemoji style"], [[1.0, 2.0, 0.5]])
    plain = easyref.encode([references[:1]], ["farmer"])
    easyref.starts.clear()
    easyref.encoded.clear()
    easyref.encode([references, references[:1]], ["star", "a much longer prompt of another sample"])
    assert not {"cat face, twemoji style", "farmer"} & {prompt for _, prompt, _ in easyref.encoded}
    seen: list[int] = []
    vision, text = easyref.encoder.vision, easyref.encoder.mllm.language_model.layers[0].register_forward_hook
    monkeypatch.setattr(easyref.encoder, "vision", lambda *a: (_ for _ in ()).throw(AssertionError("the vision tower ran")))
    hook = text(lambda module, args, out: seen.append(args[0].shape[1] if args else -1))
    again = easyref.encode([references], ["cat face, twemoji style"], [[1.0, 2.0, 0.5]])
    other = easyref.encode([references[:1]], ["farmer"])
    hook.remove()
    monkeypatch.setattr(easyref.encoder, "vision", vision)
    assert torch.equal(again, fresh) and torch.equal(other, plain)
    assert len(seen) == 2
    assert (again - easyref.encode([references], ["cat face, twemoji style"])).abs().max() > 1e-3


def test_equal_samples_are_encoded_once_and_memory_is_bounded(easyref: EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    aggregate = easyref.encoder.aggregate
    monkeypatch.setattr(easyref.encoder, "aggregate", lambda p, b=None: (batches.append(len(p.states_BLD)), aggregate(p, b))[1])
    one, two = ([reference("red")], "star"), ([reference("blue")], "cat face")
    easyref.encoded.clear()
    made = easyref.encode([one[0], two[0], one[0], one[0]], [one[1], two[1], one[1], one[1]])
    assert sum(batches) == 2
    assert torch.equal(made[0], made[2]) and torch.equal(made[0], made[3]) and not torch.equal(made[0], made[1])
    assert 0 < easyref.starts.currsize <= easyref.starts.maxsize
    assert easyref.encoded.currsize == sum(tokens.nbytes for tokens in easyref.encoded.values())
    assert easyref.encoded.maxsize > 500 * easyref.encoded.currsize, "what one baseline reads alone, the next one finds"
    assert torch.equal(easyref.encode([two[0]], [two[1]])[0], made[1]) and sum(batches) == 2  # a new seed, later
    easyref.encoded.clear()
    monkeypatch.setattr(easyref, "starts", LRUCache(10, getsizeof=lambda start: start.nbytes))
    torch.testing.assert_close(easyref.encode([one[0]], [one[1]])[0], made[0], atol=1e-4, rtol=0)
    assert easyref.starts.currsize == 0


def test_a_palette_counts_and_what_is_transparent_is_white(easyref: EasyRef) -> None:
    """As in a file that `open_image` reads; the indices of two palettes may be the same."""

    def encode(image: Image.Image) -> torch.Tensor:
        return easyref.encode([[image]], ["star"])

    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    assert torch.equal(encode(red.quantize(2)), encode(red)) and torch.equal(encode(blue.quantize(2)), encode(blue))
    clear = Image.new("RGBA", (64, 64))
    clear.paste((255, 0, 0, 255), (16, 16, 48, 48))
    assert torch.equal(encode(clear), encode(reference("red")))


def test_cached_keys_and_values_equal_tokens_in_every_step(easyref: EasyRef) -> None:
    """The packed payload of `encode` against tokens projected in each step by each layer."""
    unet = easyref.pipe.unet
    with torch.no_grad():
        tokens_BTX = easyref.encoder(easyref.processor([[reference("red")]], ["star"]))
        payload = easyref.encode([[reference("red")]], ["star"])
        rng = torch.Generator().manual_seed(0)
        noisy = torch.randn(1, unet.config.in_channels, 16, 16, generator=rng)
        text = torch.randn(1, 24, unet.config.cross_attention_dim, generator=rng)
        added = {"text_embeds": torch.zeros(1, easyref.pipe.text_encoder_2.config.projection_dim), "time_ids": torch.zeros(1, 6)}
        out = [
            unet(noisy, 500, text, added_cond_kwargs={**added, "image_embeds": [embeds]}).sample
            for embeds in (tokens_BTX[:, None], payload)
        ]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-5)


def test_scale_by_block_is_diffusers_own(easyref: EasyRef) -> None:
    unet = easyref.pipe.unet
    for scale in ({"up": 0.5}, {"down": 0.25, "mid": 0.5, "up": {"block_0": [0.0, 1.0]}}, {"down": {"block_1": 0.75}}):
        easyref.pipe.set_ip_adapter_scale(scale)
        theirs = attention.scales(unet)
        easyref.adapter.set_scale(0.0)
        easyref.adapter.set_scale(scale)
        assert attention.scales(unet) == theirs and len(set(theirs)) > 1

    def make(scale: Any) -> np.ndarray:
        return pixels(easyref([Request("star", [reference("red")], 0)], steps=2, guidance=2.0, scale=scale)[0])

    np.testing.assert_array_equal(make({"down": 1.0, "mid": 1.0, "up": 1.0}), make(1.0))
    np.testing.assert_array_equal(make({"mid": 0.0}), make(0.0))  # a block that is not named gets none
    assert np.abs(make({"up": 1.0}) - make(1.0)).max() > 0 and np.abs(make({"up": 1.0}) - make(0.0)).max() > 0
    with pytest.raises(ValueError, match="no cross-attention starts with 'up_blocks.9'"):
        make({"up": {"block_9": 1.0}})


def test_references_count_in_a_window_of_the_steps(easyref: EasyRef) -> None:
    """Latents of each step: as with references inside, as without outside; nothing stays behind."""

    def make(**options: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        note = lambda pipe, step, time, given: (seen.append(given["latents"].clone()), given)[1]  # noqa: E731
        easyref([Request("star", [reference("red")], 0)], steps=4, guidance=2.0, callback_on_step_end=note, **options)
        return seen

    on, off = make(), make(scale=0.0)
    assert all(map(torch.equal, make(window=(0.0, 0.0)), off)) and all(map(torch.equal, make(window=(0.0, 1.0)), on))
    early, late = make(window=(0.0, 0.5)), make(window=(0.5, 1.0))
    assert [torch.equal(a, b) for a, b in zip(early, on, strict=True)] == [True, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(late, off, strict=True)] == [True, True, False, False]
    assert not torch.equal(early[3], off[3]) and not torch.equal(late[3], on[3])
    assert set(attention.scales(easyref.pipe.unet)) == {1.0} and not easyref.pipe.unet._forward_pre_hooks  # as `pipe` alone finds them
    assert all(map(torch.equal, make(), on))
    with pytest.raises(ValueError, match=r"window \(0.6, 0.4\)"):
        make(window=(0.6, 0.4))


def test_negative_references_are_what_guidance_leads_away_from(easyref: EasyRef) -> None:
    """Away from the very same it leads nowhere, however strong."""

    def make(negative: str | None, guidance: float) -> np.ndarray:
        away = [reference(negative)] if negative else []
        request = Request("star", [reference("red")], 0, negative_prompt="star", negative_references=away)
        return pixels(easyref([request], steps=3, guidance=guidance)[0])

    assert np.abs(make("red", 2.0) - make("red", 9.0)).max() <= 2
    assert np.abs(make(None, 2.0) - make(None, 9.0)).max() > 10
    assert np.abs(make("blue", 3.0) - make(None, 3.0)).max() > 2


def test_base_models_that_were_fetched_are_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / HUB, {"diffusion": ["org/sdxl", "abc"], "mllm": ["org/qwen", None]})
    assert _base_place("org/sdxl", "abc", tmp_path) == str(tmp_path / "base" / "diffusion")
    assert _base_place("org/qwen", None, tmp_path) == str(tmp_path / "base" / "mllm")
    assert _base_place("org/sdxl", "other", tmp_path) == "org/sdxl"
    with pytest.raises(FileNotFoundError, match="dvc pull base"):
        _base_place("base/diffusion", None, tmp_path)


def test_base_models_are_beside_a_checkpoint_that_is_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    for file in CHECKPOINT.iterdir():
        (tmp_path / "checkpoint" / file.name).symlink_to(file.resolve())
    monkeypatch.chdir(tmp_path / "checkpoint")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/base/diffusion: base model missing")):
        EasyRef.base_pipeline(".")


def test_too_long_prompt_names_the_limit(easyref: EasyRef) -> None:
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens is over the text encoder's limit of 24; shorten it"):
        easyref([Request("a very long prompt " * 30, [reference("red")], 0)])
    with pytest.raises(ValueError, match="over the text encoder's limit of 24"):
        easyref([Request("star", [reference("red")], 0, negative_prompt="a very long prompt " * 30)], steps=1)


def test_a_pipeline_that_changes_its_precision_goes_on(easyref: EasyRef) -> None:
    """The last test of this file: the weights stay rounded."""

    def make() -> np.ndarray:
        return pixels(easyref([Request("star", [reference("red")], 0)], steps=3, guidance=3.0)[0])

    before = make()
    easyref.pipe.to(torch.bfloat16)
    assert np.abs(make() - before).mean() < 10  # of 255

"""The shipped base and alignment weights make pictures through the public pipeline; requests do not influence each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from PIL import Image

from easyref.pipeline import EasyRef, Request

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
    torch.testing.assert_close(again, fresh, atol=1e-4, rtol=0)
    torch.testing.assert_close(other, plain, atol=1e-4, rtol=0)
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
    assert torch.equal(easyref.encode([two[0]], [two[1]])[0], made[1]) and sum(batches) == 2  # a new seed, later
    easyref.encoded.clear()
    monkeypatch.setattr(easyref, "starts", LRUCache(10, getsizeof=lambda start: start.nbytes))
    torch.testing.assert_close(easyref.encode([one[0]], [one[1]])[0], made[0], atol=1e-4, rtol=0)
    assert easyref.starts.currsize == 0


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


def test_too_long_prompt_names_the_limit(easyref: EasyRef) -> None:
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens is over the text encoder's limit of 24; shorten it"):
        easyref([Request("a very long prompt " * 30, [reference("red")], 0)])

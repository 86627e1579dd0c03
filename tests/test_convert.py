"""`easyref convert` on files in the published form, which are written here by what the modules are, not by our map of names.

The MLLM's names are those that transformers itself writes to disk: they are still those of 4.45, the published code's version.
"""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from easyref import cli
from easyref.config import load_params
from easyref.convert import fit
from easyref.model import stream, weights
from easyref.model.adapter import Adapter
from easyref.model.reference import SWITCHES, ReferenceEncoder, ReferenceProcessor
from easyref.model.schedule import Schedule
from easyref.pipeline import EasyRef

MODELS, RANK, TOKENS = Path("models"), 3, 5
BASE = MODELS / "base"
torch.set_num_threads(1)


class Original(NamedTuple):
    """An EasyRef with random weights over the nano base models, and its tensors in the published form."""

    encoder: ReferenceEncoder
    unet: UNet2DConditionModel
    published: dict[str, Tensor]


def shake(module: nn.Module, g: torch.Generator) -> None:
    """Every parameter becomes one of a kind, without becoming large."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=g)
        parameter.data.copy_(parameter + noise * (0.1 * parameter.std(correction=0) + 0.01))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    g, named = torch.Generator().manual_seed(0), {}
    mllm = Qwen2VLForConditionalGeneration.from_pretrained(BASE / "mllm", dtype=torch.float32)
    shake(mllm, g)
    folder = tmp_path_factory.mktemp("mllm")
    mllm.save_pretrained(folder)
    last = f"model.layers.{mllm.config.text_config.num_hidden_layers - 1}."
    for name, tensor in load_file(folder / "model.safetensors").items():
        part = f"mllm_final_layer.layers.0.{name.removeprefix(last)}" if name.startswith(last) else f"multimodal_llm.{name}"
        named[part] = tensor
    unet = UNet2DConditionModel.from_pretrained(BASE / "diffusion" / "unet", torch_dtype=torch.float32)
    config = weights.read_config(MODELS / "pretrain").reference.model_copy(update=SWITCHES["released"] | {"num_tokens": TOKENS})
    encoder = ReferenceEncoder(mllm, config, g).eval()
    for module in (encoder.norm, encoder.projector):
        shake(module, g)
    named |= {"mllm_final_layer.reference_tokens": encoder.reference_tokens, "mllm_final_layer.norm.weight": encoder.norm.weight}
    for place, module in enumerate(encoder.projector):
        named |= {f"image_proj_model.proj.{place}.{name}": p for name, p in module.named_parameters()}
    Adapter.install(unet, TOKENS, RANK, float(RANK), g)
    for name, module in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            for part in ("to_q", "to_k", "to_v", "to_out"):
                linear: Any = module.get_submodule("to_out.0" if part == "to_out" else part)
                down, up = linear.lora_A["easyref"], linear.lora_B["easyref"]
                up.weight.data.normal_(0, 0.1, generator=g)
                named |= {
                    f"unet.{name}.processor.{part}_lora.down.weight": down.weight,
                    f"unet.{name}.processor.{part}_lora.up.weight": up.weight,
                }
        if name.endswith(".attn2"):
            for part, projection in (("to_k_ip", module.processor.to_k_ip[0]), ("to_v_ip", module.processor.to_v_ip[0])):
                shake(projection, g)
                named[f"unet.{name}.processor.{part}.weight"] = projection.weight
    return Original(encoder, unet.eval(), {name: tensor.detach().clone() for name, tensor in named.items()})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where checkpoints lie beside their base models."""
    (tmp_path / "base").symlink_to(BASE.resolve())
    return tmp_path


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The verb on the nano base models; what it printed, or the one line of its refusal."""

    def run(source: Path, out: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["easyref", *["convert", str(source), str(out), "--params", "params.yaml"], *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        if ended.value.code in (0, None):
            return printed.out
        assert ended.value.code == 2 and not printed.out
        return printed.err.splitlines()[-1]

    return run


def refused(out: Path, message: str, *parts: str) -> None:
    """All of `parts` are said, and nothing is left of the attempt."""
    assert not [part for part in parts if part not in message], message
    assert not out.exists() and not list(out.parent.glob(f".{out.name}.*"))


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]


def test_a_published_file_becomes_a_checkpoint_that_computes_the_same_and_back(
    place: Path, original: Original, convert: Callable[..., str]
) -> None:
    save_file(original.published, place / "model.safetensors")
    printed = convert(place / "model.safetensors", place / "released")
    assert f"{TOKENS} reference tokens, its own MLLM, LoRA of rank {RANK}" in printed and "left out" not in printed
    config = weights.read_config(place / "released")
    assert (config.lora_rank, config.lora_alpha, config.has_mllm, config.base_id) == (RANK, RANK, True, "base/diffusion")
    assert {field: getattr(config.reference, field) for field in SWITCHES["released"]} == SWITCHES["released"]

    easyref = EasyRef.from_pretrained(place / "released", device="cpu")  # the path of every checkpoint
    processor = ReferenceProcessor.from_pretrained(str(BASE / "mllm"), original.encoder.config)
    inputs = processor([[Image.radial_gradient("L"), Image.linear_gradient("L")]], ["a farmer"])
    with torch.no_grad():
        tokens_BTX = original.encoder(inputs)
        assert torch.equal(easyref.encoder(inputs), tokens_BTX)
        g = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        added = {
            "text_embeds": draw(
                1, original.unet.config.projection_class_embeddings_input_dim - 6 * original.unet.config.addition_time_embed_dim
            ),
            "time_ids": draw(1, 6),
            "image_embeds": [tokens_BTX[:, None]],
        }
        side, channels = original.unet.config.sample_size, original.unet.config.in_channels
        inputs_of_unet = draw(1, channels, side, side), torch.tensor(37), draw(1, 7, tokens_BTX.shape[-1])
        ours, theirs = (u(*inputs_of_unet, added_cond_kwargs=added).sample for u in (easyref.pipe.unet, original.unet))
        added["image_embeds"] = [torch.zeros_like(tokens_BTX[:, None])]
        without = original.unet(*inputs_of_unet, added_cond_kwargs=added).sample
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() < (without - theirs).abs().max()  # LoRA is merged in one

    convert(place / "released", place / "back.safetensors")
    again = load_file(place / "back.safetensors")
    # For the published training code, which loads a whole Qwen2-VL.
    assert torch.equal(again.pop("multimodal_llm.lm_head.weight"), again["multimodal_llm.model.embed_tokens.weight"])
    equal(again, original.published)
    convert(place / "back.safetensors", place / "twice")
    assert (place / "twice" / weights.WEIGHTS).read_bytes() == (place / "released" / weights.WEIGHTS).read_bytes()


def alignment(original: Original) -> dict[str, Tensor]:
    return {name: t for name, t in original.published.items() if not name.startswith("multimodal_llm.") and "_lora." not in name}


def test_the_alignment_stage_has_neither_mllm_nor_lora(place: Path, original: Original, convert: Callable[..., str]) -> None:
    save_file(alignment(original), place / "model.safetensors")
    assert "the base's MLLM, no LoRA" in convert(place / "model.safetensors", place / "released")
    config = weights.read_config(place / "released")
    assert (config.lora_rank, config.lora_alpha, config.has_mllm) == (None, None, False)
    convert(place / "released", place / "back.safetensors")
    equal(load_file(place / "back.safetensors"), alignment(original))


def test_what_a_training_saves_besides_is_left_out_and_named(place: Path, original: Original, convert: Callable[..., str]) -> None:
    """Under DDP, with the whole UNet and MLLM, the adapters a second time, in the spelling of a later transformers."""
    save_file(original.published, place / "plain.safetensors")
    convert(place / "plain.safetensors", place / "plain")
    named = {
        name.replace("multimodal_llm.model.", "multimodal_llm.model.language_model.").replace(
            "multimodal_llm.visual.", "multimodal_llm.model.visual."
        ): t
        for name, t in original.published.items()
    }
    frozen = UNet2DConditionModel.from_pretrained(BASE / "diffusion" / "unet").state_dict()
    named |= {f"unet.{name}": tensor for name, tensor in frozen.items()} | {
        "multimodal_llm.lm_head.weight": original.published["multimodal_llm.model.embed_tokens.weight"].clone(),
        "adapter_modules.1.to_k_ip.weight": torch.zeros(2, 2),
    }
    save_file({f"module.{name}": tensor for name, tensor in named.items()}, place / "model.safetensors")
    printed = convert(place / "model.safetensors", place / "released")
    for left_out in (
        f"left out, the frozen UNet: module.unet.add_embedding.linear_1.bias and {len(frozen) - 1} more\n",
        "left out, what unet.*.processor has, a second time: module.adapter_modules.1.to_k_ip.weight\n",
        "left out, the MLLM's output layer: module.multimodal_llm.lm_head.weight\n",
    ):
        assert left_out in printed
    assert (place / "released" / weights.WEIGHTS).read_bytes() == (place / "plain" / weights.WEIGHTS).read_bytes()


def test_tied_embeddings_may_stand_under_the_name_of_the_output_layer(
    place: Path, original: Original, convert: Callable[..., str]
) -> None:
    named = dict(original.published)
    named["multimodal_llm.lm_head.weight"] = named.pop("multimodal_llm.model.embed_tokens.weight")
    save_file(named, place / "model.safetensors")
    assert "left out" not in convert(place / "model.safetensors", place / "released")
    stored = load_file(place / "released" / weights.WEIGHTS)
    assert torch.equal(stored["encoder.mllm.language_model.embed_tokens.weight"], named["multimodal_llm.lm_head.weight"])


def test_what_does_not_fit_is_listed_and_nothing_is_written(place: Path, original: Original, convert: Callable[..., str]) -> None:
    named, out = dict(original.published), place / "released"
    for name in [name for name in named if "visual.blocks.0." in name]:
        del named[name]
    named |= {"unet.conv_in.wait": torch.zeros(1), "multimodal_llm.extra": torch.zeros(1)}
    lora = next(name for name in named if name.endswith("to_v_lora.up.weight"))
    named[lora] = torch.zeros(len(named[lora]), RANK + 1)
    named["image_proj_model.proj.3.weight"] = torch.zeros(7)
    save_file(named, place / "model.safetensors")
    message = convert(place / "model.safetensors", out)
    refused(
        out, message, "model.safetensors does not fit base/diffusion with base/mllm: ",
        "missing: multimodal_llm.visual.blocks.0.attn.proj.bias, ", " and 9 more; ",
        "extra: multimodal_llm.extra, unet.conv_in.wait; ",
        "misshapen: image_proj_model.proj.3.weight [7] instead of [", f"{lora} [{len(named[lora])}, {RANK + 1}] instead of [",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"],
            "is an IP-Adapter checkpoint (image_proj.*, ip_adapter.*), not one of EasyRef",
        ),
        (["image_proj_model.proj.weight", "adapter_modules.1.to_k_ip.weight"], "of its 2 tensors none is in mllm_final_layer.*"),
        (["mllm_final_layer.norm.weight", "module.mllm_final_layer.norm.weight"], "are one tensor under two names"),
    ],
)
def test_other_kinds_are_told_apart(place: Path, names: list[str], said: str, convert: Callable[..., str]) -> None:
    save_file({name: torch.zeros(2) for name in names}, place / "model.safetensors")
    refused(place / "released", convert(place / "model.safetensors", place / "released"), said)


def test_torn_and_foreign_files_are_refused(place: Path, original: Original, convert: Callable[..., str]) -> None:
    whole, out = place / "model.safetensors", place / "released"
    save_file(original.published, whole)
    whole.write_bytes(whole.read_bytes()[:-1])
    refused(out, convert(whole, out), "no whole safetensors file", "fetch it again")
    (place / "text").write_text("hello, this is no model")
    refused(out, convert(place / "text", out), "no whole safetensors file")
    save_file({"mllm_final_layer.norm.weight": torch.zeros(2, dtype=torch.int8)}, whole)
    refused(out, convert(whole, out), "mllm_final_layer.norm.weight is stored as I8")
    refused(out, convert(place / "nowhere", out), "no such file or checkpoint folder")
    assert "is there already" in convert(whole, place / "text")
    assert (place / "text").read_text() == "hello, this is no model"


def test_a_pickle_needs_trust_and_gives_the_same(place: Path, original: Original, convert: Callable[..., str]) -> None:
    """As DeepSpeed writes it: under `module`, tensors that are tied or there twice, and settings of other types around them."""
    tied = original.published["multimodal_llm.model.embed_tokens.weight"]
    key = next(name for name in original.published if name.endswith("to_k_ip.weight"))
    named = original.published | {"multimodal_llm.lm_head.weight": tied, "adapter_modules.1.to_k_ip.weight": original.published[key]}
    state = {"module": named, "optimizer": None, "param_shapes": [{"a": torch.Size([2])}], "sparse": set(), "global_steps": 7}
    torch.save(state, place / "mp_rank_00_model_states.pt")
    refused(
        place / "released", convert(place / "mp_rank_00_model_states.pt", place / "released"), "can run any program", "--trust-pickle"
    )
    printed = convert(place / "mp_rank_00_model_states.pt", place / "released", "--trust-pickle")
    assert "left out, the MLLM's output layer" in printed
    save_file(original.published, place / "model.safetensors")
    convert(place / "model.safetensors", place / "plain")
    assert (place / "released" / weights.WEIGHTS).read_bytes() == (place / "plain" / weights.WEIGHTS).read_bytes()
    assert sorted(path.name for path in (place / "released").iterdir()) == [weights.CONFIG, weights.WEIGHTS]


class Program:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_program_in_a_trusted_pickle_does_not_run(place: Path, convert: Callable[..., str]) -> None:
    out = place / "released"
    torch.save({"module": {"a": Program(place / "ran")}}, place / "bad.pt")
    refused(out, convert(place / "bad.pt", out, "--trust-pickle"), "bad.pt: more than tensors and plain values is in it (posix.mkdir)")
    assert not (place / "ran").exists()
    torch.load(place / "bad.pt", weights_only=False)  # it would have
    assert (place / "ran").exists()


def test_pickles_of_other_kinds_are_told_apart(place: Path, convert: Callable[..., str]) -> None:
    torch.save({"image_proj": {"latents": torch.zeros(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)}}, place / "ip.bin")
    stream._unpickle(place / "ip.bin", place / "ip.safetensors")  # as --trust-pickle does in a process of its own
    refused(place / "released", convert(place / "ip.safetensors", place / "released"), "is an IP-Adapter checkpoint")
    for state, said in (
        ({"epoch": 3}, "'epoch' is int, not a tensor"),
        ({"module": {"a": torch.zeros(2).int()}}, "'a' is torch.int32"),
    ):
        torch.save(state, place / "model.bin")
        with pytest.raises(ValueError, match=said):
            stream._unpickle(place / "model.bin", place / "made")
    (place / "bare.bin").write_bytes(pickle.dumps({"module": {"a": Program(place / "ran")}}, protocol=2))  # as before torch 1.6
    refused(place / "released", convert(place / "bare.bin", place / "released"), "bare.bin is a pickle", "--trust-pickle")
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        stream._unpickle(place / "bare.bin", place / "made")
    assert not (place / "ran").exists() and not (place / "made").exists()


def test_dtypes_are_kept_or_the_one_that_is_asked_for(place: Path, original: Original, convert: Callable[..., str]) -> None:
    mixed = {name: t.bfloat16() if name.startswith("mllm_final_layer.") else t for name, t in alignment(original).items()}
    mixed["mllm_final_layer.norm.weight"] = mixed["mllm_final_layer.norm.weight"].half()
    save_file(mixed, place / "model.safetensors")
    convert(place / "model.safetensors", place / "kept")
    convert(place / "kept", place / "back.safetensors")
    equal(load_file(place / "back.safetensors"), mixed)
    convert(place / "model.safetensors", place / "half", "--dtype", "bf16")
    convert(place / "half", place / "half.safetensors")
    equal(load_file(place / "half.safetensors"), {name: t.bfloat16() for name, t in mixed.items()})


def test_every_tensor_of_a_file_lies_at_a_multiple_of_its_item(tmp_path: Path) -> None:
    """Readers map files into memory, and not all of them take a number across its bounds."""
    path = tmp_path / "a.safetensors"
    named = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2, 3).T, "c": torch.randn(1).double(), "d": torch.ones(1).expand(5)}
    stream.write(path, {n: stream.Entry(t.dtype, tuple(t.shape)) for n, t in named.items()}, named.__getitem__, {"about": "é"}, "")
    equal(load_file(path), named)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert header.pop("__metadata__") == {"about": "é"}
    assert not [name for name, part in header.items() if (8 + length + part["data_offsets"][0]) % named[name].itemsize]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_half_written(
    place: Path, original: Original, convert: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    save_file(original.published, place / "model.safetensors")
    convert(place / "model.safetensors", place / "kept")
    request.getfixturevalue("full_disk")
    refused(place / "out", convert(place / "model.safetensors", place / "out"), "File too large; nothing was written")
    refused(place / "b.safetensors", convert(place / "kept", place / "b.safetensors"), "File too large; nothing was written")


def test_the_published_code_is_not_given_what_it_would_compute_otherwise(
    place: Path, original: Original, convert: Callable[..., str]
) -> None:
    out = place / "back.safetensors"
    refused(out, convert(MODELS / "pretrain", out), "the published code computes with ", "its tokens would be others")
    save_file(original.published, place / "model.safetensors")
    convert(place / "model.safetensors", place / "kept")
    refused(place / "back.bin", convert(place / "kept", place / "back.bin"), ".safetensors; call it so")
    named, config = load_file(place / "kept" / weights.WEIGHTS), weights.read_config(place / "kept")
    weights.save(place / "loud", named, config.model_copy(update={"lora_alpha": 2.0 * RANK}), torch.float32)
    refused(out, convert(place / "loud", out), f"adds LoRA {2.0 * RANK}/{RANK} times")
    schedule = Schedule(zero_terminal_snr=True, prediction="v_prediction")
    weights.save(place / "v", named, config.model_copy(update={"schedule": schedule}), torch.float32)
    refused(out, convert(place / "v", out), "another noise schedule")
    named.pop("encoder.norm.weight")
    weights.save(place / "torn", named, config, torch.float32)
    refused(out, convert(place / "torn", out), "does not fit base/diffusion with base/mllm: missing: encoder.norm.weight")
    (place / "torn" / weights.WEIGHTS).write_bytes((place / "kept" / weights.WEIGHTS).read_bytes()[:-1])
    refused(out, convert(place / "torn", out), "no whole safetensors file", "fetch the folder again")


# -- at real size ------------------------------------------------------------------------------------------------------


def sdxl() -> dict[str, tuple[int, ...]]:
    """The published tensors of SDXL base 1.0 with Qwen2-VL-2B, counted out by hand."""
    d, kv, ff, v, rank, text = 1536, 256, 8960, 1280, 128, 2048
    layer = {
        "self_attn.q_proj.weight": (d, d), "self_attn.q_proj.bias": (d,), "self_attn.k_proj.weight": (kv, d),
        "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.weight": (kv, d), "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (d, d), "mlp.gate_proj.weight": (ff, d), "mlp.up_proj.weight": (ff, d),
        "mlp.down_proj.weight": (d, ff), "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    block = {
        "norm1.weight": (v,), "norm1.bias": (v,), "norm2.weight": (v,), "norm2.bias": (v,), "attn.qkv.weight": (3 * v, v),
        "attn.qkv.bias": (3 * v,), "attn.proj.weight": (v, v), "attn.proj.bias": (v,), "mlp.fc1.weight": (4 * v, v),
        "mlp.fc1.bias": (4 * v,), "mlp.fc2.weight": (v, 4 * v), "mlp.fc2.bias": (v,),
    }  # fmt: skip
    named: dict[str, tuple[int, ...]] = {
        "image_proj_model.proj.0.weight": (d, d), "image_proj_model.proj.0.bias": (d,), "image_proj_model.proj.2.weight": (text, d),
        "image_proj_model.proj.2.bias": (text,), "image_proj_model.proj.3.weight": (text,), "image_proj_model.proj.3.bias": (text,),
        "mllm_final_layer.reference_tokens": (64, d), "mllm_final_layer.norm.weight": (d,),
        "multimodal_llm.visual.patch_embed.proj.weight": (v, 3, 2, 14, 14), "multimodal_llm.visual.merger.ln_q.weight": (v,),
        "multimodal_llm.visual.merger.ln_q.bias": (v,), "multimodal_llm.visual.merger.mlp.0.weight": (4 * v, 4 * v),
        "multimodal_llm.visual.merger.mlp.0.bias": (4 * v,), "multimodal_llm.visual.merger.mlp.2.weight": (d, 4 * v),
        "multimodal_llm.visual.merger.mlp.2.bias": (d,), "multimodal_llm.model.embed_tokens.weight": (151_936, d),
        "multimodal_llm.model.norm.weight": (d,), "multimodal_llm.lm_head.weight": (151_936, d),
    }  # fmt: skip
    named |= {f"mllm_final_layer.layers.0.{name}": shape for name, shape in layer.items()}
    named |= {f"multimodal_llm.model.layers.{i}.{name}": shape for i in range(27) for name, shape in layer.items()}
    named |= {f"multimodal_llm.visual.blocks.{i}.{name}": shape for i in range(32) for name, shape in block.items()}
    for part, transformers, depth, c in (
        ("down_blocks.1", 2, 2, 640), ("down_blocks.2", 2, 10, 1280), ("mid_block", 1, 10, 1280),
        ("up_blocks.0", 3, 10, 1280), ("up_blocks.1", 3, 2, 640),
    ):  # fmt: skip
        for at in (f"unet.{part}.attentions.{i}.transformer_blocks.{j}" for i in range(transformers) for j in range(depth)):
            for attention, context in (("attn1", c), ("attn2", text)):
                for projection, width in (("q", c), ("k", context), ("v", context), ("out", c)):
                    named[f"{at}.{attention}.processor.to_{projection}_lora.down.weight"] = (rank, width)
                    named[f"{at}.{attention}.processor.to_{projection}_lora.up.weight"] = (c, rank)
            named |= {f"{at}.attn2.processor.to_{projection}_ip.weight": (c, text) for projection in "kv"}
    return named


def write_sparse(path: Path, named: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """A bf16 file of zeros, which takes no room on the disk, but for the first number of each tensor: its mark, which is returned."""
    header, end = {}, 0
    for name, shape in named.items():
        start, end = end, end + 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    marks = {name: number + 1 for number, name in enumerate(named)}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, mark in marks.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(struct.pack("<H", mark))
        file.truncate(8 + len(text) + end)
    return marks


def test_every_published_name_and_shape_of_real_size_has_its_place(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_sparse(file, sdxl())
    config, origin, left_out = fit(load_params(Path("presets/sdxl.yaml")), file, stream.entries(file), tmp_path / "released")
    assert left_out == {"the MLLM's output layer": ["multimodal_llm.lm_head.weight"]}
    assert {*origin.values(), "multimodal_llm.lm_head.weight"} == sdxl().keys() and len(origin) == len(sdxl()) - 1
    assert (config.lora_rank, config.lora_alpha, config.has_mllm) == (128, 128, True)
    assert (config.base_id, config.base_revision) == (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
    )
    assert (config.mllm_id, config.mllm_revision) == ("Qwen/Qwen2-VL-2B-Instruct", "895c3a49bc3fa70a340399125c650a463535e71c")
    assert config.reference.model_dump(include={"num_tokens", "cross_attention_dim", "patch_size", "max_references"}) == {
        "num_tokens": 64, "cross_attention_dim": 2048, "patch_size": 14, "max_references": 112,
    }  # fmt: skip


#: Runs a program and prints its peak memory in KiB. A process's peak counts what the one that forked it had, so a small one starts it.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.long
def test_a_file_of_real_size_goes_there_and_back_in_little_memory(tmp_path: Path) -> None:
    file, folder, again = tmp_path / "model.safetensors", tmp_path / "released", tmp_path / "back.safetensors"
    marks = write_sparse(file, sdxl())
    for source, out in ((file, folder), (folder, again)):
        words = [sys.executable, "-c", MEASURED, sys.executable, "-m", "easyref.cli", "convert", str(source), str(out)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0
        assert int(done.stdout.split()[-1]) < 2 * 2**20, done.stdout  # KiB; the file is 5.6 GiB
    assert weights.read_config(folder).has_mllm
    (tmp_path / "released" / weights.WEIGHTS).unlink()
    marks["multimodal_llm.lm_head.weight"] = marks["multimodal_llm.model.embed_tokens.weight"]
    with safe_open(again, framework="pt") as found:
        assert {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()} == sdxl()  # noqa: SIM118
        for name, mark in marks.items():
            tensor = found.get_tensor(name)
            assert (
                tensor.dtype == torch.bfloat16 and int(tensor.flatten()[0].view(torch.int16)) == mark and not tensor.flatten()[1:].any()
            )
    again.unlink()

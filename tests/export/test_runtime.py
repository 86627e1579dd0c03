"""The engines' side of a drawing without an export: the graphs' own torch modules in their place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from easyref.pipeline import EasyRef, Request
from easyref.records import sha256_file
from easyref.runtime import Engines
from export.graphs import graphs

CHECKPOINT = Path("models/pretrain")


def test_modules_in_the_place_of_graphs_draw_what_torch_draws() -> None:
    torch.set_num_threads(1)
    easyref = EasyRef.from_pretrained(CHECKPOINT, device="cpu")
    requests = [Request("farmer", [Image.new("RGB", (70, 50), "red")], 3, "blue", [2.0]), Request("star", [], 4)]
    given = {"steps": 2, "guidance": 3.0, "scale": 0.5, "window": (0.0, 0.5)}
    ours = [np.asarray(image, np.float64) for image in easyref(requests, **given)]
    modules = {graph.name: torch.no_grad()(graph.module) for graph in graphs(easyref)}
    files = {f"pretrain/{path.name}": sha256_file(path) for path in CHECKPOINT.iterdir()}
    drawn_by = Engines(modules, {"files": {}, "inputs": {"files": files}}, "torch")
    drawn = EasyRef.from_pretrained(CHECKPOINT, engines=drawn_by)
    for one, other in zip(ours, drawn(requests, **given), strict=True):
        assert one.std() > 5 and np.abs(one - np.asarray(other)).max() <= 2
    assert {p.device.type for part in (drawn.pipe.unet, drawn.pipe.vae, drawn.pipe.text_encoder_2) for p in part.parameters()} == {
        "meta"
    }
    euler = EulerDiscreteScheduler.from_config(drawn.pipe.scheduler.config, timestep_spacing="linspace", rescale_betas_zero_snr=False)
    drawn.pipe.scheduler = euler
    with pytest.raises(RuntimeError, match=r"takes whole timesteps, not 499\.50; take a scheduler that has them"):
        drawn(requests[:1], steps=3)
    drawn_by.manifest["inputs"]["files"] = dict.fromkeys(files, "other")
    with pytest.raises(RuntimeError, match="not what the graphs were made of; `easyref export models/pretrain`"):
        EasyRef.from_pretrained(CHECKPOINT, engines=drawn_by)

"""Processes for tests that kill them: every one is new, but the imports (seconds) happen once, in multiprocessing's fork server."""

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = [
    "tests.test_stages", "tests.test_trainer",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.schedulers",
    "transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.clip.modeling_clip", "transformers.models.auto",
]  # fmt: skip


def start(target: Callable[..., None], *arguments: Any) -> Any:
    server: Any = forkserver._forkserver  # one for the whole process: what a test ran in it may have started it with other imports
    if server._preload_modules != IMPORTS:
        server._stop()
        CONTEXT.set_forkserver_preload(IMPORTS)
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def exit_code(process: Any) -> int:
    """Waits for the end; minus the signal's number if one ended the process."""
    process.join()
    return process.exitcode

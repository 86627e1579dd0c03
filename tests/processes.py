"""Processes for tests that kill them: every one is new, but the imports (seconds) happen once, in multiprocessing's fork server."""

import multiprocessing
import os
import socket
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


def start_together(target: Callable[..., None], *arguments: Any, world: int = 2, shard: str | None = None) -> list[Any]:
    """`target` on `world` processes, as `accelerate launch` starts them on CPUs. `shard`: with FSDP2, and its reshard_after_forward."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"ACCELERATE_USE_CPU": "true"}
    if shard:
        common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": shard}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [start(_with_environment, environment, target, *arguments) for environment in ranks]


def _with_environment(environment: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    target(*arguments)


def exit_code(process: Any) -> int:
    """Waits for the end; minus the signal's number if one ended the process."""
    process.join()
    return process.exitcode

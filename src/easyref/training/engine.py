"""The processes of one training, which `accelerate launch` or torchrun starts: one, several with a copy of the model each (DDP), or
several that hold a share of its weights, gradients and moments each (FSDP2, `--use_fsdp --fsdp_version 2`).

FSDP2 gathers the weights of a block when it runs. `--fsdp_reshard_after_forward false` keeps them until its backward pass has run: what
stays sharded is then gradients and moments, as in the paper's ZeRO-2 (and weights between steps); `true` is the full shard. What is
frozen every process has whole: where encodings are kept, one may have nothing to compute when another has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

V = TypeVar("V")

#: Modules that FSDP2 gathers one at a time.
BLOCKS = ("Qwen2VLDecoderLayer", "Qwen2VLVisionBlock", "BasicTransformerBlock", "ResnetBlock2D")


class Step(nn.Module):
    """What DDP and FSDP2 wrap: `step(call)` is `call()`, as the forward of all modules in training."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class Engine:
    """Without an accelerator: this process alone."""

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.world = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.main = self.rank == 0
        self.sharding = self.world > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"  # as `accelerate launch` passes it on
        self.step: Any = None
        self.dtype = torch.bfloat16 if accelerator and accelerator.mixed_precision == "bf16" else torch.float32

    def say(self, line: str) -> None:
        """Once, not on every process."""
        if self.main:
            print(line)

    def wrap(self, modules: Sequence[nn.Module], parameters: dict[str, nn.Parameter], shard: bool) -> dict[str, nn.Parameter]:
        """Make `modules` train together; `parameters` (of theirs) as they are afterwards: FSDP2 puts shards in their places. Without
        `shard` every process keeps a copy all the same."""
        self.step = Step(modules)
        if self.world == 1:
            return parameters
        if shard and self.sharding:
            names = {parameter: name for name, parameter in self.step.named_parameters()}
            _fully_shard(self.step, self.accelerator.mixed_precision)
            now = dict(self.step.named_parameters())
            return {name: now[names[parameter]] for name, parameter in parameters.items()}
        device = self.accelerator.device
        self.step = nn.parallel.DistributedDataParallel(
            self.step, [device] if device.type == "cuda" else None, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        return parameters

    def backward(self, loss: Callable[[], Tensor], last: bool) -> float:
        """Forward and backward pass; `last` of an update: then gradients become the mean over the processes."""
        with self._local() if self.world > 1 and not last else nullcontext():
            result = self.step(loss)
            result.backward()
            return result.item()

    @contextmanager
    def _local(self) -> Iterator[None]:
        if hasattr(self.step, "no_sync"):  # DDP
            with self.step.no_sync():
                yield
        else:
            self.step.set_requires_gradient_sync(False)
            yield
            self.step.set_requires_gradient_sync(True)

    @torch.no_grad()
    def run(self, call: Callable[[], V]) -> V:
        """`call()` on the modules as they are now, on every process alike."""
        result = self.step(call)
        self.settle()
        return result

    def settle(self) -> None:
        """Forget gathered weights: what the modules show are shards, and the next forward gathers what these then are."""
        for module in self.step.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of each in main memory, on the main process; on the others none."""
        gathered = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.main:
                gathered[name] = full.detach().cpu().contiguous()
        return gathered

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes may share; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """`whole` on the device of `tensor`, and of it the same share."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    return whole.to(tensor.device)


def _fully_shard(step: Step, precision: str) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin: Any = FullyShardedDataParallelPlugin()  # by the options of the launch; accelerate itself takes them on GPUs only
    if plugin.fsdp_version != 2:
        raise ValueError("training needs FSDP2; launch with --fsdp_version 2")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)  # the shards stay in single precision
    options: dict[str, Any] = {
        "ignored_params": {parameter for parameter in step.parameters() if not parameter.requires_grad},
        "mp_policy": half if precision == "bf16" else MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    for name, module in list(step.named_modules()):
        called = not name.endswith(".final_layer")  # of that only the parts are
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if called and trains and type(module).__name__ in BLOCKS:
            fully_shard(module, **options)
    fully_shard(step, **options)

"""What a torch call costs: FLOP and bytes, counted on tensors of the meta device (nothing is computed) or on real ones; and how
fast a device multiplies matrices.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
#: torch's FLOP formulas, also for the fused attention of the CPU.
FORMULAS: Final = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}
#: The part of autocast's lists (CUDA) that these models use: in half precision, in single precision.
HALF: Final = {F.linear, F.conv2d, F.conv3d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__}
FULL: Final = {F.layer_norm, F.group_norm}


class Cost(NamedTuple):
    flop: int  # matrix products, convolutions and attention; a multiply-add is two
    peak: int  # bytes held at once, at most, of what the call itself allocates


class Meter(TorchDispatchMode):
    """Counts all operators below it, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.peak = self._held = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in FORMULAS:
            self.flop += FORMULAS[func._overloadpacket](*args, **kwargs, out_val=out)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._alive:  # neither a view of an input nor in place
                self._alive[key] = weakref.ref(storage, partial(self._free, key, size))
                self._held += size
        self.peak = max(self.peak, self._held)
        return out

    def _free(self, key: int, size: int, _: weakref.ref) -> None:
        del self._alive[key]
        self._held -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in nested containers; torch's own tree functions take ten times as long."""
    if isinstance(tree, Tensor):
        yield tree.untyped_storage()
    elif isinstance(tree, (tuple, list, dict)):
        for leaf in tree.values() if isinstance(tree, dict) else tree:
            yield from _storages(leaf)


class DeviceKernels(TorchFunctionMode):
    """On the meta device, what a real one would do: attention in one fused kernel (meta would take the unfused one, which keeps
    every attention matrix), and autocast to bf16 (which skips meta tensors)."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.autocast = precision == "bf16"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        fused = func is F.scaled_dot_product_attention
        if self.autocast and (fused or func in HALF or func in FULL):
            dtype = torch.float32 if func in FULL else torch.bfloat16
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        if fused:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return func(*args, **kwargs)


def measure(call: Callable[[], Tensor], precision: str) -> Cost:
    """Cost of `call` on the meta device and, if its result has a gradient, of the backward pass from its sum."""
    with Meter() as meter, DeviceKernels(precision):
        out = call()
        if out.requires_grad:
            out.sum().backward()
    return Cost(meter.flop, meter.peak)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on the device: the fastest of those that fit into about `seconds`."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.ones(side, side, device=device, dtype=dtype)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)

"""GRAPH SAMPLES MODE OUT: run by the Python that EASYREF_MODELOPT names, which has nvidia-modelopt; nothing here imports it.

modelopt's own command splits its samples along their first axis, which a scalar (the timestep) has not: here they are read one by one.
"""

import sys
from typing import Any

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization import CalibrationDataReader

FULL = ("conv_in.weight", "conv_out.weight", "conv_shortcut.weight")  # too sensitive, as in NVIDIA's recipe for SDXL


class Samples(CalibrationDataReader):
    """Inputs of the graph, stacked by name."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            columns = dict(file)
        self.rows = [dict(zip(columns, map(np.asarray, row), strict=True)) for row in zip(*columns.values(), strict=True)]
        self.rewind()

    def get_first(self) -> dict[str, Any]:
        return self.rows[0]

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)

    def rewind(self) -> None:
        self.left = iter(self.rows)


if __name__ == "__main__":
    graph, samples, mode, out = sys.argv[1:]
    nodes = onnx.load(graph, load_external_data=False).graph.node
    full = [f"^{node.name}$" for node in nodes if any(name.endswith(FULL) for name in node.input)]
    # Convolutions and the linear layers of blocks. Not time embeddings (Gemm), residual sums, nor the products within attention.
    quantize(
        graph, quantize_mode=mode, calibration_data_reader=Samples(samples), calibration_method="max", calibration_eps=["cpu"],
        op_types_to_quantize=["Conv", "MatMul"], nodes_to_exclude=full, disable_mha_qdq=True, high_precision_dtype="fp32",
        dq_only=True, output_path=out, log_level="WARNING",
    )  # fmt: skip

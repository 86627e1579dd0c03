"""Build programs: a checkpoint → ONNX graphs that are verified against torch. `python -m export --help`."""

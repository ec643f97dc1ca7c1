"""Checkpoint -> artifact, one command per runtime."""

import os

# ONNX Runtime 1.31 for Linux reports to its makers; the variable is read when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

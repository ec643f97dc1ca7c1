"""What all stages share: the network, its preprocessing, the file formats and the runtimes."""

import os
from pathlib import Path

# A checkout, or src/ in a bento. No other file knows how deep it lies.
PROJECT_ROOT = Path(__file__).resolve().parent.parent

# ONNX Runtime 1.31 for Linux reports to its makers; the variable is read when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

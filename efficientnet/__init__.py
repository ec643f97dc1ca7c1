"""What all stages share: the network, its preprocessing, the file formats and the runtimes."""

import os

# ONNX Runtime 1.31 for Linux reports to its makers; the variable is read when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

"""Checkpoint -> TensorRT engine; today it tells what is missing for one.

python export/trt.py
python export/trt.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint
"""

import importlib.util
import shutil
import subprocess
from typing import NoReturn

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from export.config import ExportConfig


class TensorRTError(PipelineError):
    """An engine that cannot be built here."""


def main(config: ExportConfig) -> NoReturn:
    """Check for a GPU and for TensorRT.

    Raises:
        TensorRTError: always; the message says what is missing and what to do.
    """
    require_gpu()
    require_tensorrt()
    raise TensorRTError(
        "GPU and TensorRT are here, but this version of the project does not build engines: "
        "'python export/ort.py' writes artifacts/<variant>/onnxruntime-fp32/model.onnx, "
        "which TensorRT's own tools take"
    )


def require_gpu() -> None:
    """Check that an NVIDIA driver answers.

    Raises:
        TensorRTError: it does not.
    """
    answer = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    )
    if not answer or answer.returncode != 0 or not answer.stdout.strip():
        raise TensorRTError(
            "no NVIDIA GPU answers here (nvidia-smi), and an engine is built for the GPU it runs "
            "on: run this command on that machine, with NVIDIA's driver (580 or newer for CUDA 13) "
            "and 'pip install tensorrt-cu13'; "
            "here 'python export/ort.py' makes an artifact for the CPU"
        )


def require_tensorrt() -> None:
    """Check that TensorRT is installed.

    Raises:
        TensorRTError: it is not.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise TensorRTError(
            "TensorRT is not installed: 'pip install tensorrt-cu13' (driver 580 or newer; pip "
            "fetches its libraries from NVIDIA), or 'tensorrt-cu12==10.4.0' for a V100, which "
            "later versions have dropped"
        )


if __name__ == "__main__":
    run_command(lambda: parse_flags(ExportConfig, __doc__), main)

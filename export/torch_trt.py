"""Checkpoint -> TensorRT engine inside a torch program (torch-tensorrt), checked like all others.

    python export/torch_trt.py
    python export/torch_trt.py --precision bf16 --batches 1 8 16
    python export/torch_trt.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batch 1 16 64

A program runs on the GPU and the versions that built it, so this command is run there.
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import TorchTrtConfig

main = late("export.builders.torch_tensorrt_builder")

if __name__ == "__main__":
    run_command(lambda: parse_flags(TorchTrtConfig, __doc__), main)

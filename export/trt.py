"""Checkpoint -> TensorRT or TensorRT-RTX engine, checked against the eager model.

    python export/trt.py
    python export/trt.py --precision int8 --batches 1 8 16
    python export/trt.py --flavor rtx --batch 1 16 64 --checkpoint runs/latest/checkpoint

An engine runs on the GPU model and the version that built it, so this command is run there.
TensorRT-RTX builds without a GPU, too; such an artifact is refused until export/parity.py has
checked it on one.
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import TrtConfig

main = late("export.builders.tensorrt_export")

if __name__ == "__main__":
    run_command(lambda: parse_flags(TrtConfig, __doc__), main)

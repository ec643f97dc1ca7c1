"""Checkpoint -> ONNX Runtime artifact for its CPU, CUDA or TensorRT provider, checked.

python export/ort.py
python export/ort.py --precision int8 --max-drop 0.5
python export/ort.py --provider cuda --precision fp16 --batches 1 16
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import OrtConfig

main = late("export.builders.onnxruntime_builder", ["onnxruntime"])

if __name__ == "__main__":
    run_command(lambda: parse_flags(OrtConfig, __doc__), main)

"""Checkpoint -> what the stock tools make of it by their front doors, and our times beside theirs.

The stock artifacts: torch.onnx.export's file as it is, run by ONNX Runtime and by OpenVINO in its
default precision; what ONNX Runtime's quantize_static and NNCF's quantize make of that file.

    python export/stock.py artifacts/v2-s/openvino-int8 artifacts/v2-s/onnxruntime-int8
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.study_config import StockConfig

main = late("export.studies.stock_comparison")

if __name__ == "__main__":
    run_command(lambda: parse_flags(StockConfig, __doc__), main)

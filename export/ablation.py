"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime.

    python export/ablation.py
    python export/ablation.py --runtimes onnxruntime openvino --seconds 60 --publish

Three forms of the same network: as it is written; with batch norm folded into the convolutions;
and with squeeze-excite in the form that export_onnx gives it as well. For each: latency, agreement
with the eager model, and how many layers or operators are executed, where the runtime tells. A gain
of nothing is printed as that.

The rows of CUDA and TensorRT have not run so far, for lack of a GPU.
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.study_config import AblationConfig

main = late("export.studies.form_comparison")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AblationConfig, __doc__), main)

"""Artifacts -> where the time of a call goes, layer by layer, as the runtime's own profile tells.

ONNX Runtime on the CPU, OpenVINO and the native engine tell. Measuring each layer takes time
itself, so the sum over the layers stands beside a call without a profile. Several artifacts are
measured one after the other, and their kinds of layers are set side by side.

    python perf/layers.py artifacts/v2-s/openvino-int8
    python perf/layers.py artifacts/v2-s/onnxruntime-fp32 artifacts/v2-s/openvino-fp32 --threads 1
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import LayersConfig

main = late("perf.layer_times.layers")

if __name__ == "__main__":
    run_command(lambda: parse_flags(LayersConfig, __doc__), main)

"""Flags outside their limits, or that contradict each other: refused before any work, and named."""

from functools import partial
from pathlib import Path

import pytest
from facts import raises_naming

from export.inputs import config as exports
from export.studies.all_exports import AllConfig
from export.studies.form_comparison import AblationConfig
from export.studies.stock_comparison import StockConfig
from perf.choosing.config import ChooseConfig
from perf.device_parts.config import DeviceConfig
from perf.measurements import config as measurements
from perf.regressions.config import RegressionConfig
from perf.service_load import config as load_settings
from serving.classify import ClassifyConfig
from training.studies.loader_speed_study import LoaderSpeedConfig
from training.studies.speed_plan import SpeedConfig

ORT, OV, TRT = exports.OrtConfig, exports.OpenVinoConfig, exports.TrtConfig
AOTI, TORCH_TRT = exports.AotiConfig, exports.TorchTrtConfig
PATHS = (Path("a"),)
ACCURACY = partial(measurements.AccuracyConfig, PATHS)
LAYERS = partial(measurements.LayersConfig, PATHS)
LOAD = partial(load_settings.LoadConfig, Path("artifact"), Path("photos"))
PREPROCESSING = partial(measurements.PreprocessingConfig, Path("photos"))
LATENCY, CHOOSE = measurements.LatencyConfig, partial(ChooseConfig, budget_ms=1)
REGRESSION = partial(RegressionConfig, "main")
LOADER_SPEED = partial(LoaderSpeedConfig, Path())
INT8 = {"precision": "int8"}

REFUSED = [
    (AblationConfig, {"turns": 0}, "--turns", 0),
    (AblationConfig, {"runtimes": ("torch", "torch")}, "--runtimes"),
    (AblationConfig, {"num_parity_images": 3}, "--num-parity-images", 3),
    (AllConfig, {"only": ("tflite",)}, "--only", "tflite", "ort, ov"),
    (AllConfig, INT8, "--precision", "int8"),
    (AOTI, INT8, "export/ov.py --precision int8"),
    (AOTI, {"precision": "fp8"}, "export/trt.py"),
    (TORCH_TRT, INT8, "export/trt.py --precision int8"),
    (TORCH_TRT, {"precision": "fp8"}, "export/trt.py --precision fp8"),
    (TORCH_TRT, {"optimization_level": 6}, "--optimization-level", 6, "0 to 5"),
    (TORCH_TRT, {"optimization_level": -1}, "--optimization-level", -1, "0 to 5"),
    (exports.ExportConfig, {"num_parity_images": 63}, "--num-parity-images", 63, 64),
    (exports.ExportConfig, {"num_calibration_images": 63}, "--num-calibration-images", 63, 64),
    (ORT, {"size": 31}, "--size", 31, 32),
    (ORT, {"batch": (0, 1, 2)}, "MIN <= OPT <= MAX"),
    (ORT, {"batch": (2, 1, 4)}, "MIN <= OPT <= MAX"),
    (ORT, {"batch": (1, 5, 4)}, "MIN <= OPT <= MAX"),
    # Precisions that a provider has no kernels for.
    (ORT, {"provider": "cpu", "precision": "bf16"}, "cpu", "bf16"),
    (ORT, {"provider": "cpu", "precision": "fp8"}, "cpu", "fp8"),
    (ORT, {"provider": "cuda", "precision": "int8"}, "cuda", "int8"),
    (ORT, {"provider": "tensorrt"}, "tensorrt", "fp32", "TF32", "--provider cuda"),
    (ORT, {"search": True}, "--search", "--precision int8", "fp32"),
    (ORT, {"float_layers": ("features.1",)}, "--float-layers", "--precision int8"),
    (OV, {**INT8, "search": True, "float_layers": ("x",)}, "--search", "--float-layers"),
    (ORT, {**INT8, "search": True, "provider": "tensorrt"}, "--search", "--provider cpu"),
    (StockConfig, {"batch_sizes": (0,)}, "--batch-sizes", 0),
    (
        StockConfig,
        {"paths": (Path("a/native-int8"), Path("b/native-int8"))},
        "native-int8, native-int8",
    ),
    (TRT, {"compute_capability": ("8.6",)}, "--compute-capability"),
    (TRT, {"optimization_level": 6}, "--optimization-level"),
    (DeviceConfig, {"minutes": 0}, "--minutes", 0),
    (DeviceConfig, {"parts": ()}, "--parts"),
    (ACCURACY, {"batch_size": 0}, "--batch-size", 0),
    (LATENCY, {"seconds": 0.0}, "--seconds", 0),
    (LATENCY, {"seconds": float("nan")}, "--seconds", "nan"),
    (LATENCY, {"turns": 0}, "--turns", 0),
    (LATENCY, {"threads": 0}, "--threads", 0),
    (LATENCY, {"batches": ()}, "--batches"),
    (LATENCY, {"batches": (4, 0)}, "--batches"),
    (LATENCY, {"scenarios": ()}, "--scenarios"),
    (LATENCY, {"scenarios": ("offline", "offline")}, "--scenarios"),
    (LATENCY, {"scenarios": ("offline", "at_night")}, "--scenarios"),
    (LAYERS, {"calls": 0}, "--calls", 0, "1 to 200"),
    (LAYERS, {"threads": 0}, "--threads", 0, 1),
    (LAYERS, {"batch_size": 0}, "--batch-size", 0, 1),
    (measurements.LayersConfig, {"paths": 2 * PATHS}, "a", "twice"),
    (measurements.LayersConfig, {"paths": ()}, "no artifact"),
    *((LOAD, {name: 0}, f"--{name}", 0) for name in ("seconds", "turns", "clients")),
    (LOAD, {"rates": ()}, "--rates"),
    (LOAD, {"rates": (1, -1)}, "--rates"),
    (LOAD, {"schedules": ()}, "--schedules"),
    (LOAD, {"bound_ms": 0}, "--bound-ms", 0),
    (LOAD, {"batch": 1}, "--batch", 1),
    (LOAD, {"num_photos": 0}, "--num-photos", 0),
    (measurements.NetworkConfig, {"variants": ("tiny",)}, "tiny", "symmetric"),
    (PREPROCESSING, {"size": 0}, "--size", 0),
    (PREPROCESSING, {"rounds": 0}, "--rounds", 0),
    (PREPROCESSING, {"crop_fraction": 1.5}, "--crop-fraction", 1.5),
    (CHOOSE, {"budget_ms": 0}, "--budget-ms", 0),
    (CHOOSE, {"min_top1": 90}, "--min-top1", 90),
    (CHOOSE, {"seconds": -1}, "--seconds", -1),
    (REGRESSION, {"max_slowdown": 0}, "--max-slowdown", 0),
    (REGRESSION, {"processes": 1}, "--processes", 1),
    (REGRESSION, {"rounds": 1}, "--rounds", 1),
    (REGRESSION, {"turn_seconds": 0}, "--turn-seconds", 0),
    (REGRESSION, {"exports": ()}, "--exports"),
    (ClassifyConfig, {"pictures": ("a.png",), "top_k": 0}, "--top-k", 0),
    (ClassifyConfig, {"pictures": ()}, "picture"),
    (LOADER_SPEED, {"rounds": 0}, "--rounds"),
    (LOADER_SPEED, {"num_workers": 0}, "--num-workers"),
    (LOADER_SPEED, {"magnitude": 40}, "--magnitude"),
    (LOADER_SPEED, {"image_sizes": (8,)}, "--image-sizes"),
    (SpeedConfig, {"variant": "v2-z"}, "v2-z"),
    (SpeedConfig, {"variant": "tiny", "peer": "timm"}, "timm", "tiny"),
    (SpeedConfig, {"variant": "v2-s", "table": 2}, "table 2", "b6"),
    (SpeedConfig, {"table": 2, "peer": "timm"}, "table", "peer"),
    (SpeedConfig, {"batch_sizes": (1,)}, "at least 2"),
    (SpeedConfig, {"seconds": 0.0}, "--seconds"),
    (SpeedConfig, {"threads": 0}, "--threads"),
]


@pytest.mark.parametrize(
    "case", REFUSED, ids=lambda case: f"{getattr(case[0], 'func', case[0]).__name__}-{case[1]}"
)
def test_what_cannot_be_asked_for_is_refused_and_named(case: tuple):
    config, flags, *facts = case
    with raises_naming(ValueError, *facts):
        config(**flags)

import pytest

from efficientnet.measuring.peaks import GPU_PEAKS, cpu_peak, describe_peak, gpu_peak
from efficientnet.network.cost import DevicePeak


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_gpus_are_known_by_the_name_that_nvidia_smi_gives(name: str, model: str):
    peak = gpu_peak(name, "fp16")
    assert peak is not None and peak.source == f"data sheet of the {model}"
    assert peak.bytes_per_s == GPU_PEAKS[model][0]


def test_an_unknown_gpu_or_precision_has_no_peak():
    assert gpu_peak("NVIDIA GeForce RTX 9090", "fp16") is None
    assert gpu_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert gpu_peak("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_a_cpu_is_measured_in_plausible_units():
    one = cpu_peak(1)
    # From a slow single core to a large server: what is off by more is a wrong unit.
    assert 1e9 < one.operations_per_s < 1e14
    assert 1e9 < one.bytes_per_s < 1e13
    assert "numpy" in one.source


def test_a_peak_is_described_with_its_units_and_source():
    text = describe_peak(DevicePeak(0.49e12, 33e9, "measured"))
    assert text == "0.49 TFLOP/s, 33 GB/s (measured)"

import pytest

from efficientnet.measuring.peaks import GPU_PEAKS, cpu_peaks, describe_peak, gpu_peak
from efficientnet.network.cost import DevicePeak


@pytest.fixture
def known_peaks() -> None:
    """Measure them, where common_fixtures.py tells them."""


@pytest.mark.parametrize(
    ("name", "model", "gb_per_s", "tflops"),
    [
        ("NVIDIA H200", "H200", 4800, 989),
        ("NVIDIA H200 NVL", "H200 NVL", 4800, 835),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3", 3350, 989),
        ("NVIDIA H100 PCIe", "H100 PCIE", 2000, 756),
        ("NVIDIA H100 NVL", "H100 NVL", 3900, 835),
        ("Tesla V100-SXM2-16GB", "V100 SXM2", 900, 125),
        ("Tesla V100-PCIE-32GB", "V100 PCIE", 900, 112),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80GB", 2039, 312),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM4 40GB", 1555, 312),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIE 40GB", 1555, 312),
        ("NVIDIA A100 80GB PCIe", "A100 PCIE 80GB", 1935, 312),
        ("NVIDIA L4", "L4", 300, 121),
        ("NVIDIA L40S", "L40S", 864, 362),
    ],
)
def test_gpus_are_known_by_the_name_that_nvidia_smi_gives(
    name: str, model: str, gb_per_s: float, tflops: float
):
    peak = gpu_peak(name, "fp16")
    assert peak is not None and peak.source == f"data sheet of the {model}"
    assert (peak.bytes_per_s, peak.operations_per_s) == (gb_per_s * 1e9, tflops * 1e12)
    assert model in GPU_PEAKS


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", ""])
def test_a_form_that_is_not_known_and_a_slice_have_no_peak(name: str):
    assert gpu_peak(name, "fp16") is None


def test_an_unknown_gpu_or_precision_has_no_peak():
    assert gpu_peak("NVIDIA GeForce RTX 9090", "fp16") is None
    assert gpu_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert gpu_peak("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_a_cpu_is_measured_in_plausible_units_even_when_a_library_is_held_back(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    peaks = cpu_peaks(1, ["fp32", "int8", "fp8"])
    assert list(peaks) == ["fp32", "int8"]
    for peak in peaks.values():
        # From a slow single core to a large server: what is off by more is a wrong unit.
        assert 1e9 < peak.operations_per_s < 1e14
        assert 1e9 < peak.bytes_per_s < 1e13
        assert peak.source.startswith("measured: ")
    # Its programs may compute in float32, too.
    assert peaks["int8"].operations_per_s >= peaks["fp32"].operations_per_s


def test_without_a_program_on_the_cpu_nothing_is_measured():
    assert cpu_peaks(1, []) == {}


def test_a_peak_is_described_with_its_units_and_source():
    text = describe_peak(DevicePeak(0.49e12, 33e9, "measured"))
    assert text == "0.49 TFLOP/s, 33 GB/s (measured)"

"""Tables of the V2 paper -> rows: the network, how it is run, and what is printed.

Tan and Le 2021 (arXiv 2104.00298): tables 1, 7, 10 and 11 of the final version; 2, 3 and the
appendix's throughput by batch size of the first. NVIDIA's numbers are of two sheets in
google/automl, efficientnetv2/g3doc: V100-SXM3-32GB and A100-SXM-80GB, TensorRT 8.0 with CUDA graphs
and without transfers, batch 16.
"""

from dataclasses import dataclass
from typing import Literal

TableName = Literal["1", "2", "3", "7", "10", "11", "batch"]
Unit = Literal["ms", "images/s"]

DEVICE_CLASS, PRECISION = "V100", "fp16"

TIMM = "timm:"


@dataclass(frozen=True)
class PaperRow:
    """A network as the paper ran it."""

    label: str
    network: str | None
    """A variant, or timm:NAME; None where neither has it."""
    image_size: int = 0
    """Pixels. The paper does not print it: the evaluation size, which fits its multiply-adds."""
    value: float | None = None
    """In the table's unit; None where the paper has none."""
    batch_size: int | None = None
    """None: not printed."""
    tpu: float | None = None
    """Images/s of a TPU's core, where the paper prints them, too."""
    is_out_of_memory: bool = False
    """What the paper has in the place of a number."""


@dataclass(frozen=True)
class PaperTable:
    """A table, or the part of it that can be measured."""

    title: str
    unit: Unit
    rows: tuple[PaperRow, ...]
    is_training: bool = False
    """Whether a training step is meant, and not an answer."""
    has_latencies: bool = False
    """Whether the latency of each runtime stands beside it."""


# ms: TensorFlow FP16, TensorRT FP16 and INT8.
NVIDIA_COLUMNS = (
    "NVIDIA V100 TF fp16",
    "NVIDIA V100 TensorRT fp16",
    "NVIDIA V100 TensorRT int8",
    "NVIDIA A100 TF fp16",
    "NVIDIA A100 TensorRT fp16",
    "NVIDIA A100 TensorRT int8",
)
NVIDIA_BATCH_SIZE = 16
NVIDIA_MS: dict[str, tuple[float | None, ...]] = {
    "v2-s": (26.2, 12.8, 11.8, 18.2, 6.4, 3.9),
    "v2-m": (61.6, 31.8, 31.2, 42.3, 16.2, 8.7),
    "v2-l": (101.3, 56.3, 58.1, 66.7, 27.7, 14.2),
    "b4": (None, 18.0, 19.7, None, 9.8, 4.6),
    "b7": (None, 97.3, 122.4, None, 52.8, 22.5),
}


def _at_16(label: str, network: str | None, size: int = 0, ms: float | None = None) -> PaperRow:
    return PaperRow(label, network, size, ms, 16)


_TABLE_7 = (
    _at_16("EfficientNet-B3", "b3", 300, 19),
    _at_16("EfficientNet-B4", "b4", 380, 30),
    _at_16("EfficientNet-B5", "b5", 456, 60),
    _at_16("EfficientNet-B6", "b6", 528, 97),
    _at_16("EfficientNet-B7", "b7", 600, 170),
    _at_16("RegNetY-8GF", "timm:regnety_080", 224, 21),
    _at_16("RegNetY-16GF", "timm:regnety_160", 224, 32),
    _at_16("ResNeSt-101", "timm:resnest101e", 256, 31),
    _at_16("ResNeSt-200", "timm:resnest200e", 320, 76),
    _at_16("ResNeSt-269", "timm:resnest269e", 416, 160),
    _at_16("TResNet-L", "timm:tresnet_l", 448, 45),
    _at_16("TResNet-XL", "timm:tresnet_xl", 448, 66),
    _at_16("EfficientNet-X", None),
    _at_16("NFNet-F0", "timm:dm_nfnet_f0", 256, 30),
    _at_16("NFNet-F1", "timm:dm_nfnet_f1", 320, 70),
    _at_16("NFNet-F2", "timm:dm_nfnet_f2", 352, 124),
    _at_16("NFNet-F3", "timm:dm_nfnet_f3", 416, 203),
    _at_16("NFNet-F4", "timm:dm_nfnet_f4", 512, 309),
    _at_16("ResNet-RS-420", "timm:resnetrs420", 320),
    _at_16("LambdaResNet-420-hybrid", None),
    _at_16("BotNet-T7-hybrid", None),
    _at_16("BiT-M-R152x2 (21k)", "timm:resnetv2_152x2_bit", 480, 500),
    _at_16("ViT-B/32", "timm:vit_base_patch32_384", 384, 13),
    _at_16("ViT-B/16", "timm:vit_base_patch16_384", 384, 68),
    _at_16("DeiT-B", "timm:deit_base_patch16_224", 224, 19),
    _at_16("DeiT-B-384", "timm:deit_base_patch16_384", 384, 68),
    _at_16("T2T-ViT-19", None),
    _at_16("T2T-ViT-24", None),
    _at_16("ViT-L/16 (21k)", "timm:vit_large_patch16_384", 384, 195),
    _at_16("EfficientNetV2-S", "v2-s", 384, 24),
    _at_16("EfficientNetV2-M", "v2-m", 480, 57),
    _at_16("EfficientNetV2-L", "v2-l", 480, 98),
    _at_16("EfficientNetV2-XL (21k)", "v2-xl", 512),
)


def _batches(
    label: str, network: str, size: int, rates: tuple[float | None, ...]
) -> list[PaperRow]:
    return [
        PaperRow(
            f"{label}, batch {batch}", network, size, rate, batch, is_out_of_memory=rate is None
        )
        for batch, rate in zip((1, 4, 16, 64, 256), rates, strict=True)
    ]


TABLES: dict[TableName, PaperTable] = {
    "1": PaperTable(
        "Table 1: the larger networks of before; no time is printed",
        "ms",
        (
            _at_16("EfficientNet-B6", "b6", 528),
            _at_16("ResNet-RS-420", "timm:resnetrs420", 320),
            _at_16("NFNet-F1", "timm:dm_nfnet_f1", 320),
        ),
    ),
    "2": PaperTable(
        "Table 2: training of B6 by image and batch size",
        "images/s",
        (
            PaperRow("B6 512 px, batch 12", "b6", 512, 29, 12),
            PaperRow("B6 512 px, batch 24", "b6", 512, None, 24, is_out_of_memory=True),
            PaperRow("B6 380 px, batch 12", "b6", 380, 37, 12),
            PaperRow("B6 380 px, batch 24", "b6", 380, 52, 24),
        ),
        is_training=True,
    ),
    "3": PaperTable(
        "Table 3: training of B4 with Fused-MBConv",
        "images/s",
        (
            PaperRow("B4, no fused", "b4", 380, 155, tpu=262),
            PaperRow("B4, fused stage 1-3", "b4-fused-1-3", 380, 216, tpu=362),
            PaperRow("B4, fused stage 1-5", "b4-fused-1-5", 380, 223, tpu=327),
            PaperRow("B4, fused stage 1-7", "b4-fused-1-7", 380, 206, tpu=254),
        ),
        is_training=True,
        has_latencies=True,
    ),
    "7": PaperTable("Table 7: time of a batch of 16", "ms", _TABLE_7),
    "10": PaperTable(
        "Table 10: B7 and V2-M",
        "ms",
        (
            _at_16("EfficientNet-B7", "b7", 600, 170),
            _at_16("EfficientNetV2-M", "v2-m", 480, 57),
        ),
    ),
    "11": PaperTable(
        "Table 11: scaling down, batch 128",
        "images/s",
        (
            PaperRow("EfficientNet-B1", "b1", 240, 2675, 128),
            PaperRow("EfficientNetV2-B0", "v2-b0", 224, 5739, 128),
            PaperRow("EfficientNet-B2", "b2", 260, 2003, 128),
            PaperRow("EfficientNetV2-B1", "v2-b1", 240, 3983, 128),
            PaperRow("EfficientNet-B4", "b4", 380, 628, 128),
            PaperRow("EfficientNetV2-B3", "v2-b3", 300, 1693, 128),
            PaperRow("EfficientNet-B5", "b5", 456, 291, 128),
            PaperRow("EfficientNetV2-S", "v2-s", 384, 901, 128),
        ),
    ),
    "batch": PaperTable(
        "Appendix: images a second by batch size",
        "images/s",
        (
            *_batches("V2-M", "v2-m", 480, (23, 91, 281, 350, 352)),
            *_batches("B7", "b7", 600, (24, 80, 94, 108, None)),
            *_batches("NFNet-F2", "timm:dm_nfnet_f2", 352, (16, 62, 129, 189, 190)),
        ),
    ),
}

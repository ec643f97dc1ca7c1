"""The number formats that a program computes in."""

from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

BYTES_PER_VALUE: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}

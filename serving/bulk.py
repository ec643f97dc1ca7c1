"""A folder of pictures, or tar shards, by the million -> a table of their classes, in Parquet.

    python serving/bulk.py --data photos --output results.parquet
    python serving/bulk.py --data "shards/{0000..0127}.tar" --output results.parquet --top-k 1

Without HTTP, on Ray Data: a network on each core of this machine, or of the cluster that
RAY_ADDRESS names. Started again after whatever end, it goes on with what is missing.
"""

from dataclasses import dataclass
from pathlib import Path

from efficientnet.command import late, parse_flags, require_least, run_command


@dataclass(frozen=True)
class BulkConfig:
    """What is classified, by what, and where the table goes."""

    data: str
    """Folder, whose pictures are taken with those in folders within; or tar shards, as in
    training/run.py, whether or not they have labels."""

    output: Path
    """Folder that becomes the table: Parquet files, which Arrow, pandas, DuckDB, Polars and Spark
    read as one."""

    artifact: Path | None = None
    """Artifact directory; None = $CLASSIFIER_ARTIFACT or artifacts/v2-s/onnxruntime-fp32."""

    top_k: int = 5
    """Classes of each picture, at least 1; more than there are gives all of them."""

    batch: int = 8
    """Most images in one call of a network, at least 1."""

    cores: int = 1
    """Processor cores of one network, at least 1; there are as many networks as they allow."""

    gpus: int = 0
    """GPUs of one network, for an artifact that needs one; give it several cores, to decode."""

    part_images: int = 1000
    """Most pictures in one file of the table, at least 1: what is done again after a crash."""

    def __post_init__(self) -> None:
        """Check the limits."""
        require_least(self, top_k=1, batch=1, cores=1, gpus=0, part_images=1)


main = late("serving.bulk_run", needs=("ray", "pyarrow"))

if __name__ == "__main__":
    run_command(lambda: parse_flags(BulkConfig, __doc__), main)

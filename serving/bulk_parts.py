"""A list of pictures -> parts, each of which becomes one file of the table, or stays to be done.

What there is to do is written once, as `_plan` in the table's folder (a Parquet file with a row
group for each part; readers of tables pass over names with an underscore). A part's file appears
whole or not at all, so that the files that are there are what is done.
"""

import io
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import find_image_files
from efficientnet.images.fetching import is_remote
from efficientnet.images.preprocess import ImageError, preprocess
from efficientnet.images.shards import is_shard_source, list_shard_images
from efficientnet.images.tar_index import IMAGE_SUFFIXES, TarMember
from efficientnet.machine.atomic import write_bytes
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import softmax, top_classes
from serving.settings import artifact_sha256

PLAN_FILE = "_plan"

MAX_ENDS = 2
ENDED = f"the process ended while it was at this picture, {MAX_ENDS} times"
_KEY = b"efficientnet.bulk"

# Networks that are through with their parts wait for the others at the end, for a quarter of a
# share at most.
PARTS_PER_NETWORK = 4

RESULTS = pa.schema(
    [
        ("image", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("class_indices", pa.list_(pa.int32())),
        ("probabilities", pa.list_(pa.float32())),
        ("error", pa.string()),
    ]
)
_IMAGES = pa.schema(
    # Names of files are bytes, and not always text.
    [("image", pa.string()), ("path", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())]
)


class BulkError(PipelineError):
    """Pictures that cannot be classified all together."""


@dataclass(frozen=True)
class Picture:
    """One picture, to be read."""

    name: str
    """Its path below the folder; of a shard: the shard's, and its own within."""
    source: Path | TarMember

    def read(self) -> bytes:
        """Return the encoded picture."""
        if isinstance(self.source, TarMember):
            return self.source.read()
        return self.source.read_bytes()


class Plan(BaseModel):
    """What is done with which pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    data: str
    artifact_sha256: str
    """Of its manifest.json."""
    top_k: int
    part_images: int
    num_images: int

    @property
    def num_parts(self) -> int:
        """Files of the table."""
        return -(-self.num_images // self.part_images)

    def size_of(self, part: int) -> int:
        """Return the number of pictures in a part."""
        return min(self.part_images, self.num_images - part * self.part_images)

    def missing(self, table: Path) -> list[int]:
        """Return the parts that are to be done."""
        return [part for part in range(self.num_parts) if not part_path(table, part).is_file()]


def part_path(table: Path, part: int) -> Path:
    """Return the place of a part's file."""
    return table / f"part-{part:06}.parquet"


def absolute_source(data: str) -> str:
    """Return what --data says for processes that work in other folders."""
    if not is_shard_source(data):
        return str(Path(data).expanduser().resolve())
    if is_remote(data) or data.startswith("{"):
        return data
    return os.path.abspath(os.path.expanduser(data))


def open_plan(table: Path, wanted: Plan, num_networks: int) -> Plan:
    """Return the plan of a table: that of an earlier start, or a new one.

    Args:
        table: its folder.
        wanted: its data, artifact and top_k; its part_images is the most, its num_images nothing.
        num_networks: that work at once, for which parts are made small enough.

    Raises:
        BulkError: the table is of other data, another artifact or another top_k; the folder is no
            table; or there are no pictures.
        DatasetError: see list_shard_images.
    """
    path = table / PLAN_FILE
    if path.is_file():
        plan = read_plan(table)
        for field, flag in (("data", "--data"), ("top_k", "--top-k"), ("artifact_sha256", "")):
            found, asked = getattr(plan, field), getattr(wanted, field)
            if found != asked:
                raise BulkError(
                    f"{table} was begun with {flag or 'an artifact of SHA-256'} {found}, and now "
                    f"it is {asked}: give that again to go on, or another --output"
                )
        return plan
    if table.exists() and (not table.is_dir() or any(table.iterdir())):
        raise BulkError(
            f"{table} is there and is no table of this command (it has no {PLAN_FILE}); give "
            "another --output"
        )
    pictures = list_pictures(wanted.data)
    share = -(-len(pictures) // (num_networks * PARTS_PER_NETWORK))
    part_images = min(wanted.part_images, share)
    plan = wanted.model_copy(update={"num_images": len(pictures), "part_images": part_images})
    _write_plan(table, plan, pictures)
    return plan


def list_pictures(data: str) -> list[Picture]:
    """List the pictures of a folder or of shards.

    Raises:
        BulkError: there are none.
        DatasetError: see list_shard_images.
    """
    if is_shard_source(data):
        pictures = [Picture(*image) for image in list_shard_images(data)]
    else:
        folder = Path(data)
        files, _ = find_image_files(folder)
        pictures = [Picture(_text_of(path.relative_to(folder)), path) for path in files]
    if not pictures:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise BulkError(f"{data} holds no pictures ({kinds}), or is no folder")
    return pictures


def read_plan(table: Path) -> Plan:
    """Read what `open_plan` has written."""
    metadata: dict[bytes, bytes] = pq.read_schema(table / PLAN_FILE).metadata or {}
    if _KEY not in metadata:
        raise BulkError(f"{table / PLAN_FILE} is no plan of this command; give another --output")
    return Plan.model_validate_json(metadata[_KEY])


def read_part(table: Path, part: int) -> list[Picture]:
    """Return the pictures of a part."""
    rows = pq.ParquetFile(table / PLAN_FILE).read_row_group(part).to_pylist()
    return [_picture(row) for row in rows]


def _picture(row: dict[str, Any]) -> Picture:
    path = Path(os.fsdecode(row["path"]))
    if row["offset"] is None:
        return Picture(row["image"], path)
    return Picture(row["image"], TarMember(path, row["offset"], row["size"]))


def _write_plan(table: Path, plan: Plan, pictures: Sequence[Picture]) -> None:
    sources = [picture.source for picture in pictures]
    members = [source if isinstance(source, TarMember) else None for source in sources]
    paths = [source.path if isinstance(source, TarMember) else source for source in sources]
    columns = [
        [picture.name for picture in pictures],
        [os.fsencode(path) for path in paths],
        [member and member.offset for member in members],
        [member and member.size for member in members],
    ]
    schema = _IMAGES.with_metadata({_KEY: plan.model_dump_json().encode()})
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=schema), buffer, row_group_size=plan.part_images)
    write_bytes(table / PLAN_FILE, buffer.getvalue())


def _text_of(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def tried(path: Path) -> Generator[Callable[[str], bool] | None]:
    """Find out which picture it is that ends the process: a fault in a C library, or its memory.

    Gives None on the first try of a part. On another one, which there is only when the process has
    ended within the block, gives what is to be asked before each picture: whether it may be tried.
    Not a picture during which the process has ended twice: the other time it may have been
    somebody else's doing.

    Args:
        path: of a file that is there while the block runs, and removed when it ends in order.
    """
    found: dict[str, int] = json.loads(path.read_bytes()) if path.is_file() else {}
    is_first = not path.is_file()
    write_bytes(path, json.dumps(found).encode())

    def may_try(name: str) -> bool:
        if found.get(name, 0) >= MAX_ENDS:
            return False
        begun = {**found, name: found.get(name, 0) + 1}
        write_bytes(path, json.dumps(begun).encode())
        return True

    try:
        yield None if is_first else may_try
    except Exception:
        path.unlink()
        raise
    path.unlink()


class PartClassifier:
    """Classifies parts; there is one in each process.

    Args:
        table: folder of the table, with its plan.
        artifact: what classifies.
        batch: images in a call.
        cores: threads of a call, and threads that decode.

    Raises:
        ArtifactError: see open_runtime.
        BulkError: the artifact is another than the plan's.
    """

    def __init__(self, table: Path, artifact: Path, batch: int, cores: int) -> None:
        self._table = table
        self._plan = read_plan(table)
        found = artifact_sha256(artifact)
        if found != self._plan.artifact_sha256:
            raise BulkError(
                f"{artifact} has SHA-256 {found} here, expected {self._plan.artifact_sha256}: "
                "bring the same artifact to all machines"
            )
        self._runtime = open_runtime(artifact, cores)
        self._batch = min(batch, self._runtime.info.max_batch_size or batch)
        self._decoders = ThreadPoolExecutor(cores)

    def classify(self, part: int) -> tuple[int, int]:
        """Write the file of a part; return how many pictures it had, and how many broken.

        Raises:
            BulkError, DatasetError: the folder or the shard is gone.
            OSError: a disk fails, or is full.
        """
        with tried(self._table / f"_trying-{part:06}") as tries:
            rows = list(self._classify(read_part(self._table, part), tries))
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, RESULTS), buffer, compression="zstd")
            write_bytes(part_path(self._table, part), buffer.getvalue())
        return len(rows), sum(row.get("error") is not None for row in rows)

    def _classify(
        self, pictures: Sequence[Picture], tries: Callable[[str], bool] | None
    ) -> Iterator[dict[str, Any]]:
        names: list[str] = []
        images: list[NDArray[np.float32]] = []
        prepared = self._prepared(pictures)
        if tries is not None:
            prepared = ((p.name, self._prepare(p) if tries(p.name) else ENDED) for p in pictures)
        for name, image in prepared:
            if isinstance(image, str):
                yield {"image": name, "error": image}
                continue
            names.append(name)
            images.append(image)
            if len(images) == self._batch:
                yield from self._infer(names, images)
                names, images = [], []
        if images:
            yield from self._infer(names, images)

    def _prepared(
        self, pictures: Sequence[Picture]
    ) -> Iterator[tuple[str, NDArray[np.float32] | str]]:
        # Decoded while the network is at the batch before.
        ahead = deque[tuple[str, Future[NDArray[np.float32] | str]]]()
        for picture in pictures:
            ahead.append((picture.name, self._decoders.submit(self._prepare, picture)))
            if len(ahead) > 2 * self._batch:
                name, image = ahead.popleft()
                yield name, image.result()
        for name, image in ahead:
            yield name, image.result()

    def _prepare(self, picture: Picture) -> NDArray[np.float32] | str:
        try:
            return preprocess(picture.read(), self._runtime.info.preprocess)
        except (FileNotFoundError, PermissionError) as error:
            # One file that is gone is the file's fault; when its folder is, the disk is.
            if isinstance(picture.source, Path) and picture.source.parent.is_dir():
                return f"the file cannot be read ({error.strerror})"
            raise BulkError(f"{error.filename} cannot be read any more: {error.strerror}") from None
        except ImageError as error:
            return str(error)

    def _infer(
        self, names: Sequence[str], images: Sequence[NDArray[np.float32]]
    ) -> Iterator[dict[str, Any]]:
        info = self._runtime.info
        probabilities = softmax(self._runtime.infer(np.stack(images)))
        best = top_classes(probabilities, self._plan.top_k)
        for name, row, indices in zip(names, probabilities, best, strict=True):
            yield {
                "image": name,
                "labels": [info.class_names[index] for index in indices],
                "class_indices": indices.tolist(),
                "probabilities": row[indices].tolist(),
                "error": None,
            }

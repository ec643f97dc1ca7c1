"""Pictures, folders of them, or standard input -> the best classes of each, in the terminal.

    python serving/classify.py photo.jpg --artifact artifacts/lite0/default
    python serving/classify.py holiday/ --artifact runs/latest/checkpoint --top-k 3 --json
curl --silent https://host/photo.jpg | python serving/classify.py -

A file that is no picture is named and left out; the exit code is 1 then.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from efficientnet.images.preprocess import ImageError, preprocess
from efficientnet.images.tar_index import IMAGE_SUFFIXES
from efficientnet.runtimes import Runtime, open_runtime
from serving.answers import PictureAnswer, bars_of, best_classes
from serving.settings import read_settings

STANDARD_INPUT = "-"

log = logging.getLogger(__name__)


class ClassifyError(PipelineError):
    """Pictures that could not be classified."""


@dataclass(frozen=True)
class ClassifyConfig:
    """What is classified, and by what."""

    pictures: tyro.conf.Positional[tuple[str, ...]]
    """Picture files, folders (of which all pictures are taken, those in folders within too), or -
    for a picture on standard input."""

    artifact: Path | None = None
    """Artifact or checkpoint directory; None = $CLASSIFIER_ARTIFACT or
    artifacts/v2-s/onnxruntime-fp32."""

    top_k: int = 5
    """Classes that are shown, at least 1."""

    json: bool = False
    """Print one JSON document a line and picture, in place of text."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not self.pictures:
            raise ValueError("no picture is named, expected files, folders, or - for one on stdin")
        if self.top_k < 1:
            raise ValueError(f"--top-k is {self.top_k}, expected at least 1")


def main(config: ClassifyConfig) -> None:
    """Print the best classes of every picture.

    Raises:
        ArtifactError, CheckpointError: see open_runtime.
        FileNotFoundError: a path is not there; before anything is classified.
        ClassifyError: some files are no pictures; the others have been classified.
    """
    names = list(find_pictures(config.pictures))
    settings = read_settings(os.environ)
    runtime = open_runtime(config.artifact or settings.artifact, settings.num_threads)
    broken: list[str] = []
    for name in names:
        try:
            answer = classify(runtime, name, config.top_k)
        except (ImageError, OSError) as error:
            broken.append(name)
            log.warning("left out: %s: %s", name, error)
            continue
        print(
            answer.model_dump_json() if config.json else f"{name}\n{bars_of(answer.predictions)}",
            flush=True,
        )
    if broken:
        raise ClassifyError(f"{len(broken)} of {len(names)} could not be classified, see above")


def find_pictures(paths: Sequence[str]) -> Iterator[str]:
    """Give the files that are meant, those of a folder in order.

    Raises:
        FileNotFoundError: a path is not there, or a folder has no pictures.
    """
    for path in paths:
        if path == STANDARD_INPUT or Path(path).is_file():
            yield path
            continue
        if not Path(path).is_dir():
            raise FileNotFoundError(f"there is no picture or folder {path}")
        files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"the folder {path} holds no pictures ({kinds})")
        yield from map(str, files)


def classify(runtime: Runtime, name: str, top_k: int) -> PictureAnswer:
    """Classify one picture.

    Raises:
        ImageError: no picture, damaged, or too large.
        OSError: the file cannot be read.
    """
    data = sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes()
    info = runtime.info
    logits = runtime.infer(preprocess(data, info.preprocess)[np.newaxis])
    predictions = best_classes(logits, info.class_names, top_k)
    return PictureAnswer(picture=name, predictions=tuple(predictions))


if __name__ == "__main__":
    run_command(lambda: parse_flags(ClassifyConfig, __doc__), main)

import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from commands import run
from facts import raises_naming
from numpy.typing import NDArray
from PIL import Image

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.formats.records import AccuracyRecord, pack_hits, read_records
from efficientnet.images.datasets import DatasetError, Sample, load_dataset, sha256_of_samples
from efficientnet.images.preprocess import PreprocessSpec, preprocess
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.intervals import mcnemar_p_value
from efficientnet.runtimes import ProgramInfo, open_runtime
from efficientnet.runtimes.probabilities import softmax
from perf.measurements import accuracy
from perf.measurements.accuracy import AccuracyConfig, paired_table, result_table, top_k_accuracy
from perf.measurements.predictions import Predictions, predict

SPEC = PreprocessSpec(
    image_size=4, interpolation="bilinear", crop_fraction=None, mean=(0, 0, 0), std=(1, 1, 1)
)


class BrightnessRuntime:
    """Tells the class from the red channel, which make_sample sets."""

    def __init__(self, num_classes: int, answers: float | None = None) -> None:
        self.batch_sizes: list[int] = []
        self._answers = answers
        self.info = ProgramInfo(
            program_sha256="0" * 64,
            variant="tiny",
            runtime="brightness",
            precision="fp32",
            preprocess=SPEC,
            class_names=tuple(map(str, range(num_classes))),
            data="nowhere",
            max_batch_size=None,
            flops_per_image=0,
            weight_bytes=0,
        )

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self.batch_sizes.append(len(images))
        red = np.round(images[:, 0, 0, 0] * 255).astype(int)
        logits = np.zeros((len(images), len(self.info.class_names)), dtype=np.float32)
        logits[np.arange(len(images)), red] = 5 if self._answers is None else self._answers
        return logits


def make_sample(name: str, label: int, looks_like: int | None = None) -> Sample:
    buffer = io.BytesIO()
    red = label if looks_like is None else looks_like
    Image.new("RGB", (4, 4), (red, 0, 0)).save(buffer, format="PNG")
    return Sample(name, label, buffer.getvalue())


def make_predictions(probabilities: list[list[float]], labels: list[int]) -> Predictions:
    samples = tuple(Sample(str(i), label, b"") for i, label in enumerate(labels))
    return Predictions(samples, np.asarray(probabilities), ())


def write_folder(folder: Path, num_images: int, num_broken: int) -> Path:
    """Write `train` and `val` of the ten digits; the first images of val are broken."""
    for part, count in (("train", 1), ("val", num_images // 10)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(count):
                path = folder / part / str(label) / f"{index:03d}.png"
                path.write_bytes(make_sample("", label).read())
    for index in range(num_broken):
        (folder / "val" / "0" / f"{index:03d}.png").write_bytes(b"not an image")
    return folder


def test_top1_and_top5_of_known_probabilities():
    falling = [0.4, 0.2, 0.15, 0.1, 0.08, 0.07]
    predictions = make_predictions([falling, falling, falling, falling[::-1]], [0, 4, 5, 5])
    assert (top_k_accuracy(predictions, 1), top_k_accuracy(predictions, 5)) == (0.5, 0.75)
    # Of fewer than five classes the label is always among five.
    assert top_k_accuracy(make_predictions([[0.9, 0.1, 0.0]] * 2, [2, 1]), 5) == 1.0


def test_predictions_keep_the_order_of_the_samples_over_batches():
    samples = [make_sample(f"{i}.png", label=i % 3) for i in range(11)]
    runtime = BrightnessRuntime(num_classes=3)
    predictions = predict(runtime, samples, batch_size=4)
    assert runtime.batch_sizes == [4, 4, 3]
    assert predictions.samples == tuple(samples)
    assert predictions.probabilities.argmax(axis=1).tolist() == [i % 3 for i in range(11)]
    assert predictions.probabilities.sum(axis=1) == pytest.approx(1.0)


def record_of(classes: tuple[tuple[str, int, int], ...], num_classes: int) -> AccuracyRecord:
    images, hits = (sum(counts[i] for counts in classes) for i in (1, 2))
    return AccuracyRecord(
        program_sha256="0" * 64,
        checkpoint_sha256="0" * 64,
        variant="tiny",
        runtime="torch",
        precision="fp32",
        image_size=32,
        preprocess_sha256="0" * 64,
        data="things",
        environment=current_environment(),
        started_at=datetime.now(UTC),
        top1=hits / images,
        top5=1.0,
        num_images=images,
        classes=classes,
        num_classes=num_classes,
        dataset_sha256="0" * 64,
    )


def test_a_class_for_every_image_is_no_accuracy_of_its_own():
    naming = record_of((("thing", 200, 200), ("other", 100, 0)), 3)
    table = result_table([Path("a")], [naming])
    assert table.rows[0][1:] == (
        *("66.7 %", "61.2 % to 71.8 %", "50.0 %", "66.7 % (thing)", "300"),
    )
    assert len(table.notes) == 1
    learned = record_of((("thing", 200, 190), ("other", 100, 80)), 3)
    assert not result_table([Path("a")], [learned]).notes


@pytest.mark.parametrize(("num_classes", "is_shown"), [(5, False), (6, True)])
def test_top5_is_shown_of_six_classes_or_more(num_classes: int, is_shown: bool):
    table = result_table([Path("a")], [record_of((("a", 9, 3), ("b", 9, 9)), num_classes)])
    assert ("top-5" in table.columns) == is_shown


def with_hits(text: str, **changes: object) -> AccuracyRecord:
    is_hit = [letter == "x" for letter in text]
    record = record_of((("a", len(text), sum(is_hit)), ("b", 0, 0)), 2)
    return record.model_copy(update={"hits": pack_hits(is_hit), **changes})


@pytest.mark.parametrize("text", ["", "x", "x..x..x.", "x..x..x.x", "." * 17])
def test_hits_are_read_as_they_were_written(text: str):
    record = with_hits(text + "x")
    assert record.is_hit == tuple(letter == "x" for letter in text + "x")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 0), 1.0),
        ((5, 5), 1.0),
        ((0, 6), 2 / 2**6),
        ((1, 9), 2 * 11 / 2**10),
        ((9, 1), 2 * 11 / 2**10),
        # Of the normal distribution: (1100 - 900 - 1)^2 / 2000 of chi-squared.
        ((900, 1100), 8.56e-6),
    ],
)
def test_mcnemars_probability_is_that_of_a_fair_coin(counts: tuple[int, int], expected: float):
    assert mcnemar_p_value(*counts) == pytest.approx(expected, rel=0.02)


def test_programs_are_compared_on_the_images_that_only_one_knows():
    paths = [Path(name) for name in "abcde"]
    first = with_hits("x" * 12 + "." * 8)
    worse, same = with_hits("x" * 5 + "." * 15), with_hits("." + "x" * 12 + "." * 7)
    other_images = with_hits("." * 20, dataset_sha256="1" * 64)
    of_before = first.model_copy(update={"hits": None})
    table = paired_table(paths, [first, worse, same, other_images, of_before])
    assert table.rows == (
        ("b", "7", "0", "-35.0", "0.016", "less accurate"),
        ("c", "1", "1", "+0.0", "1", "no difference told"),
    )
    assert accuracy.paired_hits(first, other_images) is None
    assert accuracy.paired_hits(of_before, first) is None


def test_a_few_broken_images_are_named_and_left_out_and_one_percent_is_an_error():
    samples = [make_sample(f"{i}.png", label=i % 3) for i in range(201)]
    samples[7] = Sample("damaged.png", 1, b"not an image")
    predictions = predict(BrightnessRuntime(3), samples, batch_size=8)
    assert len(predictions.samples) == len(predictions.probabilities) == 200
    assert predictions.broken[0].startswith("damaged.png: ")
    assert top_k_accuracy(predictions, 1) == 1.0
    with raises_naming(DatasetError, "1 of 100", "damaged.png"):
        predict(BrightnessRuntime(3), samples[:100], batch_size=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_no_number_is_an_error(value: float):
    samples = [make_sample(f"{i}.png", label=0) for i in range(3)]
    with raises_naming(ArtifactError, "NaN"):
        predict(BrightnessRuntime(3, value), samples, batch_size=8)


def test_the_command_measures_checkpoint_and_artifact_alike(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path
):
    output = tmp_path / "accuracy.jsonl"
    made = accuracy.main(AccuracyConfig((tiny_checkpoint, tiny_artifact), output=output))
    eager, onnx = read_records(made, AccuracyRecord)
    val = load_dataset("digits").val
    manifest = read_artifact(tiny_artifact)
    assert (eager.runtime, onnx.runtime) == ("torch", "onnxruntime")
    assert (eager.top1, eager.top5) == (onnx.top1, onnx.top5)
    assert eager.num_images == onnx.num_images == 360
    assert eager.dataset_sha256 == onnx.dataset_sha256 == sha256_of_samples(val)
    assert eager.data == "digits"
    assert eager.classes == onnx.classes and eager.num_classes == 10
    assert sum(images for _, images, _ in eager.classes) == 360
    assert sum(hits for _, _, hits in eager.classes) == round(360 * eager.top1)
    assert onnx.program_sha256 == manifest.program_sha256
    assert onnx.checkpoint_sha256 == eager.program_sha256 == manifest.checkpoint_sha256


def test_the_predictions_are_the_softmax_of_the_runtime(tiny_artifact: Path, tmp_path: Path):
    flags = ("--predictions", "predictions.jsonl", "--batch-size", 7)
    done = run("perf/accuracy.py", tiny_artifact, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "reports/accuracy.jsonl"
    text = (tmp_path / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    val = load_dataset("digits").val
    assert [(line["name"], line["label"]) for line in lines] == [(s.name, s.label) for s in val]
    runtime = open_runtime(tiny_artifact)
    images = np.stack([preprocess(sample.read(), runtime.info.preprocess) for sample in val[:5]])
    # Another batch size, another order of additions: far below the 1e-5 that a service may differ.
    expected = softmax(runtime.infer(images))
    assert np.asarray([line["probabilities"] for line in lines[:5]]) == pytest.approx(
        expected, abs=1e-6
    )


def test_a_folder_of_the_same_classes_takes_the_place_of_the_data(
    tiny_artifact: Path, tmp_path: Path
):
    folder = write_folder(tmp_path / "pictures", num_images=210, num_broken=1)
    output = tmp_path / "accuracy.jsonl"
    accuracy.main(AccuracyConfig((tiny_artifact,), data=str(folder), output=output))
    (record,) = read_records(output, AccuracyRecord)
    assert (record.data, record.num_images) == ("pictures", 209)


def test_too_many_broken_images_leave_nothing_behind(tiny_artifact: Path, tmp_path: Path):
    folder = write_folder(tmp_path / "pictures", num_images=100, num_broken=2)
    output, predictions = tmp_path / "accuracy.jsonl", tmp_path / "predictions.jsonl"
    with raises_naming(DatasetError, "held-out images", "1%"):
        accuracy.main(
            AccuracyConfig(
                (tiny_artifact,), data=str(folder), output=output, predictions=predictions
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_other_classes_and_a_missing_folder_are_errors_before_any_work(
    tiny_artifact: Path, tmp_path: Path
):
    folder = write_folder(tmp_path / "pictures", num_images=10, num_broken=0)
    for part in ("train", "val"):
        (folder / part / "9").rename(folder / part / "nine")
    output = tmp_path / "accuracy.jsonl"
    with raises_naming(ValueError, folder, "--data"):
        accuracy.main(AccuracyConfig((tiny_artifact,), data=str(folder), output=output))
    with raises_naming(FileNotFoundError, tmp_path / "nothing"):
        accuracy.main(AccuracyConfig((tiny_artifact,), data=str(tmp_path / "nothing")))
    assert not output.exists()


def test_predictions_are_of_one_program(tiny_artifact: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_artifact, copy)
    with raises_naming(ValueError, "--predictions", "one"):
        AccuracyConfig((tiny_artifact, copy), predictions=tmp_path / "predictions.jsonl")


def test_a_batch_that_the_artifact_does_not_take_is_an_error(tiny_artifact: Path):
    with raises_naming(ValueError, 64):
        accuracy.main(AccuracyConfig((tiny_artifact,), batch_size=65))
    with raises_naming(ValueError, "--batch-size", 0):
        AccuracyConfig((tiny_artifact,), batch_size=0)

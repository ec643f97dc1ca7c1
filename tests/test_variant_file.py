import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facts import raises_naming
from small_trainings import small_run

from efficientnet.formats.artifact import read_artifact
from efficientnet.formats.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from efficientnet.measuring.programs import read_program
from efficientnet.network.cost import network_cost
from efficientnet.network.scaling import compound_scale
from efficientnet.network.variant_file import (
    VariantFileError,
    read_variant_file,
    write_variant_file,
)
from efficientnet.network.variants import VARIANTS, StageSpec, VariantSpec, scale_up
from efficientnet.runtimes import open_runtime
from export import ort
from export.inputs.config import OrtConfig
from training.recipe.config import TrainConfig, config_from_json, config_to_json
from training.running import begin_run
from training.running.command_line import ResumeConfig, parse
from training.running.progress import StopFlag

ROOT = Path(__file__).resolve().parents[1]

FOUND = replace(
    VARIANTS["tiny"],
    name="found-1",
    stages=(
        StageSpec("fused_mbconv", 1, 8, stride=1, expand_ratio=1),
        StageSpec("mbconv", 1, 24, stride=2, expand_ratio=4, kernel_size=5, squeeze_ratio=0.25),
        StageSpec("fused_mbconv", 2, 32, stride=2, expand_ratio=4),
    ),
)


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "found.json"
    write_variant_file(path, FOUND, {"trial": 3})
    return path


def test_a_variant_comes_back_from_its_file(file: Path):
    assert read_variant_file(file) == FOUND
    assert json.loads(file.read_text())["origin"] == {"trial": 3}


def changed(file: Path, *keys: object, value: object) -> Path:
    whole = part = json.loads(file.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    file.write_text(json.dumps(whole))
    return file


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("variant", "stages", 1, "kernel_size"), 4, "kernel_size is 4, expected an odd one"),
        (("variant", "stages", 0, "num_layers"), 0, "num_layers is 0, expected 1 to 100"),
        (("variant", "stages", 0, "stride"), 3, "stride is 3, expected 1 to 2"),
        (("variant", "stages", 0, "squeeze_ratio"), 0.25, "Fused-MBConv has no squeeze-excite"),
        (("variant", "stages", 1, "squeeze_ratio"), 2, "squeeze_ratio is 2.0"),
        (("variant", "stages", 1, "operator"), "conv", "variant.stages.1.operator"),
        (("variant", "stages", 1, "widths"), 8, "variant.stages.1.widths"),
        (("variant", "stages"), [], "stages is 0, expected 1 to 30"),
        (("variant", "colour"), "red", "variant.colour"),
        (("variant", "name"), "../x", "folders are called after it"),
        (("variant", "name"), "tiny", "like a built-in variant"),
        (("variant", "dropout_rate"), 1, "dropout_rate is 1.0"),
        (("variant", "eval_image_size"), 8, "expected 16 to 1024 pixels"),
        (("variant", "published"), {"source": "x", "top1": 1}, "published is for built-in"),
        (("format_version",), 2, "format version 2, this program reads 1"),
        (("notes",), "x", "notes"),
    ],
)
def test_a_file_that_cannot_be_built_is_refused_and_what_is_wrong_is_named(
    file: Path, keys: tuple[object, ...], value: object, said: str
):
    with raises_naming(VariantFileError, "found.json") as refused:
        read_variant_file(changed(file, *keys, value=value))
    assert said in str(refused.value)


def test_a_file_that_is_missing_or_no_json_is_told(tmp_path: Path):
    with raises_naming(FileNotFoundError, tmp_path / "none.json"):
        read_variant_file(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with raises_naming(VariantFileError, tmp_path / "broken.json"):
        read_variant_file(tmp_path / "broken.json")


def test_the_command_line_trains_a_file_by_every_recipe(file: Path):
    config = parse(["--variant-file", str(file), "--epochs", "4"])
    assert isinstance(config, TrainConfig)
    assert (config.variant, config.architecture, config.epochs) == ("found-1", FOUND, 4)
    assert config.spec == FOUND
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    imagenet = parse(["found-1", "--variant-file", str(file), "--recipe", "imagenet"])
    assert isinstance(imagenet, TrainConfig)
    assert imagenet.architecture == FOUND
    with raises_naming(ValueError, "b0"):
        parse(["b0", "--variant-file", str(file)])
    with raises_naming(ValueError, "--variant-file"):
        parse(["--resume", "runs/x", "--variant-file", str(file)])
    with raises_naming(ValueError, "found-1"):
        parse(["found-1"])


def test_a_found_variant_goes_the_road_of_a_built_in_one(tmp_path: Path):
    config = small_run(tmp_path, epochs=1, steps=2, variant="found-1", architecture=FOUND)
    config = replace(config, progressive=replace(config.progressive, num_stages=1))
    checkpoint = begin_run.main(config)
    assert checkpoint is not None
    model, record = load_checkpoint(checkpoint)
    assert record.spec == FOUND
    assert len(model.features) == len(FOUND.stages) + 2

    artifact = ort.main(OrtConfig(checkpoint=checkpoint, output=tmp_path / "artifact"))
    manifest = read_artifact(artifact)
    assert (manifest.variant, manifest.architecture) == ("found-1", FOUND)
    size = record.preprocess.image_size
    cost = network_cost(FOUND, size, num_classes=10)
    assert manifest.flops_per_image == cost.flops
    assert read_program(artifact).spec == read_program(checkpoint).spec == FOUND
    images = torch.rand(3, 3, size, size).numpy()
    expected = open_runtime(checkpoint).infer(images)
    assert abs(open_runtime(artifact).infer(images) - expected).max() < 1e-3


def test_an_interrupted_run_of_a_file_goes_on_without_the_file(tmp_path: Path):
    config = small_run(tmp_path, variant="found-1", architecture=FOUND, epochs=1, steps=3)
    config = replace(config, progressive=replace(config.progressive, num_stages=1))
    stopped = replace(config, name="stopped")
    begin_run.main(replace(config, name="whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.running.trainer.stop_flag", lambda: nullcontext(StopFlag(True)))
        with pytest.raises(KeyboardInterrupt):
            begin_run.main(stopped)
    checkpoint = begin_run.main(ResumeConfig(tmp_path / "stopped"))
    assert checkpoint is not None
    weights = [
        read_checkpoint(tmp_path / name / "checkpoint").weights_sha256
        for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]
    other = replace(FOUND, head_channels=64)
    with raises_naming(CheckpointError, "found-1"):
        begin_run.main(replace(config, name="new", architecture=other, weights=str(checkpoint)))


def test_the_family_command_shows_a_file(file: Path):
    done = subprocess.run(
        [sys.executable, "-m", "efficientnet", "--variant-file", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    total = network_cost(FOUND, FOUND.eval_image_size)
    assert f"{total.num_parameters:,}" in done.stdout
    assert "found-1 at 32 px" in done.stdout


def test_the_family_command_writes_a_larger_one(file: Path, tmp_path: Path):
    larger = tmp_path / "larger.json"
    words = ["--variant-file", str(file), "--phi", "2", "--save", str(larger)]
    subprocess.run(
        [sys.executable, "-m", "efficientnet", *words], cwd=ROOT, capture_output=True, check=True
    )
    spec = read_variant_file(larger)
    assert (spec.name, spec.eval_image_size) == ("found-1-phi-2", round(32 * 1.15**2))
    assert spec == scale_up(FOUND, compound_scale(2), "v2", spec.name)


def test_a_variant_of_ones_own_is_not_called_like_a_built_in_one():
    with raises_naming(ValueError, "tiny"):
        TrainConfig(**vars(small_run(Path())) | {"architecture": VARIANTS["tiny"]})
    named = VariantSpec(**vars(FOUND) | {"name": "b0"})
    with raises_naming(ValueError, "b0", "tiny"):
        small_run(Path(), architecture=named)

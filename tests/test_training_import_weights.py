import io
import json
import os
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.network.variants import VARIANTS
from efficientnet.network.weights import WeightsError
from efficientnet.runtimes import open_runtime
from training import import_weights
from training.import_weights import ImportConfig
from training.inputs import published_weights as published
from training.inputs.published_weights import load_published, published_entries

# float32 through some 50 layers, relative to the largest logit.
FLOAT32_TOLERANCE = 1e-5


def photo(width: int = 350, height: int = 300) -> Image.Image:
    # Details of three pixels, which each filter and each offset treats differently.
    pixels = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def timm_b0() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(timm.create_model("tf_efficientnet_b0"))


@pytest.fixture
def tensors(timm_b0: nn.Module) -> dict[str, Tensor]:
    return dict(timm_b0.state_dict())


def require_same_answers(peer: nn.Module, transform: object, checkpoint: Path) -> None:
    runtime = open_runtime(checkpoint)
    data = png(photo())
    images = preprocess(data, read_checkpoint(checkpoint).preprocess)[None]
    with torch.inference_mode():
        expected = peer(transform(Image.open(io.BytesIO(data)))[None]).numpy()
    found = runtime.infer(images)
    assert np.abs(found - expected).max() < FLOAT32_TOLERANCE * np.abs(expected).max()


def timm_transform(model: nn.Module) -> object:
    config = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg, use_test_size=True)
    return timm.data.create_transform(**config)


def test_a_folder_that_timm_wrote_becomes_a_checkpoint(
    timm_b0: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    timm.models.save_for_hf(timm_b0, tmp_path / "b0", safe_serialization="both")
    source = tmp_path / "b0" / "model.safetensors"
    checkpoint = import_weights.main(ImportConfig("b0", str(source), output=tmp_path / "runs"))

    require_same_answers(timm_b0, timm_transform(timm_b0), checkpoint)
    record = read_checkpoint(checkpoint)
    assert record.network.padding == "same"
    assert len(set(record.class_names)) == record.num_classes == 1000
    assert (record.data, record.epoch, record.top1) == ("sample-photos", 0, None)
    assert record.train_config == {"source": str(source), "sha256": sha256_of_file(source)}
    assert (tmp_path / "runs" / "latest").resolve() == checkpoint.parent.resolve()
    assert "by config.json beside it" in caplog.text and "5,288,548" in caplog.text
    pickled = load_published(str(tmp_path / "b0" / "pytorch_model.bin"), VARIANTS["b0"])
    assert pickled.preprocess == record.preprocess


def test_a_file_that_torchvision_wrote_becomes_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    peer = with_statistics(torchvision.models.efficientnet_v2_s())
    torch.save(peer.state_dict(), tmp_path / "v2.pth")
    config = ImportConfig("v2-s", str(tmp_path / "v2.pth"), output=tmp_path / "runs")
    checkpoint = import_weights.main(config)
    transform = torchvision.models.EfficientNet_V2_S_Weights.DEFAULT.transforms()
    require_same_answers(peer, transform, checkpoint)
    assert "all that is published of its shape" in caplog.text


# timm's b0 has one shape and six published weights, which are not used alike.
def test_a_bare_file_that_may_be_used_in_several_ways_lists_them(
    tensors: dict[str, Tensor], tmp_path: Path
):
    torch.save(tensors, tmp_path / "b0.pth")
    with pytest.raises(WeightsError) as caught:
        load_published(str(tmp_path / "b0.pth"), VARIANTS["b0"])
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6
    assert any(
        "--like timm:tf_efficientnet_b0.aa_in1k  padding same, batch norm epsilon 0.001" in line
        for line in lines
    )


def test_like_decides_between_them(tensors: dict[str, Tensor], tmp_path: Path):
    safetensors.torch.save_file(tensors, tmp_path / "b0.safetensors")
    source = str(tmp_path / "b0.safetensors")
    ap = load_published(source, VARIANTS["b0"], like="timm:tf_efficientnet_b0.ap_in1k")
    assert ap.preprocess.mean == (0.5, 0.5, 0.5) and ap.network.padding == "same"
    assert ap.origin == "b0.safetensors like timm:tf_efficientnet_b0.ap_in1k"
    ra = load_published(source, VARIANTS["b0"], like="timm:efficientnet_b0.ra_in1k")
    assert ra.network.padding == "symmetric" and ra.network.batch_norm_epsilon == 1e-5


def test_an_architecture_alone_means_its_default(
    tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    torch.save(tensors, tmp_path / "b0.pth")
    load_published(str(tmp_path / "b0.pth"), VARIANTS["b0"], like="timm:tf_efficientnet_b0")
    assert "stands for its default, timm:tf_efficientnet_b0.ns_jft_in1k" in caplog.text


@pytest.fixture
def published_by_hash(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    path = tmp_path / "renamed.pth"
    torch.save(tensors, path)
    entries = dict(published_entries())
    name = "timm:tf_efficientnet_b0.ap_in1k"
    url = f"https://host.invalid/tf_efficientnet_b0_ap-{sha256_of_file(path)[:8]}.pth"
    entries[name] = replace(entries[name], url=url)
    monkeypatch.setattr(published, "published_entries", lambda: entries)
    return path


def test_a_published_file_is_known_by_its_hash(published_by_hash: Path):
    found = load_published(str(published_by_hash), VARIANTS["b0"])
    assert found.origin == "timm:tf_efficientnet_b0.ap_in1k"
    assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_like_against_the_hash_is_an_error(published_by_hash: Path):
    with pytest.raises(WeightsError, match="its SHA-256 and --like do not agree"):
        load_published(
            str(published_by_hash), VARIANTS["b0"], like="timm:tf_efficientnet_b0.aa_in1k"
        )


def test_like_against_config_json_is_an_error(timm_b0: nn.Module, tmp_path: Path):
    timm.models.save_for_hf(timm_b0, tmp_path, safe_serialization=True)
    source = str(tmp_path / "model.safetensors")
    like = "timm:efficientnet_b0.ra_in1k"
    with pytest.raises(WeightsError, match=r"config\.json beside it and --like do not agree"):
        load_published(source, VARIANTS["b0"], like)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "tf_efficientnet_b1"}, "says tf_efficientnet_b1, expected timm:tf_eff"),
        ({"model_args": {"bn_eps": 0.1}}, "built it with bn_eps=0.1"),
        ({"pretrained_cfg": {"input_size": [3, 224, 200]}}, "images of 224 x 200 pixels"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop mode border"),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, "interpolation: Input should be"),
    ],
)
def test_a_config_that_cannot_be_followed_is_an_error(
    change: dict, expected: str, timm_b0: nn.Module, tmp_path: Path
):
    timm.models.save_for_hf(timm_b0, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError) as caught:
        load_published(str(tmp_path / "model.safetensors"), VARIANTS["b0"])
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"architecture": "x"}', '{"architecture": []}'])
def test_a_config_that_is_not_timms_is_told_and_not_used(
    text: str, tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    torch.save(tensors, tmp_path / "b0.pth")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="add what it is used like"):
        load_published(str(tmp_path / "b0.pth"), VARIANTS["b0"])
    assert "is not one that timm writes" in caplog.text


def test_a_network_of_other_classes_needs_like_and_has_no_names(
    tensors: dict[str, Tensor], tmp_path: Path
):
    tensors["classifier.weight"] = tensors["classifier.weight"][:10].clone()
    tensors["classifier.bias"] = tensors["classifier.bias"][:10].clone()
    torch.save(tensors, tmp_path / "b0.pth")
    source = str(tmp_path / "b0.pth")
    with pytest.raises(WeightsError, match="none has 10 classes; add what"):
        load_published(source, VARIANTS["b0"], num_classes=None)
    found = load_published(source, VARIANTS["b0"], "timm:tf_efficientnet_b0.in1k", num_classes=None)
    assert found.class_names is None and found.tensors["classifier.1.bias"].shape == (10,)
    with pytest.raises(WeightsError, match=r"classifier\.weight has 10 classes, expected 1000"):
        load_published(source, VARIANTS["b0"], "timm:tf_efficientnet_b0.in1k")


def test_the_weights_of_a_checkpoint_of_ours_are_not_guessed_at(
    tensors: dict[str, Tensor], tmp_path: Path
):
    torch.save(tensors, tmp_path / "b0.pth")
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(WeightsError, match="belongs to a checkpoint of this project"):
        load_published(str(tmp_path / "b0.pth"), VARIANTS["b0"])


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was-run",)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("x.pth", lambda t: saved(t)[:-1000], "truncated, damaged or no PyTorch file"),
        ("x.pth", lambda t: saved(t)[:50_000], "truncated, damaged or no PyTorch file"),
        ("x.safetensors", lambda t: safetensors.torch.save(t)[:-9], "truncated, damaged or no saf"),
        ("x.pth", lambda _: b"hello, these are words", "truncated, damaged or no PyTorch file"),
        ("x.pth", lambda t: safetensors.torch.save(t), "truncated, damaged or no PyTorch file"),
        ("x.safetensors", lambda t: saved(t), "truncated, damaged or no safetensors file"),
        ("x.safetensors", lambda _: b"", "is empty (0 bytes)"),
        ("x.pth", lambda _: b"", "is empty (0 bytes)"),
        ("x.pth", lambda t: saved({**t, "x": Code()}), "may run code when it is loaded (posix.mkd"),
        ("x.pth", lambda _: saved(nn.Linear(2, 2)), "(torch.nn.modules.linear.Linear), expected"),
        ("x.pth", lambda t: saved({"epoch": 3, "model": t}), "save those you mean: torch.save("),
        ("x.pth", lambda t: saved({**t, "epoch": 3}), "'epoch' is a int, expected a tensor"),
        ("x.pth", lambda t: saved(list(t.values())), "holds a list, expected names"),
        ("x.pth", lambda _: saved({}), "holds nothing, expected names"),
        ("x.h5", lambda t: saved(t), "expected it to end in .safetensors or one of .pth"),
        ("x.pth", lambda t: saved({k: t[k] for k in t if k != "bn2.bias"}), "bn2.bias is missing"),
        ("x.pth", lambda t: saved({**t, "head.bias": t["bn2.bias"]}), "head.bias [1280] is extra"),
        (
            "x.pth",
            lambda t: saved({**t, "bn2.bias": t["bn2.bias"] / 0}),
            "bn2.bias has 1280 of 128",
        ),
        ("x.pth", lambda t: saved({**t, "bn1.bias": t["bn2.bias"]}), "shape [1280], expected [32]"),
    ],
)
def test_a_damaged_file_is_told_and_nothing_is_written(
    name: str,
    make,
    expected: str,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(make(tensors))
    with pytest.raises(WeightsError) as caught:
        import_weights.main(ImportConfig("b0", name, like="timm:tf_efficientnet_b0.in1k"))
    assert expected in str(caught.value)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_classes_and_other_variants_are_told(tmp_path: Path):
    model = timm.create_model("tf_efficientnetv2_b0", num_classes=21843)
    torch.save(model.state_dict(), tmp_path / "21k.pth")
    with pytest.raises(WeightsError, match=r"classifier\.weight has 21843 classes, expected 1000"):
        load_published(str(tmp_path / "21k.pth"), VARIANTS["v2-b0"])
    with pytest.raises(WeightsError, match="it looks like v2-b0, not v2-b1"):
        load_published(str(tmp_path / "21k.pth"), VARIANTS["v2-b1"])


@pytest.mark.parametrize("name", ["nowhere.pth", "folder.pth"])
def test_what_is_no_file_is_told(name: str, tmp_path: Path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match=rf"no weights file at .*{name} \((nothing|a folder)"):
        load_published(str(tmp_path / name), VARIANTS["b0"])


def test_weights_that_overflow_are_not_imported(tensors: dict[str, Tensor], tmp_path: Path):
    tensors["conv_head.weight"] = tensors["conv_head.weight"] * 1e38
    tensors["bn2.weight"] = torch.full((1280,), 1e38)
    torch.save(tensors, tmp_path / "b0.pth")
    config = ImportConfig(
        "b0", str(tmp_path / "b0.pth"), "timm:tf_efficientnet_b0", tmp_path / "runs"
    )
    with pytest.raises(WeightsError, match="logits that are not finite"):
        import_weights.main(config)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def download(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(published.huggingface_hub, "hf_hub_download", download)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("source", "variant", "url"),
    [
        (
            "timm:tf_efficientnetv2_b0.in1k",
            "v2-b0",
            "https://huggingface.co/timm/tf_efficientnetv2_b0.in1k/resolve/main/model.safetensors",
        ),
        (
            "timm:efficientnet_b0.ra4_e3600_r224_in1k",
            "b0",
            "https://huggingface.co/timm/efficientnet_b0.ra4_e3600_r224_in1k/resolve/main",
        ),
        (
            "torchvision:EfficientNet_B0_Weights.IMAGENET1K_V1",
            "b0",
            "https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth",
        ),
    ],
)
def test_without_a_network_it_says_how_to_bring_the_file(
    source: str, variant: str, url: str, offline: Path
):
    with pytest.raises(WeightsError) as caught:
        load_published(source, VARIANTS[variant])
    message = str(caught.value)
    assert f"cannot fetch {source}: <urlopen error [Errno -2] Name or service" in message
    assert url in message
    assert f"import_weights.py {variant} --from FILE --like {source}" in message
    assert not offline.exists() or not list(offline.iterdir())


def test_what_an_earlier_download_left_is_checked(tensors: dict[str, Tensor], offline: Path):
    offline.mkdir(parents=True)
    torch.save(tensors, offline / "tf_efficientnet_b0_ap-f262efe1.pth")
    with pytest.raises(WeightsError, match=r"is damaged: .*, expected f262efe1; delete it"):
        load_published("timm:tf_efficientnet_b0.ap_in1k", VARIANTS["b0"])


def test_a_fetched_file_is_used_like_its_name_says(published_by_hash: Path, offline: Path):
    offline.mkdir(parents=True)
    name = "timm:tf_efficientnet_b0.ap_in1k"
    entry = published.published_entries()[name]
    shutil.copy(published_by_hash, offline / Path(entry.url or "").name)
    found = load_published(name, VARIANTS["b0"])
    assert (found.origin, found.preprocess.mean) == (name, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("source", "like", "expected"),
    [
        ("timm:tf_efficientnet_v2_s", None, "the nearest are timm:tf_efficientnetv2_s"),
        ("torchvision:efficientnetv2_s", None, "torchvision:efficientnet_v2_s"),
        ("timm:tf_efficientnet_b1.aa_in1k", None, "is a b1, expected a v2-s: one of timm:"),
        ("timm:tf_efficientnetv2_s.in21k", None, "has 21843 classes, expected 1000"),
        ("timm:efficientnetv2_s", None, "there are no weights of timm:efficientnetv2_s.untrained"),
        ("timm:tf_efficientnetv2_s", "timm:tf_efficientnetv2_s", "leave it out"),
        ("x.pth", "tf_efficientnetv2_s", "no library has tf_efficientnetv2_s; the nearest"),
        ("x.pth", "timm:tf_efficientnet_b1", "is a b1, expected a v2-s"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_fetched(
    source: str, like: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(published, "_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(WeightsError) as caught:
        load_published(source, VARIANTS["v2-s"], like)
    assert expected in str(caught.value)


def test_the_preprocessing_of_all_published_weights_is_the_libraries_own():
    data = png(photo(390, 350))
    image = Image.open(io.BytesIO(data))
    for name, entry in published_entries().items():
        library, _, weights = entry.source.partition(":")
        if name != entry.source:
            continue
        if library == "timm":
            cfg = timm.models.get_pretrained_cfg(weights).to_dict()
            config = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
            transform = timm.data.create_transform(**config)
        else:
            transform = torchvision.models.get_weight(weights).transforms()
        spec = entry.usage.preprocess(entry.source)
        difference = np.abs(preprocess(data, spec) - transform(image).numpy())
        # Pillow rounds to 8 bits, a pixel in some hundreds perhaps the other way; the wrong filter
        # changes all of them, by 2.7 counts in the mean and more.
        one_count = 1.01 / 255 / min(spec.std)
        assert difference.max() < one_count and difference.mean() < one_count / 100, name

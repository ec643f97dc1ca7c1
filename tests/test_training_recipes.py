import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from efficientnet.formats.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from efficientnet.network.model import EfficientNet, build_model
from efficientnet.network.variants import VARIANTS, NetworkOptions
from training.batches.augmentation import Augmentation
from training.inputs import initial_weights as start
from training.inputs.published_weights import PublishedWeights
from training.learning.state import new_state
from training.recipe.config import config_from_json, config_to_json
from training.recipe.recipes import RECIPES, digits_recipe, imagenet_recipe
from training.recipe.stages import plan_stages
from training.run import main, parse


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_recipe_for_a_folder_and_one_for_the_digits(variant: str):
    for recipe in (imagenet_recipe(variant), digits_recipe(variant)):
        assert recipe.variant == variant
        assert config_from_json(config_to_json(recipe)) == recipe
    spec, paper = VARIANTS[variant], imagenet_recipe(variant)
    assert paper.eval_image_size == spec.eval_image_size
    assert paper.stochastic_depth_rate == 0.2


@pytest.mark.parametrize(
    ("variant", "train_size", "eval_size", "dropout"),
    [("b0", 176, 224, 0.2), ("b4", 304, 380, 0.4), ("b7", 480, 600, 0.5), ("v2-b3", 240, 300, 0.3)],
)
def test_v1_and_the_b_models_train_at_one_size_with_autoaugment(
    variant, train_size, eval_size, dropout
):
    recipe = parse([variant, "--data", "."])
    (stage,) = plan_stages(recipe.progressive)
    assert (stage.image_size, stage.dropout_rate) == (train_size, dropout)
    assert stage.randaugment_magnitude == stage.mixup_alpha == 0 and recipe.autoaugment
    assert recipe.eval_image_size == eval_size
    crop = recipe.crop_fraction
    assert crop == pytest.approx(eval_size / (eval_size + 32)) if eval_size < 320 else crop is None


def test_autoaugment_changes_images_and_follows_the_seed():
    recipe = replace(imagenet_recipe("b0"), min_crop_area=1.0, horizontal_flip=False)
    augment = Augmentation(recipe, plan_stages(recipe.progressive)[0])
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((176, 176)).save(file, "PNG")
    image = file.getvalue()
    results = [augment(image, seed).tobytes() for seed in range(12)]
    assert len(set(results)) > 4
    assert results == [augment(image, seed).tobytes() for seed in range(12)]


def test_autoaugment_and_randaugment_together_are_refused():
    with pytest.raises(ValueError, match="expected one of them"):
        replace(imagenet_recipe("v2-s"), autoaugment=True)


def small(variant: str, output: Path, **changes: object):
    recipe = replace(digits_recipe("tiny"), variant=variant, epochs=1, batch_size=256)
    one_stage = replace(recipe.progressive, num_stages=1)
    return replace(recipe, progressive=one_stage, output=output, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return main(small("tiny", tmp_path_factory.mktemp("runs"), padding="same"))


def test_padding_is_a_setting_that_the_checkpoint_keeps(trained: Path):
    model, record = load_checkpoint(trained)
    assert record.network == NetworkOptions(padding="same", batch_norm_momentum=0.1)
    symmetric = build_model(VARIANTS["tiny"], 10).eval()
    symmetric.load_state_dict(model.state_dict())
    assert isinstance(model, EfficientNet)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), symmetric(images))


def test_a_checkpoint_starts_another_run_with_its_padding_and_a_new_classifier(
    trained: Path, tmp_path: Path
):
    old, _ = load_checkpoint(trained)
    config = small("tiny", tmp_path, weights=str(trained))
    loaded = start.load_start(config)
    assert loaded is not None
    state = new_state(config, loaded.network, 7, torch.device("cpu"), loaded.tensors)
    own = state.model.state_dict()
    for name, tensor in old.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(own[name], tensor), name
    assert own["classifier.1.weight"].shape == (7, 128)
    # The average, too, starts from them.
    assert torch.equal(state.average.tensors["features.0.0.weight"], own["features.0.0.weight"])
    assert read_checkpoint(main(config)).network.padding == "same"


def test_mean_deviation_and_epsilon_of_the_weights_are_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, record = load_checkpoint(trained)
    published = PublishedWeights(
        tensors=load_checkpoint(trained)[0].state_dict(),
        network=NetworkOptions(padding="same", batch_norm_epsilon=1e-5),
        preprocess=record.preprocess.model_copy(update={"mean": (0.4, 0.5, 0.6)}),
        class_names=None,
        origin="timm:somebody",
        sha256="0" * 64,
    )
    monkeypatch.setattr(start, "load_published", lambda *args, **kwargs: published)
    made = read_checkpoint(main(small("tiny", tmp_path, weights="timm:somebody")))
    assert made.preprocess.mean == (0.4, 0.5, 0.6)
    assert made.network.batch_norm_epsilon == 1e-5


def test_another_padding_than_the_weights_have_is_refused(trained: Path, tmp_path: Path):
    config = small("tiny", tmp_path, weights=str(trained), padding="symmetric")
    with pytest.raises(ValueError, match="used with same padding; leave --padding out"):
        main(config)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_variant_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds a tiny, expected a v2-b0"):
        main(small("v2-b0", tmp_path, weights=str(trained)))


def test_weights_like_without_weights_is_refused():
    with pytest.raises(ValueError, match="weights_like is given without weights"):
        replace(digits_recipe("tiny"), weights_like="timm:tf_efficientnet_b0")


def test_recipes_are_chosen_by_name_with_any_data():
    pretrain = parse(["v2-l", "--recipe", "pretrain", "--data", "."])
    assert (pretrain.epochs, pretrain.eval_image_size, pretrain.optimizer.schedule) == (
        60,
        224,
        "cosine",
    )
    assert pretrain.optimizer.learning_rate == 0.008 and pretrain.stochastic_depth_rate == 0
    finetune = parse(["v2-l", "--recipe=finetune", "--data", ".", "--weights", "runs/x"])
    assert (finetune.batch_size, finetune.epochs, finetune.optimizer.ema_decay) == (512, 15, 0.9996)
    assert finetune.progressive.image_size == (480, 480) and finetune.weights == "runs/x"
    transfer = parse(["b3", "--data", "cifar10", "--recipe", "transfer", "--steps", "200"])
    assert (transfer.steps, transfer.recipe, transfer.optimizer.weight_decay) == (
        200,
        "transfer",
        0,
    )
    assert RECIPES["transfer"]("b3", "paper").steps == 10_000
    assert transfer.cutout == 0.5 and transfer.optimizer.schedule == "cosine"
    digits = parse(["v2-b0", "--data", "cifar10", "--recipe", "digits"])
    assert digits == replace(digits_recipe("v2-b0"), data="cifar10")


def test_the_schedule_decides_the_recipes_values():
    released = parse(["v2-m", "--data", ".", "--schedule", "released"])
    assert released == replace(imagenet_recipe("v2-m", "released"), data=".")
    assert released.progressive.cutmix_alpha == (0, 0.2)
    assert parse(["v2-m", "--schedule", "fixed"]).progressive.schedule == "fixed"
    transfer = parse(["v2-s", "--recipe", "transfer", "--schedule", "released"])
    assert transfer.optimizer.schedule == "constant" and transfer.optimizer.weight_decay == 1e-5


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--recipe", "imagnet"], "no recipe 'imagnet'; there are digits, imagenet, pretrain"),
        (["--schedule", "linear"], "no schedule 'linear'; there are paper, released, fixed"),
    ],
)
def test_unknown_recipes_and_schedules_are_named_with_those_there_are(args, reason):
    with pytest.raises(ValueError, match=reason):
        parse(["v2-s", *args])

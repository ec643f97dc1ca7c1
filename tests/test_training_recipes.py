import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facts import raises_naming
from PIL import Image
from small_trainings import epoch_metrics

from efficientnet.formats.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from efficientnet.network.model import EfficientNet, build_model
from efficientnet.network.variants import VARIANTS, NetworkOptions
from training.batches.augmentation import Augmentation
from training.batches.sampler import StepPlan
from training.inputs import initial_weights as start
from training.inputs.named_sets import NAMED_SETS
from training.inputs.published_weights import PublishedWeights
from training.inputs.training_data import NAMED_FACTS
from training.learning.state import new_state
from training.recipe import recipes
from training.recipe.config import config_from_json, config_to_json
from training.recipe.recipes import FITTED_RECIPES, RecipeFacts, digits_recipe, imagenet_recipe
from training.recipe.stages import plan_stages
from training.running.begin_run import main, misfits
from training.running.command_line import parse
from training.running.metrics import signs_of_failure


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
    recipe = parse([variant, "--data", "imagenet"])
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
    with raises_naming(ValueError, "autoaugment", "randaugment_magnitude"):
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


def test_mean_std_and_epsilon_of_the_weights_are_kept(
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
    with raises_naming(ValueError, "same", "--padding"):
        main(config)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_variant_is_refused(trained: Path, tmp_path: Path):
    with raises_naming(CheckpointError, "tiny", "v2-b0"):
        main(small("v2-b0", tmp_path, weights=str(trained)))


def test_weights_like_without_weights_is_refused():
    with raises_naming(ValueError, "weights_like"):
        replace(digits_recipe("tiny"), weights_like="timm:tf_efficientnet_b0")


def test_recipes_are_chosen_by_name_with_any_data():
    pretrain = parse(["v2-l", "--recipe", "pretrain", "--data", "."])
    assert (pretrain.epochs, pretrain.eval_image_size) == (60, 224)
    assert pretrain.optimizer.schedule == "cosine"
    assert pretrain.optimizer.learning_rate == 0.008 and pretrain.stochastic_depth_rate == 0
    finetune = parse(["v2-l", "--recipe=finetune", "--data", ".", "--weights", "runs/x"])
    assert (finetune.batch_size, finetune.epochs, finetune.optimizer.ema_decay) == (512, 15, 0.9996)
    assert finetune.progressive.image_size == (480, 480) and finetune.weights == "runs/x"
    transfer = parse(["b3", "--data", "cifar10", "--recipe", "transfer", "--steps", "200"])
    assert (transfer.steps, transfer.recipe) == (200, "transfer")
    assert transfer.optimizer.weight_decay == 0
    assert recipes.RECIPES["transfer"]("b3", "paper").steps == 10_000
    assert transfer.cutout == 0.5 and transfer.optimizer.schedule == "cosine"
    digits = parse(["v2-b0", "--data", "cifar10", "--recipe", "digits"])
    assert digits == replace(digits_recipe("v2-b0"), data="cifar10")


def facts(num_images: int, **changes: int) -> RecipeFacts:
    return replace(RecipeFacts(num_images, 4, 32), **changes)


@pytest.mark.parametrize(
    ("num_images", "num_classes", "has_weights", "recipe"),
    [
        (3_200, 4, False, "small"),
        (3_200, 4, True, "small-finetune"),
        (299_999, 20_000, False, "small"),
        (1_281_167, 1_000, False, "imagenet"),
        (1_281_167, 1_000, True, "finetune"),
        (12_000_000, 21_841, False, "pretrain"),
    ],
)
def test_the_recipe_follows_from_images_classes_and_weights(
    num_images: int, num_classes: int, has_weights: bool, recipe: str
):
    chosen, reason = recipes.choose_recipe(facts(num_images, num_classes=num_classes), has_weights)
    assert chosen == recipe
    assert f"{num_images:,}" in reason and f"{num_classes:,}" in reason


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pets")
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for index in range(50):
            Image.new("RGB", (120, 97 + index % 3), (index, 0, 0)).save(
                folder / name / f"{index}.png"
            )
    return folder


def test_a_small_folder_is_trained_at_its_own_size_in_batches_it_can_fill(pets: Path):
    recipe = parse(["v2-b0", "--data", str(pets)])
    assert recipe.recipe == "small" and "80 training images" in recipe.recipe_reason
    assert "of 2 classes, 98 px" in recipe.recipe_reason
    assert recipe.eval_image_size == recipe.progressive.image_size[1] == 96
    assert recipe.batch_size == 16 and recipe.epochs == 100
    assert config_from_json(config_to_json(recipe)) == recipe


def test_what_is_asked_for_changes_what_follows_from_it(pets: Path):
    usual = parse(["v2-b0", "--data", str(pets)])
    short = parse(["v2-b0", "--data", str(pets), "--epochs=2", "--batch_size", "4"])
    assert (short.epochs, short.batch_size) == (2, 4)
    assert short.progressive.num_stages == 2
    assert short.optimizer.ema_decay < usual.optimizer.ema_decay
    assert short.optimizer.warmup_epochs < usual.optimizer.warmup_epochs
    asked = parse(["v2-b0", "--data", str(pets), "--optimizer.ema-decay", "0.5"])
    assert asked.optimizer.ema_decay == 0.5
    steps = parse(["v2-b0", "--data", str(pets), "--steps", "30"])
    assert steps.steps == 30 and steps.optimizer.warmup_epochs == pytest.approx(0.05 * 30 / 5)


def test_asking_for_a_recipe_or_named_data_looks_at_no_images():
    assert parse(["v2-s", "--data", "/nowhere", "--recipe", "imagenet"]).recipe_reason == ""
    assert parse(["v2-s", "--data", "imagenet"]).recipe == "imagenet"
    cifar = parse(["v2-b0", "--data", "cifar10"])
    assert (cifar.recipe, cifar.eval_image_size, cifar.batch_size) == ("small", 64, 256)
    with raises_naming(FileNotFoundError, "/nowhere"):
        parse(["v2-s", "--data", "/nowhere"])


def test_named_sets_have_their_facts():
    assert set(NAMED_FACTS) == set(NAMED_SETS)


@pytest.mark.parametrize("num_images", [2, 10, 80, 500, 3_200, 50_000, 299_999])
@pytest.mark.parametrize("variant", ["tiny", "v2-b0", "v2-s", "b7"])
def test_a_fitted_recipe_fills_batches_and_warms_up_and_averages_within_the_run(
    num_images: int, variant: str
):
    for fitted in FITTED_RECIPES.values():
        recipe = fitted(variant, "paper", facts(num_images))
        recipe.require_stages_fit()
        plan = StepPlan(num_images, recipe, (recipe.batch_size,) * recipe.progressive.num_stages)
        optimizer = recipe.optimizer
        assert 2 <= recipe.batch_size <= 256
        assert optimizer.warmup_epochs * plan.steps_per_epoch <= 0.06 * plan.num_steps
        assert 1 / (1 - optimizer.ema_decay) <= 0.06 * plan.num_steps + 2
        peak = optimizer.learning_rate * recipe.batch_size / 256
        small = fitted(variant, "paper", facts(num_images, batch_size=64)).optimizer
        ratio = peak / (small.learning_rate * 64 / 256)
        assert ratio == pytest.approx((recipe.batch_size / 64) ** 0.5, rel=0.01)


def test_fine_tuning_takes_the_size_of_the_weights(trained: Path, pets: Path):
    args = ["tiny", "--data", str(pets), "--weights", str(trained)]
    recipe = parse(args)
    assert recipe.recipe == "small-finetune" and "--weights to start from" in recipe.recipe_reason
    assert recipe.progressive.image_size == (32, 32)
    assert start.start_image_size("timm:tf_efficientnetv2_s.in1k") == 384
    assert start.start_image_size("somewhere.pth") is None


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({"train_loss": 2.5, "val_loss": 24_133.0}, ("24,133", "2.5")),
        ({"train_loss": 1.2, "val_loss": 1.5}, ()),
        ({"train_loss": 1.2, "val_loss": 37.5}, ("37.5",)),
        ({"train_loss": 2.5, "val_loss": 1.2}, ("2.5",)),
    ],
)
def test_losses_that_explode_are_said(changes: dict[str, float], signs: tuple[str, ...]):
    said = signs_of_failure(epoch_metrics(3, **changes), num_classes=4)
    assert len(said) == len(signs)
    for text, sign in zip(reversed(said), signs, strict=True):
        assert sign in text and "1.39" in text


def test_an_explosion_is_said_in_the_epoch_it_happens(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--epochs", "2", "--optimizer.learning-rate", "300", "--num-workers", "0"]
    main(parse(["tiny", "--data", str(pets), "--output", str(tmp_path), *flags]))
    lines = capsys.readouterr().err.splitlines()
    epochs = [line for line in lines if line.startswith("epoch   2")]
    assert len(epochs) > 1 and any("guessing" in line for line in epochs)


def test_values_that_do_not_fit_the_number_of_steps_are_said():
    recipe = replace(imagenet_recipe("tiny"), epochs=8, batch_size=32, micro_batch_size=None)
    said = misfits(StepPlan(64, recipe, (32,) * 4))
    assert any("warmup_epochs" in text for text in said)
    assert any("batch_norm_momentum" in text for text in said)
    assert not misfits(StepPlan(1_281_167, imagenet_recipe("v2-s"), (32,) * 4))
    small = FITTED_RECIPES["small"]("v2-b0", "paper", facts(3_200))
    assert not misfits(StepPlan(3_200, small, (32,) * 4))
    many_steps = FITTED_RECIPES["small"]("v2-b0", "paper", facts(299_999, batch_size=8))
    assert many_steps.optimizer.ema_decay == 0.9999


def test_the_schedule_decides_the_recipes_values():
    released = parse(["v2-m", "--data", ".", "--recipe", "imagenet", "--schedule", "released"])
    assert released == replace(imagenet_recipe("v2-m", "released"), data=".")
    assert released.progressive.cutmix_alpha == (0, 0.2)
    assert parse(["v2-m", "--schedule", "fixed"]).progressive.schedule == "fixed"
    transfer = parse(["v2-s", "--recipe", "transfer", "--schedule", "released"])
    assert transfer.optimizer.schedule == "constant" and transfer.optimizer.weight_decay == 1e-5


@pytest.mark.parametrize(
    ("args", "facts"),
    [
        (["--recipe", "imagnet"], ("imagnet", "digits, imagenet, pretrain")),
        (["--schedule", "linear"], ("linear", "paper, released, fixed")),
    ],
)
def test_unknown_recipes_and_schedules_are_named_with_those_there_are(args, facts):
    with raises_naming(ValueError, *facts):
        parse(["v2-s", *args])

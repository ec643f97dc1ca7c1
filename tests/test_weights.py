"""The networks of timm and torchvision against ours, with weights that go through weights.py."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import timm
import torch
import torchvision
from facts import raises_naming, require_named
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efficientnet.network.architectures import ARCHITECTURES
from efficientnet.network.layouts import timm_names
from efficientnet.network.model import Dropout, build_model
from efficientnet.network.variants import VARIANTS, NetworkOptions
from efficientnet.network.weights import WeightsError, convert_weights, recognize_layout

# Largest |ours - theirs| over largest |theirs|, for each tensor as a whole: single gradients may be
# the difference of large terms. Both sum in float64, whose rounding (1e-16) grows over up to 300
# layers; a wrong epsilon (1e-5 for 1e-3) or padding is 1e-4 and more.
TOLERANCE = 1e-9

# Side of the images. 48 is even and stays so for some layers, so that SAME and symmetric padding
# differ; odd in one case. The networks are the same at every size.
SIZE, ODD_SIZE = 48, 47
BATCH_SIZE, NUM_CLASSES = 2, 1000

FAST = {
    "timm:tf_efficientnet_b0",
    "timm:tf_efficientnet_lite0",
    "timm:tf_efficientnetv2_b0",
    "timm:efficientnet_b0",
    "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s",
}
PEERS = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ARCHITECTURES
]


@dataclass(frozen=True)
class Answers:
    """What a network makes of the same images."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def build_peer(architecture: str) -> nn.Module:
    library, _, name = architecture.partition(":")
    if library == "timm":
        return timm.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
    return torchvision.models.get_model(name, dropout=0.0, stochastic_depth_prob=0.0)


def randomize(model: nn.Module, images: Tensor) -> None:
    """Give batch norm statistics and parameters that are far from the initial ones.

    Each layer's statistics are those of what it sees of `images`, changed, so that numbers stay of
    one size. With ones drawn alone they grow until the gates of squeeze-excite are steps, which
    made 1e-3 of a rounding error in V2-M.
    """

    def set_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean + 0.5 * variance.sqrt() * torch.randn_like(mean))
        norm.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2.0))
        norm.num_batches_tracked.fill_(7)

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            hooks.append(module.register_forward_pre_hook(set_statistics))
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()


def build_ours(architecture: str, tensors: dict[str, Tensor], network: NetworkOptions) -> nn.Module:
    with torch.device("meta"):
        model = build_model(VARIANTS[ARCHITECTURES[architecture][0]], NUM_CLASSES, options=network)
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.set_rate(0.0)
    return model


def answers_of(model: nn.Module, images: Tensor, labels: Tensor) -> Answers:
    model = model.double()
    with torch.no_grad():
        logits = model.eval()(images)
    loss = cross_entropy(model.train()(images), labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Answers(logits, loss.detach(), gradients)


def disagreement(ours: Tensor, theirs: Tensor, scale: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / scale).item()


def scale_of(name: str, theirs: Answers) -> Tensor:
    scale = theirs.gradients[name].abs().max()
    if name.endswith(".bias"):
        # The bias of a projection shifts channels that the next batch norm centers again: its
        # gradient is 0, what is found are rounding errors of terms as large as for the weight.
        of_weight = theirs.gradients[name.removesuffix("bias") + "weight"].abs().max()
        if scale < TOLERANCE * of_weight:
            return of_weight
    return scale


def compare(architecture: str, size: int) -> tuple[float, float, float]:
    """Return the disagreement of logits, loss and of the worst gradient."""
    variant, network = ARCHITECTURES[architecture]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH_SIZE, 3, size, size, dtype=torch.float64, generator=generator)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    torch.manual_seed(0)
    peer = build_peer(architecture)
    randomize(peer, images.float())
    file = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    layout = recognize_layout(file)
    assert layout == architecture.partition(":")[0]
    theirs = answers_of(peer, images, labels)
    del peer  # the largest would not fit into memory twice
    gc.collect()
    converted = convert_weights(file, VARIANTS[variant], NUM_CLASSES)
    ours = answers_of(build_ours(architecture, converted, network), images, labels)

    names = timm_names(VARIANTS[variant]) if layout == "timm" else {n: n for n in converted}
    assert {names[name] for name in ours.gradients} == set(theirs.gradients)
    worst = max(
        disagreement(gradient, theirs.gradients[names[name]], scale_of(names[name], theirs))
        for name, gradient in ours.gradients.items()
    )
    return (
        disagreement(ours.logits, theirs.logits, theirs.logits.abs().max()),
        disagreement(ours.loss, theirs.loss, theirs.loss),
        worst,
    )


@pytest.mark.parametrize("architecture", PEERS)
def test_logits_loss_and_gradients_equal_the_peers(
    architecture: str, record_property: Callable[[str, object], None]
):
    found = compare(architecture, SIZE)
    record_property("disagreement", found)
    print(f"\n{architecture}: logits {found[0]:.1e}, loss {found[1]:.1e}, gradient {found[2]:.1e}")
    assert max(found) <= TOLERANCE


def test_they_are_equal_at_an_odd_size_too():
    assert max(compare("timm:tf_efficientnet_b0", ODD_SIZE)) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "size", "is_equal"),
    [
        ({"padding": "symmetric"}, 64, False),
        # 65 -> 33 -> 17 -> 9 -> 5 -> 3: odd wherever there is a stride of 2.
        ({"padding": "symmetric"}, 65, True),
        ({"batch_norm_epsilon": 1e-5}, 64, False),
        ({"batch_norm_momentum": 0.01}, 64, True),
    ],
)
def test_padding_and_epsilon_decide_the_logits(change: dict, size: int, is_equal: bool):
    architecture = "timm:tf_efficientnet_b0"
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    peer = build_peer(architecture)
    randomize(peer, images)
    tensors = convert_weights(peer.state_dict(), VARIANTS["b0"], None)
    images = images.double()
    network = ARCHITECTURES[architecture][1].model_copy(update=change)
    ours = build_ours(architecture, tensors, network).double().eval()
    with torch.no_grad():
        expected = peer.double()(images)
        found = disagreement(ours(images), expected, expected.abs().max())
    assert found <= TOLERANCE if is_equal else found > 1e-4


@pytest.mark.parametrize("architecture", PEERS)
def test_the_table_says_what_the_libraries_build(architecture: str):
    network = ARCHITECTURES[architecture][1]
    with torch.device("meta"):
        peer = build_peer(architecture)
    norms = [module for module in peer.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {network.batch_norm_epsilon}
    assert {norm.momentum for norm in norms} == {network.batch_norm_momentum}
    strided = [m for m in peer.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    is_padded_inside = {conv.padding != (0, 0) for conv in strided}
    assert is_padded_inside == {network.padding == "symmetric"}


def test_the_table_has_every_peer():
    libraries = Counter(name.partition(":")[0] for name in ARCHITECTURES)
    assert libraries == {"timm": 37, "torchvision": 11}


@cache
def b0_of_timm() -> dict[str, Tensor]:
    return dict(timm.create_model("tf_efficientnet_b0").state_dict())


def timm_b0() -> dict[str, Tensor]:
    return dict(b0_of_timm())


def test_what_was_converted_has_the_order_and_types_of_the_model():
    converted = convert_weights(timm_b0(), VARIANTS["b0"], 1000)
    expected = build_model(VARIANTS["b0"], 1000).state_dict()
    assert list(converted) == list(expected)
    assert [t.dtype for t in converted.values()] == [t.dtype for t in expected.values()]


def test_half_precision_becomes_float32_and_is_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in timm_b0().items()}
    converted = convert_weights(tensors, VARIANTS["b0"], 1000)
    assert converted["features.0.0.weight"].dtype == torch.float32
    require_named(caplog.text, "float16", "float32")


def test_absent_counters_begin_at_zero_and_are_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    tensors = {n: t for n, t in timm_b0().items() if not n.endswith("num_batches_tracked")}
    converted = convert_weights(tensors, VARIANTS["b0"], 1000)
    assert converted["features.0.1.num_batches_tracked"].item() == 0
    require_named(caplog.text, 49, "num_batches_tracked")


def test_any_number_of_classes_is_taken_when_none_is_asked_for():
    tensors = timm.create_model("tf_efficientnet_b0", num_classes=7).state_dict()
    assert convert_weights(tensors, VARIANTS["b0"], None)["classifier.1.bias"].shape == (7,)
    with raises_naming(WeightsError, "classifier.weight", 7, 1000):
        convert_weights(tensors, VARIANTS["b0"], 1000)


def test_the_first_tensor_in_the_order_of_the_network_is_named():
    tensors = timm_b0()
    tensors["conv_head.weight"] = tensors["conv_head.weight"][1:]
    del tensors["blocks.1.0.bn1.bias"]
    tensors["extra.weight"] = torch.zeros(3)
    with raises_naming(WeightsError, "blocks.1.0.bn1.bias", "[96]", "2 more"):
        convert_weights(dict(reversed(tensors.items())), VARIANTS["b0"], 1000)


@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("bn1.weight", torch.tensor([float("nan")] * 32), ("bn1.weight", "32 of 32")),
        ("bn1.running_var", torch.full((32,), -0.5), ("bn1.running_var", "negative")),
        ("bn1.bias", torch.zeros(32, dtype=torch.int64), ("bn1.bias", "torch.int64")),
        ("bn1.num_batches_tracked", torch.zeros(()), ("bn1.num_batches_tracked", "torch.float32")),
        ("conv_stem.weight", torch.zeros(3, 32, 3, 3), ("[3, 32, 3, 3]", "[32, 3, 3, 3]")),
        ("classifier.bias", torch.zeros(10), ("classifier.bias", 10, 1000)),
        ("conv_stem.weight", torch.zeros(32, 3, 3, 3).to_sparse(), ("conv_stem.weight", "plain")),
        (
            "conv_stem.weight",
            torch.full((32, 3, 3, 3), 1e300, dtype=torch.float64),
            ("conv_stem.weight", "infinite"),
        ),
        ("blocks.9.0.bn1.bias", torch.zeros(4), ("blocks.9.0.bn1.bias", "[4]", "extra")),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, value: Tensor, facts: tuple[object, ...]):
    with raises_naming(WeightsError, *facts):
        convert_weights(timm_b0() | {name: value}, VARIANTS["b0"], 1000)


def test_another_variant_is_recognized():
    tensors = torchvision.models.efficientnet_b1().state_dict()
    with raises_naming(WeightsError, "b1", "b0"):
        convert_weights(tensors, VARIANTS["b0"], 1000)


def test_names_of_no_layout_are_refused():
    tensors = {f"encoder.{name}": tensor for name, tensor in timm_b0().items()}
    with raises_naming(WeightsError, "encoder.conv_stem.weight"):
        convert_weights(tensors, VARIANTS["b0"], 1000)


def test_the_naming_of_efficientnet_pytorch_has_no_fused_blocks():
    tensors = {"_conv_stem.weight": torch.zeros(24, 3, 3, 3)}
    with raises_naming(WeightsError, "efficientnet_pytorch", "v2-s"):
        convert_weights(tensors, VARIANTS["v2-s"], 1000)

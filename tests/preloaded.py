"""What forks of tests start with: the libraries, which take seconds, and the digits."""

from functools import cache

import training.running.begin_run  # noqa: F401
from efficientnet.images import datasets

datasets.digit_images = cache(datasets.digit_images)
datasets.digit_images()

"""What services of tests start with: what they import that reads no settings."""

import gc
import importlib
import os

from serving.settings import PROCESS_ENVIRONMENT

# Before numpy is imported.
os.environ.update(PROCESS_ENVIRONMENT)

for module in (
    "service_processes",
    "serving.worker",
    # What serving.service and an artifact import.
    "_bentoml_impl.client.proxy",
    "_bentoml_impl.server.app",
    "bentoml._internal.log",
    "httptools",
    "onnxruntime",
    "opentelemetry.instrumentation.asgi",
    "uvloop",
):
    importlib.import_module(module)

# Forks share its memory until they touch it, as each search for garbage would.
gc.freeze()

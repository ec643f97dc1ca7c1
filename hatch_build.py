"""Compiles the native engine when the package is installed or made a wheel; see [tool.hatch]."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "efficientnet/runtimes/native"


class EngineBuildHook(BuildHookInterface):
    """Puts _engine.so beside its sources, where both an editable install and a wheel find it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the engine; without a compiler the installation goes on without it."""
        # By its path: the package is not installed yet, nor is what it imports.
        path = Path(self.root) / NATIVE / "build.py"
        spec = importlib.util.spec_from_file_location("engine_build", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except module.BuildError as error:
            self.app.display_warning(f"the native engine is left out: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = f"{NATIVE}/{library.name}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"

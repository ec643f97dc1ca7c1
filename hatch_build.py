"""hatchling's build hook: the native engine is compiled where there is a C++ compiler."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "efficientnet/runtimes/native/build.py"


class NativeEngineHook(BuildHookInterface):
    """Puts the engine's library into the wheel, which is then for this platform alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; where that fails the package is made without, and the export says so."""
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / BUILD)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except module.BuildError as error:
            self.app.display_warning(f"the native engine is left out: {error}")
            return
        if version == "editable":
            return
        # Of Python it uses ctypes alone: one wheel for all versions.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(str(library.relative_to(self.root)))

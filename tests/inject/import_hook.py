"""Changes modules while they are imported: constants before the module runs, everything else after."""

import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType


def install(after: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """Apply ``$SETTINGS``, constants by module, and call ``after`` for each module that it names."""
    sys.meta_path.insert(0, _Finder(json.loads(os.environ["SETTINGS"]), after))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, settings, after):
        self._settings = settings
        self._after = after

    def find_spec(self, fullname, path, target=None):
        if fullname not in self._settings and fullname not in self._after:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None, fullname
        loader = spec.loader
        assert isinstance(loader, importlib.machinery.SourceFileLoader), fullname
        execute = loader.exec_module

        def get_code(name):
            source = loader.get_source(name)
            for constant, value in self._settings.get(fullname, {}).items():
                # In the source, since defaults of arguments are made of constants while the module runs.
                source, count = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {value!r}", source)
                assert count == 1, f"{fullname} has no {constant}"
            return compile(source, spec.origin, "exec")

        def exec_module(module):
            execute(module)
            if fullname in self._after:
                self._after[fullname](module)

        loader.get_code = get_code
        loader.exec_module = exec_module
        return spec

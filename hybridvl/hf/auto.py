"""Makes transformers' auto classes know hybridvl folders, whichever of the two packages is imported first.

`import hybridvl` must not import transformers, and transformers offers no place (such as an entry point) where a
package could announce its models without being imported. So the registration waits for the two modules that hold the
auto classes: a finder on sys.meta_path, asked about every import, lets the ordinary machinery find and run those two
and registers right after. Where transformers was imported first, it registers at once. Nothing of transformers is
replaced: only its public `register` methods are called.

The configuration class is registered itself. The model class is registered as a stand-in that imports the real one
when first used, because much of what imports the auto classes (Lightning does, through torchmetrics) never needs the
model, whose base classes take seconds to import; and so no import can become circular.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """Register with transformers: now, as far as its auto classes are imported, else as soon as they are."""
    for name, register in _REGISTER_AFTER.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: lets the other finders find, and registers once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = _REGISTER_AFTER.get(fullname)
        if register is None:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader, register)
        return spec


class _DeferredClass:
    """Stands for a class of a module that is imported when something of the class is first asked for."""

    def __init__(self, module: str, name: str, config_class: type) -> None:
        self.__module__ = module
        self.__name__ = name
        self.config_class = config_class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(getattr(importlib.import_module(self.__module__), self.__name__), name)


def _run_after(loader: importlib.abc.Loader, register: Callable[[ModuleType], None]) -> None:
    run = loader.exec_module

    def run_and_register(module: ModuleType) -> None:
        run(module)
        register(module)

    # On this one loader object, so that everything else it offers (sources, resources) stays its own.
    loader.exec_module = run_and_register  # type: ignore[method-assign]


def _register_config(module: ModuleType) -> None:
    from hybridvl.hf.configuration import HybridVLConfig

    module.AutoConfig.register(HybridVLConfig.model_type, HybridVLConfig, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from hybridvl.hf.configuration import HybridVLConfig

    model = _DeferredClass("hybridvl.hf.modeling", "HybridVLForConditionalGeneration", HybridVLConfig)
    for auto_class in (module.AutoModelForCausalLM, module.AutoModelForImageTextToText):
        auto_class.register(HybridVLConfig, model, exist_ok=True)


_REGISTER_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}

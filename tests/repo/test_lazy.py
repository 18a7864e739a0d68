"""What must stay light: `import hybridvl` and `hybridvl --help` load neither torch nor anything else that is heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import hybridvl

HEAVY = {
    "datasets",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numpy",
    "omegaconf",
    "PIL",
    "pytorch_lightning",
    "sklearn",
    "tensorboard",
    "torch",
    "transformers",
}


def loaded_modules(code: str) -> tuple[set[str], str]:
    """The top-level modules loaded after running code in a new interpreter, and what the code printed."""
    report = "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed, _, modules = done.stdout.rstrip().rpartition("\n")
    return {name.split(".")[0] for name in json.loads(modules)}, printed


def test_import_loads_no_heavy_module() -> None:
    modules, _ = loaded_modules("import hybridvl")
    assert "hybridvl" in modules
    assert not modules & HEAVY


def test_top_help_loads_no_heavy_module() -> None:
    modules, printed = loaded_modules(
        "from hybridvl.cli import main\nsys.argv = ['hybridvl', '--help']\nsys.exit(main())"
    )
    assert not modules & HEAVY
    for command in ("fit", "validate", "test", "predict", "plan", "generate", "convert", "bench", "doctor"):
        assert command in printed


@pytest.mark.parametrize("name", [name for name in hybridvl.__all__ if name != "__version__"])
def test_public_names_are_imported_on_first_use(name: str) -> None:
    modules, _ = loaded_modules(f"import hybridvl\nassert callable(hybridvl.{name})\nassert {name!r} in vars(hybridvl)")
    assert "torch" in modules


def test_every_public_name_is_listed_by_dir() -> None:
    assert set(hybridvl.__all__) <= set(dir(hybridvl))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hybridvl' has no attribute 'lod'"):
        _ = hybridvl.lod

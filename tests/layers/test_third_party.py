"""Mixers from elsewhere: by decorator, by import path, and by the entry point of an installed package."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridvl.layers import MIXERS, ConfigError, MixerConfig, Sequence, mixer_class, register, registry
from hybridvl.testing import check_mixer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "hybridvl-retention"


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module, imported from its sources."""
    spec = importlib.util.spec_from_file_location("hybridvl_retention", EXAMPLE / "src/hybridvl_retention/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hybridvl_retention", module)
    spec.loader.exec_module(module)
    return module


CHECK = """
import sys
from hybridvl.layers import MIXERS, mixer_class
from hybridvl.testing import check_mixer
assert "retention" not in MIXERS and "hybridvl_retention" not in sys.modules
config = mixer_class("retention")(heads=2, head_dim=8)
assert MIXERS["retention"] is type(config) and config.name == "retention"
assert sys.modules["hybridvl_retention"].__file__.startswith(sys.argv[1])
from hybridvl.pattern import parse_pattern
pattern = parse_pattern("(retention(heads=4) full)*2")
assert [type(layer).__name__ for layer in pattern.configs()] == ["RetentionConfig", "FullAttentionConfig"] * 2
print(f"worst error {max(check_mixer(config, width=16).values()):.1e}")
"""


def test_installed_wheel_is_found_by_entry_point(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)  # the build leaves files beside the sources
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("hybridvl_retention-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, site],
        env={"PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("worst error ")


def test_example_is_the_retention_of_the_paper(example: ModuleType) -> None:
    """Parallel form: (q k^T * decay^(t - s)) v, then norm and gate."""
    torch.manual_seed(0)
    config = example.RetentionConfig(heads=3, head_dim=4, slowest=9)
    mixer = config.build(8).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    still = (torch.ones(1, 20, 4, dtype=torch.float64), torch.zeros(1, 20, 4, dtype=torch.float64))  # no rotation
    q, k, v, gate = (p(x).unflatten(-1, (3, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    distance = torch.arange(20)[:, None] - torch.arange(20)
    decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-7, 1 - 2.0**-9], dtype=torch.float64)
    weights = (decay[:, None, None] ** distance).tril() * torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(4)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.nn.functional.silu(gate)
    expected = mixer.o_proj(o.flatten(2))
    torch.testing.assert_close(mixer(x, Sequence({4: still})), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("clean_registry")
def test_decorator_makes_a_name_known(example: ModuleType) -> None:
    register("decaying")(example.RetentionConfig)
    assert mixer_class("decaying") is example.RetentionConfig
    assert check_mixer(mixer_class("decaying")(heads=1, head_dim=4), width=8, tokens=20)
    with pytest.raises(ConfigError, match=r"decaying.head_dim = 3: expected an even number"):
        example.RetentionConfig(head_dim=3)
    with pytest.raises(ConfigError, match=r"mixer name 'swa' is taken by hybridvl\.layers\.swa"):
        register("swa")(example.RetentionConfig)
    with pytest.raises(ConfigError, match="mixer name 'my-mixer': expected letters"):
        register("my-mixer")


@pytest.mark.usefixtures("example")
def test_import_path_names_a_class() -> None:
    assert mixer_class("hybridvl_retention.RetentionConfig").__name__ == "RetentionConfig"
    with pytest.raises(ConfigError, match=r"'hybridvl_retention.Retention' is not a MixerConfig subclass"):
        mixer_class("hybridvl_retention.Retention")
    with pytest.raises(ConfigError, match=r"'hybridvl_retention.Retain' cannot be imported: .*no attribute 'Retain'"):
        mixer_class("hybridvl_retention.Retain")
    with pytest.raises(ConfigError, match=r"'no_such_package.Mixer' cannot be imported: No module named"):
        mixer_class("no_such_package.Mixer")
    for path in ("..full", ".Full", "a..B", "full."):
        with pytest.raises(ConfigError, match="expected a name or an import path"):
            mixer_class(path)


@pytest.mark.usefixtures("clean_registry")
def test_broken_entry_points_are_config_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("gone", "no_such_package:Config", registry.ENTRY_POINT_GROUP),
        EntryPoint("number", "math:pi", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(ConfigError, match=r"mixer gone \(entry point no_such_package:Config .*cannot be imported"):
        mixer_class("gone")
    with pytest.raises(ConfigError, match=r"math:pi .* is not a MixerConfig subclass"):
        mixer_class("number")
    with pytest.raises(ConfigError, match=r"unknown mixer 'nubmer', did you mean 'number'\? \(known: .*gone"):
        mixer_class("nubmer")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown mixer 'mamba', did you mean 'mamba2'\? \(known: full, gdn, mamba2, swa"
    ):
        mixer_class("mamba")


def test_a_file_in_the_folder_is_enough(tmp_path: Path) -> None:
    """Adding a mixer touches no other file: one more module beside the others registers itself."""
    package = tmp_path / "hybridvl"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(ROOT / "layers", package / "layers", ignore=shutil.ignore_patterns("__pycache__"))
    swa = (ROOT / "layers" / "swa.py").read_text()
    (package / "layers" / "narrow.py").write_text(
        swa.replace('"swa"', '"narrow"').replace("SlidingWindowConfig", "NarrowConfig").replace("8192", "64")
    )
    code = "from hybridvl.layers import MIXERS; print(sorted(MIXERS), MIXERS['narrow']().window)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['full', 'gdn', 'mamba2', 'narrow', 'swa'] 64"


def test_every_registered_config_has_its_name() -> None:
    for name, kind in MIXERS.items():
        assert issubclass(kind, MixerConfig)
        assert kind.name == name

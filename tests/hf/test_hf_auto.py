"""transformers finds our classes whichever package is imported first, and neither import costs more than it must."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from hf_cases import CASES, Wrapped
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import hybridvl
from hybridvl.hf import auto
from hybridvl.hf.configuration import HybridVLConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    hybridvl.save(CASES[2].net(), path)
    return path


def test_imported_before_transformers(folder: Path) -> None:
    # The auto classes are then imported by a module that the models' base classes belong to: nothing may go in circles.
    code = f"""
import sys, hybridvl
assert "transformers" not in sys.modules
import transformers.modeling_layers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
config = AutoConfig.from_pretrained({str(folder)!r})
assert type(config).__module__ == "hybridvl.hf.configuration", type(config)
assert "hybridvl.hf.modeling" not in sys.modules
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto_class.from_pretrained({str(folder)!r})
    assert type(model).__name__ == "HybridVLForConditionalGeneration"
    assert auto_class.from_config(config).config is config
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_stand_in_is_the_class() -> None:
    stand_in = AutoModelForCausalLM._model_mapping[HybridVLConfig]
    assert stand_in.__name__ == Wrapped.__name__
    assert stand_in.__module__ == Wrapped.__module__
    assert stand_in.can_generate()
    assert stand_in._from_config.__func__ is Wrapped._from_config.__func__
    assert isinstance(
        AutoModelForImageTextToText.from_config(HybridVLConfig(pattern="full", width=16, vocab_size=8)), Wrapped
    )
    with pytest.raises(AttributeError):
        _ = stand_in.__deepcopy__


def test_imported_after_transformers(folder: Path) -> None:
    finders = len(sys.meta_path)
    CONFIG_MAPPING._extra_content.pop("hybridvl")
    AutoModelForCausalLM._model_mapping._extra_content.pop(HybridVLConfig)
    with pytest.raises(ValueError, match="model type `hybridvl` but Transformers does not recognize"):
        AutoModelForCausalLM.from_pretrained(folder)
    importlib.reload(hybridvl)
    auto.install()
    assert len(sys.meta_path) == finders
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), Wrapped)

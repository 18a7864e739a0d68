"""LoRA on chosen mixers' projections (arXiv 2106.09685): peft adapts them, checkpoints hold what is trained alone."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridvl.checkpoints.files import text_writer, write_files
from hybridvl.checkpoints.tensor_writing import in_file_order, make_header, tensors_writer
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.freezing import select_parameters

PLACE = "model.lora"
ADAPTER_FOLDER = "adapter"
"""Where a run folder has the adapters alone, in peft's format."""

_KEY = "hybridvl_lora"  # where a checkpoint keeps the settings, and a digest of what is adapted
_NAME = "default"  # peft's name of an adapter that is given none


@dataclass(frozen=True)
class LoraSettings:
    """Which projections get adapters, and of what size.

    An adapted projection W x becomes W x + alpha / rank B A x, of which only A and B are trained; B begins at zero.

    Attributes:
        rank: rows of A, columns of B.
        alpha: the adapters' scale, times rank.
        dropout: share of the adapters' inputs that training sets to zero.
        targets: what is adapted, in the words of `model.freeze`: "mixers", "mixers:gdn", "layers:0-3", "mlps" or
            beginnings of parameters' names. Of what they name, linear maps get adapters, and nothing else.
        projections: only linear maps of these names, such as q_proj; null: all.
        rank_stabilized: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] = ("mixers",)
    projections: Sequence[str] | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        lists = {"targets": self.targets, "projections": self.projections}
        checks = {
            "rank": (self.rank >= 1, "at least 1"),
            "alpha": (0 < self.alpha < math.inf, "a finite number above 0"),
            "dropout": (0 <= self.dropout < 1, "a share from 0 to below 1"),
            **{
                name: (isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0, "a list of names")
                for name, names in lists.items()
                if name == "targets" or names is not None
            },
        }
        for name, (good, accepted) in checks.items():
            if not good:
                raise ConfigError(f"{PLACE}.{name}: {getattr(self, name)!r}; expected {accepted}")


class Adapters:
    """The adapters of a model that is trained: put into it when this is made.

    Parameters of the model that are trained already stay so, the adapters are trained too.

    Args:
        net: the model; its adapted projections become peft's.
        settings: what gets adapters.
        source: the folder that the model's weights are from.

    Raises:
        ConfigError: a target that means no parameter, targets without a linear map, or projections that none has.
    """

    def __init__(self, net: VisionLanguageModel, settings: LoraSettings, source: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.settings = settings
        self._net = net
        self._base = _digest(net)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft scales by any number
            lora_dropout=settings.dropout,
            target_modules=sorted(_linear_maps(net, settings)),
            use_rslora=settings.rank_stabilized,
            base_model_name_or_path=source,
        )
        inject_adapter_in_model(self._config, net)
        for parameter in trained:
            parameter.requires_grad_(True)

    def leave_out_frozen(self, module: nn.Module) -> None:
        """Let state_dict and load_state_dict of a module around the model know nothing of what is not trained."""
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}

        def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
            for name in frozen:
                state.pop(prefix + name, None)

        def forgive(module: nn.Module, keys: Any) -> None:
            keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

        module.register_state_dict_post_hook(drop)
        module.register_load_state_dict_post_hook(forgive)

    def merged(self) -> VisionLanguageModel:
        """The model with its adapters added to the projections; all other parameters are the model's own tensors."""
        adapted = dict(self._adapted())
        tensors: dict[str, Tensor] = {}
        with torch.device("meta"):
            plain = VisionLanguageModel(self._net.config)
        for name in plain.state_dict():
            owner, _, leaf = name.rpartition(".")
            layer = adapted.get(owner)
            if layer is None:
                tensors[name] = self._net.get_parameter(name).detach()
                continue
            tensors[name] = getattr(layer.get_base_layer(), leaf).detach()
            if leaf == "weight":
                tensors[name] = tensors[name] + layer.get_delta_weight(_NAME).detach().to(tensors[name])
        plain.load_state_dict(tensors, assign=True)
        return plain.train(self._net.training)

    def save(self, folder: Path) -> None:
        """Write the adapters alone, as peft's `PeftModel.from_pretrained(hybridvl.load(source), folder)` takes them."""
        tensors = {
            f"base_model.model.{owner}.{part}.weight": getattr(layer, part)[_NAME].weight
            for owner, layer in self._adapted()
            for part in ("lora_A", "lora_B")
        }
        ordered = in_file_order(tensors)
        config = {**self._config.to_dict(), "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"  # peft keeps names in sets
        dtypes = [tensor.dtype for tensor in ordered.values()]
        weights = tensors_writer(make_header(ordered, {"format": "pt"}), ordered.values(), dtypes)
        write_files(folder, {"adapter_model.safetensors": weights, "adapter_config.json": text_writer(text)})

    def record(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint which adapters it holds, and of which weights."""
        checkpoint[_KEY] = {"settings": _values(self.settings), "base": self._base}

    def check(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ConfigError unless a checkpoint holds adapters of these settings, and of the same weights."""
        if _KEY not in checkpoint:
            raise ConfigError(f"ckpt_path: a checkpoint without adapters; expected one of a fit with {PLACE}")
        saved, own = checkpoint[_KEY]["settings"], _values(self.settings)
        for name, value in own.items():
            if saved.get(name) != value:
                raise ConfigError(f"{PLACE}.{name}: {value!r}; the checkpoint has adapters with {saved.get(name)!r}")
        if checkpoint[_KEY]["base"] != self._base:
            raise ConfigError("ckpt_path: adapters of other weights than those of model.source; expected its model")

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return ((name, layer) for name, layer in self._net.named_modules() if isinstance(layer, LoraLayer))


def adapter_settings(checkpoint: Mapping[str, Any]) -> LoraSettings | None:
    """Those of the adapters that a checkpoint holds; None if it holds none."""
    return LoraSettings(**checkpoint[_KEY]["settings"]) if _KEY in checkpoint else None


def refuse_adapters(checkpoint: Mapping[str, Any]) -> None:
    """Raise ConfigError if a checkpoint holds adapters."""
    if _KEY in checkpoint:
        settings = checkpoint[_KEY]["settings"]
        raise ConfigError(f"{PLACE}: null; the checkpoint has adapters of rank {settings['rank']}: expected {settings}")


def _linear_maps(net: VisionLanguageModel, settings: LoraSettings) -> set[str]:
    """Names of the modules that get adapters."""
    place = f"{PLACE}.targets"
    named = set().union(*(select_parameters(net, name, place=place) for name in settings.targets))
    linear = {
        name for name, module in net.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in named
    }
    if not linear:
        raise ConfigError(f"{place}: {list(settings.targets)}: no linear map among what they name; expected some")
    if any(net.get_submodule(name) is net.lm_head for name in linear):
        raise ConfigError(
            f"{place}: {list(settings.targets)}: the head takes no adapters, as losses use its weight and not the "
            "module; expected it in model.train_only"
        )
    known = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(settings.projections or ()) - known)
    if unknown:
        raise ConfigError(f"{PLACE}.projections: {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    wanted = known if settings.projections is None else set(settings.projections)
    return {name for name in linear if name.rpartition(".")[2] in wanted}


def _values(settings: LoraSettings) -> dict[str, Any]:
    """The settings as plain values, which a checkpoint can hold."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


def _digest(net: VisionLanguageModel) -> int | None:
    """A number that another model's frozen weights hardly share; None where there are no weights."""
    digest = 0
    for name, parameter in net.named_parameters():
        if parameter.is_meta:
            return None
        if not parameter.requires_grad:
            numbers = parameter.detach().float().cpu().contiguous()
            digest = zlib.crc32(numbers.numpy().data, zlib.crc32(name.encode(), digest))
    return digest

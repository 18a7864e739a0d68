"""safetensors files written tensor by tensor, so that a model is never in memory twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hybridvl.checkpoints.tensor_files import DTYPES
from hybridvl.layers import ConfigError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# The safetensors library's order of dtypes, widest alignment first; within a dtype it goes by name.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


def make_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """The first bytes of a safetensors file: its length, then JSON of what lies where, in the order of `tensors`."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the order that the safetensors library gives them."""
    return dict(sorted(tensors.items(), key=lambda item: (_ORDER.index(_CODES[item[1].dtype]), item[0])))


def tensors_writer(header: bytes, tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> Callable[[Path], None]:
    """A function for `write_files` that writes a header and the tensors after it, each cast to its dtype."""
    pairs = list(zip(tensors, dtypes, strict=True))

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            stream.write(header)
            for tensor, dtype in pairs:
                plain = tensor.detach().to(device="cpu", dtype=dtype).contiguous().flatten()
                if len(plain):
                    stream.write(plain.view(torch.uint8).numpy().data)

    return write


def split_shards(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, dict[str, Tensor]]:
    """File name to tensors: files are filled in order up to a number of bytes, as transformers does."""
    limit, shards, used = _parse_size(max_shard_size), [dict[str, Tensor]()], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def make_index(shards: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The text of model.safetensors.index.json."""
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _parse_size(size: int | str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMGT]i?B)", size, re.IGNORECASE) if isinstance(size, str) else None
    number = int(found[1]) * _UNITS[found[2].upper()] if found else size
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"max_shard_size: {size!r}; expected a number of bytes of at least 1, or text like '5GB'")
    return number

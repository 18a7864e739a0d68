"""Cases of whole mixers, projections included, with the same weights on both sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridvl.bench.cases import Case, Request
from hybridvl.bench.plain import modeling, plain_functions
from hybridvl.bench.qwen3_next import delta_net_weights
from hybridvl.bench.recurrence_cases import OURS, compulsory_bytes
from hybridvl.bench.sides import TOLERANCES, Results, Side, Work
from hybridvl.layers.base import Mixer, MixerConfig, Sequence
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.gdn import GatedDeltaNetConfig
from hybridvl.layers.mamba2 import Mamba2Config


def _mamba2(request: Request) -> Work:
    width, dim, state_dim, groups = (request.sizes[letter] for letter in "DPNG")
    config = Mamba2Config(head_dim=dim, state_dim=state_dim, groups=groups, backend=request.backend)
    ours = _built(config, request)
    theirs: dict[str, nn.Module] = {}
    if MAMBA2.chosen_peers(request):
        module = modeling("mamba2")
        options = module.Mamba2Config(
            **{"hidden_size": width, "head_dim": dim, "num_heads": config.heads(width), "state_size": state_dim},
            **{"n_groups": groups, "num_hidden_layers": 1, "layer_norm_epsilon": config.norm_eps},
        )
        peer = module.Mamba2Mixer(options, layer_idx=0)
        peer.load_state_dict(ours.state_dict())
        theirs["transformers"] = peer.to(request.device, request.dtype)
    return _work(MAMBA2.name, request, config, ours, theirs, "mamba2")


def _gdn(request: Request) -> Work:
    width, heads, keys, values = (request.sizes[letter] for letter in "DHKV")
    if values % keys:
        raise ConfigError(f"--shape: K{keys} V{values}: expected V to be a multiple of K")
    config = GatedDeltaNetConfig(
        heads=heads, head_dim=keys, expand_v=values / keys, norm_eps=1e-6, backend=request.backend
    )
    ours = _built(config, request)
    theirs: dict[str, nn.Module] = {}
    if GDN.chosen_peers(request):
        module = modeling("qwen3_next")
        options = module.Qwen3NextConfig(
            **{"hidden_size": width, "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            **{"linear_num_key_heads": heads, "linear_num_value_heads": heads, "rms_norm_eps": 1e-6},
            **{"linear_key_head_dim": keys, "linear_value_head_dim": values, "num_experts": 0},
        )
        peer = module.Qwen3NextGatedDeltaNet(options, layer_idx=0)
        peer.load_state_dict(delta_net_weights(ours.state_dict(), heads))
        theirs["transformers"] = peer.to(request.device, request.dtype)
    return _work(GDN.name, request, config, ours, theirs, "qwen3_next")


def _built(config: MixerConfig, request: Request) -> Mixer:
    torch.manual_seed(0)
    return config.build(request.sizes["D"]).to(request.device, request.dtype)


def _work(
    name: str, request: Request, config: MixerConfig, ours: Mixer, theirs: dict[str, nn.Module], model_type: str
) -> Work:
    batch, tokens, width = (request.sizes[letter] for letter in "BTD")
    x = torch.randn(batch, tokens, width, device=request.device).to(request.dtype).requires_grad_(request.backward)
    cotangent = torch.randn(batch, tokens, width, device=request.device).to(request.dtype)
    runs: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {OURS: (ours, lambda x: ours(x, Sequence()))}
    runs |= {side: (peer, _on_plain(peer, model_type, request.device)) for side, peer in theirs.items()}
    sides: list[Side] = []
    for side, (module, call) in runs.items():
        same_as = OURS if sides else None
        sides.append(_side(side, module, call, x, cotangent if request.backward else None, same_as))
    nbytes = compulsory_bytes({"x": x} | dict(ours.named_parameters()), x.nbytes, request.backward)
    return Work(
        name=name,
        sizes=request.sizes,
        dtype=request.dtype_name,
        direction=request.direction,
        device=request.device,
        sides=tuple(sides),
        flops=float(batch * config.flops(width, tokens)) * (3 if request.backward else 1),
        nbytes=nbytes,
        tokens=batch * tokens,
        tolerance=TOLERANCES[request.dtype_name],
    )


def _on_plain(peer: nn.Module, model_type: str, device: str) -> Callable[[Tensor], Tensor]:
    module = modeling(model_type)

    def call(x: Tensor) -> Tensor:
        with plain_functions(module, device):
            y: Tensor = peer(x)
        return y

    return call


def _side(
    name: str,
    module: nn.Module,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    cotangent: Tensor | None,
    same_as: str | None,
) -> Side:
    """Forward, or forward with the gradients of x and of every parameter, of which that of x is compared."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def run() -> Results:
        if cotangent is None:
            with torch.no_grad():
                return {"y": call(x)}
        y = call(x)
        gradients = torch.autograd.grad(y, [x, *parameters], cotangent)
        kept = {f"parameter {i}": gradient for i, gradient in enumerate(gradients[1:])}
        return {"y": y.detach(), "gradient of x": gradients[0], **kept}

    def check() -> Results:
        return {key: value for key, value in run().items() if not key.startswith("parameter")}

    return Side(name, run, check, same_as)


MAMBA2 = Case(
    name="mamba2-mixer",
    about="a whole Mamba2 layer, against transformers' Mamba2Mixer",
    sizes={"B": 1, "T": 2048, "D": 1024, "P": 64, "N": 128, "G": 1},
    build=_mamba2,
    peers={"cpu": ("transformers",), "cuda": ("transformers",)},
)
GDN = Case(
    name="gdn-mixer",
    about="a whole Gated DeltaNet layer, against Qwen3-Next's",
    sizes={"B": 1, "T": 2048, "D": 1024, "H": 8, "K": 128, "V": 128},
    build=_gdn,
    peers={"cpu": ("transformers",), "cuda": ("transformers",)},
)
CASES = (MAMBA2, GDN)

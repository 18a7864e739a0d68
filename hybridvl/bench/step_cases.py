"""Cases of one decode step over the states of many layers: what a token costs between the projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridvl.bench.cases import Case, Request
from hybridvl.bench.plain import modeling, plain_function
from hybridvl.bench.recurrence_cases import OURS
from hybridvl.bench.sides import TOLERANCES, Results, Side, Work
from hybridvl.layers.ops.delta_step import delta_rule_step, delta_rule_step_reference
from hybridvl.layers.ops.gated_delta_rule import L2_EPS
from hybridvl.layers.ops.gdn_step import gated_delta_net_step
from hybridvl.layers.ops.mamba2_step import mamba2_step

Step = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""(inputs and weights of a layer, its states, updated in place) -> output."""

_EPS = 1e-6


def _rule_step(backend: str) -> Step:
    rule = delta_rule_step_reference if backend == "reference" else delta_rule_step

    def step(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        pair = torch.stack((given["k"], given["q"]), dim=3).squeeze(1)  # (B, H, 2, K)
        pair = pair.to(state["recurrent"].dtype)
        pair = pair * (pair.square().sum(-1, keepdim=True) + L2_EPS).rsqrt_()
        pair[:, :, 1].mul_(pair.shape[-1] ** -0.5)
        v, g, beta = (given[name].squeeze(1) for name in ("v", "g", "beta"))
        return rule(pair, v.to(pair.dtype), g, beta, state["recurrent"]).unsqueeze(1).to(v.dtype)

    return step


def _transformers_rule_step(request: Request) -> Step:
    rule = plain_function(modeling("qwen3_next"), "torch_recurrent_gated_delta_rule")

    def step(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        o, final = rule(
            *(given[name] for name in ("q", "k", "v")),
            g=given["g"],
            beta=given["beta"],
            initial_state=state["recurrent"],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state["recurrent"].copy_(final)  # as its cache does
        return o

    return step


def _delta_rule_step(request: Request) -> Work:
    batch, heads, keys, values, layers = (request.sizes[letter] for letter in "BHKVL")
    draw = _source(request)
    given = [
        {
            **{"q": draw(batch, 1, heads, keys), "k": draw(batch, 1, heads, keys), "v": draw(batch, 1, heads, values)},
            **{"g": -draw(batch, 1, heads).float().abs(), "beta": draw(batch, 1, heads).float().sigmoid()},
        }
        for _ in range(layers)
    ]
    states = [{"recurrent": draw(batch, heads, keys, values).float()} for _ in range(layers)]
    steps = {OURS: _rule_step(request.backend)}
    if DELTA_RULE_STEP.chosen_peers(request):
        steps["transformers"] = _transformers_rule_step(request)
    return _work(DELTA_RULE_STEP.name, request, given, states, steps, 6.0 * batch * heads * keys * values * layers)


def _gdn_step(request: Request) -> Work:
    batch, heads, keys, values, width, layers = (request.sizes[letter] for letter in "BHKVWL")
    draw = _source(request)
    rows = {"q": heads * keys, "k": heads * keys, "v": heads * values}

    def layer() -> dict[str, Tensor]:
        return {
            "mixed": draw(batch, sum(rows.values())),
            "gate": draw(batch, heads * values),
            **{name: draw(batch, heads) for name in "ab"},
            "weight": draw(sum(rows.values()), width),
            **{name: draw(heads).float() for name in ("A_log", "dt_bias")},
            "norm_weight": draw(values).float(),
        }

    def state() -> dict[str, Tensor]:
        convs = {f"conv_{name}": draw(batch, count, width) for name, count in rows.items()}
        return {"recurrent": draw(batch, heads, keys, values).float(), **convs}

    sizes = list(rows.values())

    def ours(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        q, k, v = given["mixed"].split(sizes, dim=-1)
        q_weight, k_weight, v_weight = given["weight"].split(sizes)
        return gated_delta_net_step(
            *(q, k, v, given["gate"], given["a"], given["b"]),
            *(state["recurrent"], state["conv_q"], state["conv_k"], state["conv_v"], q_weight, k_weight, v_weight),
            *(given["A_log"], given["dt_bias"], given["norm_weight"]),
            norm_eps=_EPS,
            backend=request.backend,
        )

    steps: dict[str, Step] = {OURS: ours}
    if GDN_STEP.chosen_peers(request):
        steps["transformers"] = _transformers_gdn_step(request, sizes)
    flops = 6.0 * batch * heads * keys * values * layers
    given, states = [layer() for _ in range(layers)], [state() for _ in range(layers)]
    return _work(GDN_STEP.name, request, given, states, steps, flops)


def _transformers_gdn_step(request: Request, sizes: list[int]) -> Step:
    """What Qwen3-Next's layer does between its projections; its one convolution state is ours side by side."""
    heads, keys, values = (request.sizes[letter] for letter in "HKV")
    module = modeling("qwen3_next")
    update = plain_function(module, "causal_conv1d_update")
    rule = _transformers_rule_step(request)
    norm = module.Qwen3NextRMSNormGated(values, eps=_EPS).to(request.device, request.dtype)

    def step(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        if "conv" not in state:  # at the first step alone
            state["conv"] = torch.cat([state.pop(f"conv_{name}") for name in "qkv"], dim=1)
        mixed = update(given["mixed"].unsqueeze(-1), state["conv"], given["weight"], None, "silu").transpose(1, 2)
        q, k, v = mixed.split(sizes, dim=-1)
        decay = -given["A_log"].exp() * torch.nn.functional.softplus(given["a"].float() + given["dt_bias"])
        inputs = {
            **{"q": q.unflatten(-1, (heads, keys)), "k": k.unflatten(-1, (heads, keys))},
            **{"v": v.unflatten(-1, (heads, values)), "g": decay.unsqueeze(1), "beta": given["b"].sigmoid()[:, None]},
        }
        o = rule(inputs, state)
        norm.weight.data = given["norm_weight"].to(request.dtype)
        return norm(o.reshape(-1, values), given["gate"].reshape(-1, values)).reshape(given["gate"].shape)

    return step


def _mamba2_step(request: Request) -> Work:
    batch, heads, dim, state_dim, groups, width, layers = (request.sizes[letter] for letter in "BHPNGWL")
    draw = _source(request)
    inner, channels = heads * dim, heads * dim + 2 * groups * state_dim

    def layer() -> dict[str, Tensor]:
        return {
            **{"z": draw(batch, inner), "channels": draw(batch, channels), "dt": draw(batch, heads)},
            **{"weight": draw(channels, width), "bias": draw(channels)},
            **{name: draw(heads).float() for name in ("A_log", "dt_bias", "D")},
            "norm_weight": draw(inner).float(),
        }

    def ours(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        return mamba2_step(
            **{name: given[name] for name in ("z", "channels", "dt", "A_log", "dt_bias", "D", "norm_weight")},
            **state,
            **{"conv_weight": given["weight"], "conv_bias": given["bias"]},
            norm_eps=_EPS,
            groups=groups,
            backend=request.backend,
        )

    steps: dict[str, Step] = {OURS: ours}
    if MAMBA2_STEP.chosen_peers(request):
        steps["transformers"] = _transformers_mamba2_step(request, inner)
    given = [layer() for _ in range(layers)]
    states = [
        {"recurrent": draw(batch, heads, dim, state_dim).float(), "conv": draw(batch, channels, width)}
        for _ in range(layers)
    ]
    return _work(MAMBA2_STEP.name, request, given, states, steps, 4.0 * batch * inner * state_dim * layers)


def _transformers_mamba2_step(request: Request, inner: int) -> Step:
    batch, heads, dim, state_dim, groups = (request.sizes[letter] for letter in "BHPNG")
    module = modeling("mamba2")
    update, scan = (plain_function(module, f"{name}_update") for name in ("causal_conv1d", "mamba2_selective_state"))
    norm = module.MambaRMSNormGated(inner, inner // groups, eps=_EPS).to(request.device)

    def step(given: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        mixed = update(given["channels"].unsqueeze(-1), state["conv"], given["weight"], given["bias"], "silu")
        x, b, c = mixed.squeeze(-1).split((inner, groups * state_dim, groups * state_dim), dim=-1)
        rate = -given["A_log"].exp()[:, None, None].expand(-1, dim, state_dim)
        y = scan(
            *(state["recurrent"], x.view(batch, heads, dim), given["dt"][..., None].expand(-1, -1, dim), rate),
            *(b.view(batch, groups, state_dim), c.view(batch, groups, state_dim), given["D"][:, None].expand(-1, dim)),
            dt_bias=given["dt_bias"][:, None].expand(-1, dim),
            dt_softplus=True,
        )
        norm.weight.data = given["norm_weight"]
        return norm(y.reshape(batch, inner), given["z"]).to(given["z"].dtype)

    return step


def _source(request: Request) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(request.device, request.dtype)

    return draw


def _work(
    name: str,
    request: Request,
    given: list[dict[str, Tensor]],
    states: list[dict[str, Tensor]],
    steps: dict[str, Step],
    flops: float,
) -> Work:
    """Every side has states of its own, which go on from round to round; they are compared after their first step."""
    sides: list[Side] = []
    for side, step in steps.items():
        own = [{key: value.clone() for key, value in state.items()} for state in states]
        same_as = OURS if sides else None
        sides.append(Side(side, _all_layers(step, given, own), _first_step(step, given, states), same_as))
    state_bytes = sum(value.nbytes for state in states for value in state.values())
    read = sum(value.nbytes for layer in given for value in layer.values())
    return Work(
        name=name,
        sizes=request.sizes,
        dtype=request.dtype_name,
        direction="decode step",
        device=request.device,
        sides=tuple(sides),
        flops=flops,
        nbytes=2 * state_bytes + read,
        tokens=request.sizes["B"],
        tolerance=TOLERANCES[request.dtype_name],
    )


def _all_layers(step: Step, given: list[dict[str, Tensor]], states: list[dict[str, Tensor]]) -> Callable[[], Results]:
    @torch.no_grad()
    def run() -> Results:
        return {f"y{i}": step(*layer) for i, layer in enumerate(zip(given, states, strict=True))}

    return run


def _first_step(step: Step, given: list[dict[str, Tensor]], states: list[dict[str, Tensor]]) -> Callable[[], Results]:
    """The outputs and recurrent states of the first step, from copies of the states."""

    @torch.no_grad()
    def run() -> Results:
        copies = [{key: value.clone() for key, value in state.items()} for state in states]
        outputs = [step(*layer) for layer in zip(given, copies, strict=True)]
        recurrent = torch.stack([state["recurrent"] for state in copies])
        return {"y": torch.stack(outputs), "recurrent": recurrent}

    return run


_TRANSFORMERS = {"cpu": ("transformers",), "cuda": ("transformers",)}
_HEADS = {"B": 1, "H": 16, "K": 128, "V": 256}

DELTA_RULE_STEP = Case(
    name="delta-rule-step",
    about="the gated delta rule of one token over the states of L layers, against transformers' recurrent step",
    sizes={**_HEADS, "L": 24},
    build=_delta_rule_step,
    peers=_TRANSFORMERS,
    length="",
    differentiable=False,
)
GDN_STEP = Case(
    name="gdn-step",
    about="all of a Gated DeltaNet layer between its projections, one token, L layers, against Qwen3-Next's",
    sizes={**_HEADS, "W": 4, "L": 24},
    build=_gdn_step,
    peers=_TRANSFORMERS,
    length="",
    differentiable=False,
)
MAMBA2_STEP = Case(
    name="mamba2-step",
    about="all of a Mamba2 layer between its projections, one token, L layers, against transformers'",
    sizes={"B": 1, "H": 32, "P": 64, "N": 128, "G": 1, "W": 4, "L": 24},
    build=_mamba2_step,
    peers=_TRANSFORMERS,
    length="",
    differentiable=False,
)
CASES = (DELTA_RULE_STEP, GDN_STEP, MAMBA2_STEP)

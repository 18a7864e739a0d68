"""Products of one bfloat16 row: the same numbers, the setting put back, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridvl.layers.ops.one_row import one_row_products


def _enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_is_right(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(130, 70, bias=bias).bfloat16(), torch.randn(1, 1, 130).bfloat16()
    with torch.no_grad(), one_row_products(x):
        y = layer(x)
    expected = layer.double()(x.double())
    assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize(
    ("x", "inside"),
    [
        (torch.zeros(1, 1, 4, dtype=torch.bfloat16), False),
        (torch.zeros(2, 1, 4, dtype=torch.bfloat16), True),
        (torch.zeros(1, 4), True),
    ],
    ids=["one bfloat16 row", "two rows", "float32"],
)
def test_onednn_is_left_out_for_one_bfloat16_row_alone(x: torch.Tensor, inside: bool) -> None:
    assert _enabled()
    with one_row_products(x):
        assert _enabled() == inside
    assert _enabled()
    with pytest.raises(RuntimeError), one_row_products(x):
        raise RuntimeError
    assert _enabled()

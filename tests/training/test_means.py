"""Means over batches of unequal sizes, and over processes that have seen different ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridvl.training.processes import sums
from hybridvl.training.processes.sums import Means

BATCH = st.tuples(st.floats(-9, 9, width=32), st.integers(0, 50), st.integers(0, 3))


@given(st.lists(BATCH, max_size=5), st.lists(BATCH, max_size=5))
def test_means_are_over_everything_that_was_counted(here: list[tuple], there: list[tuple]) -> None:
    own, other = Means(("tokens", "answers")), Means(("tokens", "answers"))
    for means, batches in ((own, here), (other, there)):
        for value, tokens, answers in batches:
            means.add(torch.tensor([value, 2 * value]), (tokens, answers))
    with pytest.MonkeyPatch.context() as patch:
        theirs: list[torch.Tensor] = []
        patch.setattr(sums, "summed", lambda values: theirs.append(values) or values)
        other.over_all_processes(torch.device("cpu"))
        patch.setattr(sums, "summed", lambda values: values + theirs[0])
        found = own.over_all_processes(torch.device("cpu"))
    every = [*here, *there]
    for name, position, factor in (("tokens", 1, 1), ("answers", 2, 2)):
        total = sum(batch[position] for batch in every)
        assert (name in found) == (total > 0)
        if total:
            expected = sum(factor * batch[0] * batch[position] for batch in every) / total
            assert float(found[name]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_pass_begins_with_nothing() -> None:
    means = Means(("loss",))
    means.add(torch.tensor([3.0]), (2,))
    assert float(means.over_all_processes(torch.device("cpu"))["loss"]) == 3.0
    means.clear()
    assert means.over_all_processes(torch.device("cpu")) == {}

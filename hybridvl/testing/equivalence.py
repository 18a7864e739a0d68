"""Properties of a mixer's outputs and gradients: causal, and the same however the tokens are handed over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridvl.testing.subject import Comparison, Property, Subject


@torch.no_grad()
def _output(subject: Subject) -> Iterator[Comparison]:
    """Shape and dtype are the input's; a call without a state leaves no trace in the module."""
    y = subject.run(subject.x)
    yield f"shape and dtype of the output ({tuple(y.shape)}, {y.dtype})", _signature(y), _signature(subject.x)
    subject.run(subject.noise(*subject.x.shape))
    yield "output of a repeated call", subject.run(subject.x), y


@torch.no_grad()
def _causality(subject: Subject) -> Iterator[Comparison]:
    """No output depends on a later token."""
    y = subject.run(subject.x)
    for cut in sorted({1, 5, subject.tokens // 2, subject.tokens - 1}):
        changed = subject.x.clone()
        changed[:, cut:] = subject.noise(*changed[:, cut:].shape)
        yield f"outputs before token {cut} when later ones change", subject.run(changed)[:, :cut], y[:, :cut]


@torch.no_grad()
def _rows(subject: Subject) -> Iterator[Comparison]:
    """Rows of a batch do not mix, without and with a state."""
    y = subject.run(subject.x)
    together = subject.mixer.init_state(subject.batch)
    continued = subject.run_chunks(subject.x, subject.sizes, together)
    for row in range(subject.batch):
        one = slice(row, row + 1)
        yield f"row {row} alone", subject.run(subject.x[one]), y[one]
        alone = subject.run_chunks(subject.x[one], subject.sizes, subject.mixer.init_state(1))
        yield f"row {row} alone, in chunks", alone, continued[one]


@torch.no_grad()
def _chunks(subject: Subject) -> Iterator[Comparison]:
    """Any split into chunks with the state carried gives the outputs of one pass."""
    y = subject.run(subject.x)
    for sizes in (subject.sizes, subject.even_sizes, [subject.tokens]):
        found = subject.run_chunks(subject.x, sizes, subject.mixer.init_state(subject.batch))
        yield f"outputs in chunks of {sizes}", found, y


@torch.no_grad()
def _steps(subject: Subject) -> Iterator[Comparison]:
    """Token by token gives the outputs of one pass."""
    found = subject.run_chunks(subject.x, [1] * subject.tokens, subject.mixer.init_state(subject.batch))
    yield "outputs token by token", found, subject.run(subject.x)


def _chunk_gradients(subject: Subject) -> Iterator[Comparison]:
    """Where autograd records, a state carries gradients: chunks and steps give those of one pass."""
    weight = subject.noise(*subject.x.shape)
    expected = subject.gradients(subject.run, subject.x, weight)
    for what, sizes in (("in chunks", subject.sizes), ("token by token", [1] * subject.tokens)):

        def chunked(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            return subject.run_chunks(x, sizes, subject.mixer.init_state(subject.batch))

        yield from subject.compare_gradients(what, subject.gradients(chunked, subject.x, weight), expected)


@torch.no_grad()
def _packing(subject: Subject) -> Iterator[Comparison]:
    """Segments packed into one row do not see one another; with a state, neither do its rows."""
    x = subject.x[:1]
    parts = x.split(subject.sizes, dim=1)
    alone = torch.cat([subject.run(part) for part in parts], dim=1)
    yield f"packed segments of {subject.sizes}", subject.run_packed(x, subject.sizes), alone
    state = subject.mixer.init_state(len(subject.sizes))
    yield f"packed segments of {subject.sizes} with a state", subject.run_packed(x, subject.sizes, state), alone
    later = [3] * len(subject.sizes)
    more = subject.noise(1, sum(later), subject.width)
    whole = [torch.cat(pair, dim=1) for pair in zip(parts, more.split(later, dim=1), strict=True)]
    expected = torch.cat([subject.run(segment)[:, -3:] for segment in whole], dim=1)
    found = subject.run_packed(more, later, state, past=subject.sizes)
    yield "segments continued in a second packed row", found, expected


def _packing_gradients(subject: Subject) -> Iterator[Comparison]:
    """A packed row has the gradients of its segments."""
    x = subject.x[:1]
    weight = subject.noise(*x.shape)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([subject.run(part) for part in x.split(subject.sizes, dim=1)], dim=1)

    found = subject.gradients(lambda x: subject.run_packed(x, subject.sizes), x, weight)
    yield from subject.compare_gradients("packed", found, subject.gradients(alone, x, weight))


def _left_padding(subject: Subject) -> Iterator[Comparison]:
    """Padding on the left changes nothing, whatever it holds."""
    yield from _padding(subject, "left")


def _right_padding(subject: Subject) -> Iterator[Comparison]:
    """Padding on the right changes nothing, whatever it holds."""
    yield from _padding(subject, "right")


def _scattered_padding(subject: Subject) -> Iterator[Comparison]:
    """Padding between tokens changes nothing, whatever it holds."""
    yield from _padding(subject, "scattered")


def _padding_gradients(subject: Subject) -> Iterator[Comparison]:
    """Padded rows have the gradients of the rows alone, and none reaches the padding."""
    for side in ("left", "right", "scattered"):
        x, mask = subject.padded(side)
        weight = subject.noise(*x.shape)[mask]

        def padded(x: Tensor, mask: Tensor = mask) -> Tensor:
            return subject.run_padded(x, mask)[mask]

        def alone(x: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.cat([subject.run(x[row : row + 1, mask[row]])[0] for row in range(subject.batch)])

        found, expected = (subject.gradients(forward, x, weight) for forward in (padded, alone))
        yield from subject.compare_gradients(f"{side} padding", found, expected)


@torch.no_grad()
def _padding(subject: Subject, side: str) -> Iterator[Comparison]:
    x, mask = subject.padded(side)
    y = subject.run_padded(x, mask)
    state = subject.mixer.init_state(subject.batch)
    half = subject.tokens // 2
    first = subject.run_padded(x[:, :half], mask[:, :half], state)
    second = subject.run_padded(x[:, half:], mask[:, half:], state, mask[:, :half].sum(1))
    chunked = torch.cat((first, second), dim=1)
    zeros = torch.zeros(1, dtype=torch.float64)
    for what, found in (("", y), (", in two chunks with a state", chunked)):
        strange = (~torch.isfinite(found)).sum().double().reshape(1)
        yield f"numbers that are not finite with {side} padding{what}", strange, zeros
        for row in range(subject.batch):
            expected = subject.run(x[row : row + 1, mask[row]])[0]
            yield f"row {row} with {side} padding{what}", found[row, mask[row]], expected


def _signature(x: Tensor) -> Tensor:
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    return torch.tensor([*x.shape, kinds.index(x.dtype)], dtype=torch.float64)


EQUIVALENCE: dict[str, Property] = {
    "output": _output,
    "causality": _causality,
    "rows": _rows,
    "chunks": _chunks,
    "steps": _steps,
    "chunk gradients": _chunk_gradients,
    "packing": _packing,
    "packing gradients": _packing_gradients,
    "left padding": _left_padding,
    "right padding": _right_padding,
    "scattered padding": _scattered_padding,
    "padding gradients": _padding_gradients,
}
"""Name of each property -> the comparisons that show it."""

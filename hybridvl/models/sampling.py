"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and the draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor

from hybridvl.layers import ConfigError
from hybridvl.layers.norms import at_least_float32
from hybridvl.layers.validate import fits, spell

LEAST_TEMPERATURE = 1e-6
MOST_PENALTY = 1e6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn. From
            LEAST_TEMPERATURE up, for the quotients must be numbers that float32 holds.
        top_k: draw among this many most likely tokens; 0 draws among all.
        top_p: draw among the most likely tokens that together reach this probability; 1 draws among all.
        repetition_penalty: logits of tokens that the row's prompt or answer already holds are divided by it where
            positive and multiplied where negative (arXiv 1909.05858, section 4.1); 1 leaves them alone. At most
            MOST_PENALTY, at least 1 / MOST_PENALTY. Applies to greedy choices too.
        seed: seed of the draws, from -2**63 to 2**64 - 1; None draws from torch's global generator.
        stop_ids: tokens that end a row.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            self._expect(name, fits(getattr(self, name), hint), spell(hint))
        least, most = LEAST_TEMPERATURE, MOST_PENALTY
        greedy = self.temperature == 0
        self._expect("temperature", greedy or least <= self.temperature < math.inf, f"0 (greedy) or at least {least:g}")
        self._expect("top_k", self.top_k >= 0, "0 (all tokens) or a number of tokens")
        self._expect("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1")
        fair = 1 / most <= self.repetition_penalty <= most
        self._expect("repetition_penalty", fair, f"a number from {1 / most:g} to {most:g} (1 is none)")
        self._expect("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a whole number of 64 bits or null")
        self._expect("stop_ids", all(-(2**63) <= token < 2**63 for token in self.stop_ids), "token ids")

    def _expect(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ConfigError(f"{name}: {getattr(self, name)!r}; expected {accepted}")


class Sampler:
    """Chooses the tokens of B rows, step by step, and remembers what the rows hold.

    Args:
        sampling: how to choose.
        seen: (B, vocab) bool, the tokens of every row's prompt; needed with a repetition penalty, changed in place.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, seen: Tensor | None, device: torch.device) -> None:
        self.sampling = sampling
        self._seen = seen
        self._generator = None
        if sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)
        elif device.type == "cuda":
            # The device's own generator cannot be drawn from while another thread records a graph.
            self._generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))

    def scores(self, logits: Tensor) -> Tensor:
        """What the choice is made from: logits (B, vocab) after penalty, temperature, top-k and top-p; -inf where a
        token cannot be chosen."""
        sampling = self.sampling
        exact = logits.to(at_least_float32(logits.dtype))
        if self._seen is not None and sampling.repetition_penalty != 1:
            logits = exact = penalize(exact, self._seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return logits
        scores = exact / sampling.temperature
        if 0 < sampling.top_k < scores.shape[-1]:
            scores = keep_top_k(scores, sampling.top_k)
        return keep_top_p(scores, sampling.top_p) if sampling.top_p < 1 else scores

    def choose(self, scores: Tensor) -> Tensor:
        """(B,) int64 tokens for the scores (B, vocab)."""
        if self.sampling.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator).squeeze(-1)

    def remember(self, tokens: Tensor) -> None:
        """Count tokens (B,) among those that the rows hold."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, vocab) with those of `seen` (B, vocab) tokens divided by the penalty, or multiplied where negative."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Scores (B, vocab) with all but the `count` largest, and those equal to the last of them, at -inf."""
    least = scores.topk(count).values[..., -1:]
    return scores.masked_fill(scores < least, -math.inf)


def keep_top_p(scores: Tensor, share: float) -> Tensor:
    """Scores (B, vocab) with all but the most likely tokens that together reach the probability `share` at -inf."""
    ordered, order = scores.sort(dim=-1)
    # Summed from the least likely upwards: the small probabilities of a long tail are not lost beside the large ones.
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - share
    dropped[..., -1] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def seen_tokens(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """(B, vocab) bool: the tokens that every row of input_ids (B, T) holds, those at padding left out."""
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.ne(0).long()
    counts = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.int64, device=input_ids.device)
    return counts.scatter_add(1, input_ids.long(), real.long()) > 0

"""Fair budgets: whole numbers of the recipe solved for, so that every cell costs what its baseline costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from hybridvl.ablation.cells import Cell, baseline_of, with_override
from hybridvl.ablation.keys import check_net_keys
from hybridvl.ablation.recipes import Elsewhere, merged_recipe, recipe_context, recipe_dtype, recipe_model
from hybridvl.ablation.study import Match, Study
from hybridvl.layers.errors import ConfigError, within
from hybridvl.models.config import MAX_SIZE, ModelConfig
from hybridvl.pipeline.mappings import read_mapping
from hybridvl.plan.costs import plan_model

DEFAULT_CONTEXT = 2048
"""Tokens at which FLOPs and bytes are counted where neither the study nor the recipe says it: the data module's own."""

Recipes = Sequence[Mapping[str, Any]]

_UNITS = {"params": "parameters", "flops": "FLOPs per token", "state_bytes": "bytes of state"}


@dataclass(frozen=True)
class Costs:
    """What the model of a cell costs, without adapters.

    Attributes:
        params: all parameters, the vision tower's too.
        flops: mean forward FLOPs per token of the decoder and its head, in one pass over `context` tokens.
        state_bytes: of the state of one row after `context` tokens.
        context: tokens.
        dtype: of the model, which its state has too, recurrent parts aside.
    """

    params: int
    flops: float
    state_bytes: int
    context: int
    dtype: str


@dataclass(frozen=True)
class Matched:
    """A cell whose budgets are matched.

    Attributes:
        cell: with what was solved for among its overrides.
        costs: of its model; None where they cannot be known, see `unknown`.
        unknown: why not; "" where they are known.
        solved: what was solved for, by path.
        residuals: by budget, the share by which it differs from the baseline's: 0.002 is 0.2 % more.
    """

    cell: Cell
    costs: Costs | None
    unknown: str
    solved: dict[str, int]
    residuals: dict[str, float]


def match_cells(study: Study, found: Sequence[Cell]) -> list[Matched]:
    """The cells of a study with matched budgets, in their order, and what they cost.

    Raises:
        ConfigError: a budget cannot be matched, naming both numbers and the nearest that can be reached; or a mistake
            in the model of a cell.
    """
    check_net_keys(study)
    recipes = [read_mapping(path) for path in study.recipes]
    with within(str(study.path)):
        if not study.matches:
            return [_unmatched(cell, recipes) for cell in found]
        _refuse_matched_axes(study)
        return [_matched(study, found, cell, recipes) for cell in found]


def cell_costs(recipes: Recipes, overrides: Mapping[str, Any], context: int | None = None) -> Costs:
    """What the model of a recipe costs.

    Args:
        recipes: of which the later wins.
        overrides: values by path.
        context: tokens at which FLOPs and bytes are counted; None: the recipe's data.max_tokens.
    """
    recipe = merged_recipe(recipes, overrides)
    context = context or recipe_context(recipe) or DEFAULT_CONTEXT
    net = json.dumps(recipe_model(recipes, overrides).to_dict())
    return _net_costs(net, context, recipe_dtype(recipe))


@lru_cache(maxsize=10_000)  # cells that differ in their data alone have the same model
def _net_costs(net: str, context: int, dtype: torch.dtype) -> Costs:
    plan = plan_model(ModelConfig.from_dict(json.loads(net)), [context], dtype, "model.net.mixers")
    return Costs(plan.total_params, plan.prefill_flops(context), plan.state_bytes(context), context, plan.dtype)


def _unmatched(cell: Cell, recipes: Recipes) -> Matched:
    try:
        return Matched(cell, cell_costs(recipes, cell.overrides), "", {}, {})
    except Elsewhere as error:
        return Matched(cell, None, str(error), {}, {})
    except ConfigError as error:
        raise ConfigError(f"cell {cell.name}: {error}") from error


def _matched(study: Study, found: Sequence[Cell], cell: Cell, recipes: Recipes) -> Matched:
    baseline = baseline_of(study, found, cell)
    if baseline is None:
        raise ConfigError(
            f"match: cell {cell.name} has nothing to be matched with: the cell of the baseline's labels and its other "
            "ones is excluded; expected to exclude both, or neither"
        )
    solved: dict[str, int] = {}
    with within(f"cell {cell.name}"):
        for match in study.matches:
            problem = _problem(match, recipes, cell, baseline)
            if cell != baseline and problem.residual(cell) != 0:
                path, value = problem.solve()
                solved[path] = value
                cell = with_override(cell, path, value)
        residuals: dict[str, float] = {}
        for match in study.matches:  # a later one may have changed what an earlier one had made equal
            residual = _problem(match, recipes, cell, baseline).residual(cell)
            if abs(residual) > match.tolerance:
                raise ConfigError(
                    f"match: {match.budget} was matched, and changed by {100 * residual:+.2f} % when another budget "
                    "was; expected the budgets in another order, or numbers that change one of them"
                )
            residuals[match.budget] = residual
        contexts = (match.context for match in study.matches if match.context is not None)
        costs = cell_costs(recipes, cell.overrides, next(contexts, None))
    return Matched(cell, costs, "", solved, residuals)


def _problem(match: Match, recipes: Recipes, cell: Cell, baseline: Cell) -> _Problem:
    # Where cells differ in their data, both models are counted on the data of the cell: longer samples are no reason to
    # make a model smaller.
    context = match.context or recipe_context(merged_recipe(recipes, cell.overrides)) or DEFAULT_CONTEXT
    wanted = cell_costs(recipes, baseline.overrides, context)
    return _Problem(match, recipes, cell, baseline, context, float(getattr(wanted, match.budget)))


@dataclass(frozen=True)
class _Problem:
    """One budget of one cell that is to be made equal to the baseline's."""

    match: Match
    recipes: Recipes
    cell: Cell
    baseline: Cell
    context: int
    target: float

    def residual(self, cell: Cell) -> float:
        """Share by which a cell's budget differs."""
        return self._budget(cell) / self.target - 1

    def solve(self) -> tuple[str, int]:
        """The first path with which the cell comes close enough, and the value there."""
        reached: list[str] = []
        for path in self.match.by:
            value = self._nearest(path)
            if value is None:
                reached.append(f"{path} does not change it")
                continue
            cell = with_override(self.cell, path, value)
            residual = self.residual(cell)
            if abs(residual) <= self.match.tolerance:
                return path, value
            reached.append(f"the nearest is {self._budget(cell):,.0f} ({100 * residual:+.2f} %) with {path} {value}")
        raise ConfigError(
            f"match: {self._budget(self.cell):,.0f} {_UNITS[self.match.budget]} against {self.target:,.0f} of "
            f"{self.baseline.name}; {'; '.join(reached)}; expected a match.by that comes within "
            f"{100 * self.match.tolerance:g} %, or a larger match.tolerance"
        )

    def _nearest(self, path: str) -> int | None:
        """The value of a path whose budget, which grows with it, is nearest; None if the budget stays the same."""
        step = self.match.multiple_of
        budget = cache(lambda number: self._at(path, number * step))
        low, high = 0, 2
        while budget(high) < self.target:
            if 2 * high * step > MAX_SIZE:
                break
            low, high = high, 2 * high
        if budget(high) == budget(1):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if budget(middle) < self.target else (low, middle)
        return step * min((number for number in (low, high) if number), key=lambda n: abs(budget(n) - self.target))

    def _at(self, path: str, value: int) -> float:
        try:
            return self._budget(with_override(self.cell, path, value))
        except ConfigError as error:
            raise ConfigError(f"match.by: with {path} {value}: {error}; match.multiple_of skips values") from error

    def _budget(self, cell: Cell) -> float:
        costs = cell_costs(self.recipes, cell.overrides, self.context)
        return float(getattr(costs, self.match.budget))


def _refuse_matched_axes(study: Study) -> None:
    """A number that is solved for cannot be what the cells to be matched differ in."""
    for axis in study.axes:
        for match in study.matches:
            both = axis.keys.intersection(match.by)
            if both and axis.name in study.baseline:
                raise ConfigError(
                    f"match.by: {both.pop()} is what axis {axis.name!r} varies; expected another number, or a baseline "
                    f"without {axis.name!r}"
                )

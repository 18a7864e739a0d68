"""The file that says what a study is: a recipe, the axes along which it varies, seeds, budgets and a baseline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hybridvl.ablation.axes import OWN, SAYS, Axis, is_excluded, label_of, read_axes, require_references
from hybridvl.ablation.claims import read_claims, require_cells
from hybridvl.ablation.search.space import SEARCH_KEYS, Search, read_search, telling_labels
from hybridvl.layers.errors import ConfigError, within
from hybridvl.pipeline.mappings import (
    read_mapping,
    recipe_paths,
    require_known,
    require_mapping,
    require_path,
    yaml_value,
)
from hybridvl.pipeline.references import change_shared, filled, shared_values

Budget = Literal["params", "flops", "state_bytes"]
DEFAULT_BY = "model.net.mlp_width"

_KEYS = (
    *("name", "root", "recipe", "values", "overrides", "axes"),
    *("seeds", "exclude", "baseline", "match", "metrics", "tune", "claims", "search"),
)
_MATCH_KEYS = ("budget", "by", "context", "tolerance", "multiple_of")
_MOST_SEEDS = 2**32  # of numpy
_NO_MATCH = "none"


@dataclass(frozen=True)
class Match:
    """One budget that is made equal to the baseline's.

    Attributes:
        budget: parameters, FLOPs per token, or bytes of state.
        by: paths of whole numbers; the first with which a cell comes close enough is solved for.
        context: tokens at which FLOPs and bytes are counted; None: the recipe's data.max_tokens.
        tolerance: share of the baseline's budget by which a cell may differ.
        multiple_of: what the number must be a multiple of.
    """

    budget: Budget
    by: tuple[str, ...] = (DEFAULT_BY,)
    context: int | None = None
    tolerance: float = 0.005
    multiple_of: int = 1


@dataclass(frozen=True)
class Study:
    """Runs of one recipe along axes; they lie in `folder`/CELL/seed_N.

    Attributes:
        path: the file.
        name: of the study, and of its folder.
        root: folder of all studies.
        recipes: files given to `hybridvl fit` with --config; of several the later wins.
        overrides: of every run, by path; `${axes.NAME}` still stands in them.
        axes: what varies.
        seeds: of every cell.
        exclude: labels by axis; a cell that has all labels of an entry is left out.
        baseline: labels by axis. A cell is compared with that cell which has these, and its own on the other axes.
        matches: which budgets of the two are made equal, one after the other.
        metrics: tags of what is compared.
        tune: axes that are chosen for each cell by itself, each with the tag of the metric that decides.
        claims: what the report gives its verdict on, see `hybridvl.ablation.claims`; as the file states them.
        search: how cells are chosen; None: all combinations of labels are cells.
    """

    path: Path
    name: str
    root: Path
    recipes: tuple[Path, ...]
    overrides: Mapping[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    exclude: tuple[Mapping[str, str], ...]
    baseline: Mapping[str, str]
    matches: tuple[Match, ...]
    metrics: tuple[str, ...]
    tune: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[Mapping[str, Any], ...] = ()
    search: Search | None = None

    @property
    def folder(self) -> Path:
        """Where the runs of all cells lie."""
        return self.root / self.name

    def combinations(self) -> list[dict[str, str]]:
        """The labels of every cell by axis, in the order of the file: the last axis varies fastest.

        Of a search, whose cells are not known before it is done, a few that have every label and end of a range: one
        with the baseline's, and others that differ from it in one axis.
        """
        labels = {axis.name: list(axis.values) for axis in self.axes}
        if self.search is not None:
            return telling_labels(labels, self.exclude, self.baseline)
        return combinations(labels, self.exclude)


def combinations(labels: Mapping[str, Sequence[str]], exclude: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """One label of each axis in every way, the last axis fastest, but for those that have all labels of an entry."""
    grid = [dict(zip(labels, chosen, strict=True)) for chosen in itertools.product(*labels.values())]
    return [cell for cell in grid if not is_excluded(cell, exclude)]


def read_study(path: Path, changes: Mapping[str, str] | None = None) -> Study:
    """The study that a YAML file describes.

    Args:
        path: the file; recipes are looked up beside it.
        changes: YAML text by path in the file, in place of what the file says: name, root, values.NAME,
            overrides.PATH, axes.NAME.key, axes.NAME.values, axes.NAME.range, match.KEY, search.KEY; and recipe, seeds,
            exclude, baseline, match, metrics and search as a whole.

    Raises:
        ConfigError: naming the file, the place in it, what stands there and what is accepted.
    """
    content = read_mapping(path)
    with within(str(path)):
        for key, text in (changes or {}).items():
            if not change_shared(content, key, text):
                _change(content, key, yaml_value(key, text))
        require_known("", content, _KEYS)
        shared = shared_values(content)
        recipes = recipe_paths("recipe", filled(content.get("recipe"), shared), path.parent, "study")
        overrides = _overrides(content.get("overrides"), shared)
        axes = read_axes(content.get("axes"), shared, [overrides])
        for key, value in overrides.items():
            require_references(f"overrides.{key}", value, shared, [axis.name for axis in axes])
        exclude = _exclude(filled(content.get("exclude"), shared), axes)
        search = read_search(filled(content.get("search"), shared), axes, exclude)
        metrics = _metrics(filled(content.get("metrics"), shared))
        study = Study(
            path=path,
            name=shared["name"],
            root=Path(shared["root"]),
            recipes=recipes,
            overrides=overrides,
            axes=axes,
            seeds=_seeds(filled(content.get("seeds", [0]), shared)),
            exclude=exclude,
            baseline=_baseline(filled(content.get("baseline"), shared), axes, search),
            matches=_matches(filled(content.get("match"), shared)),
            metrics=metrics if search is None else tuple(dict.fromkeys((search.metric, *metrics))),
            tune=_tune(filled(content.get("tune"), shared), axes),
            claims=_claims(filled(content.get("claims"), shared)),
            search=search,
        )
        if search is None:
            _check_cells(study)
        else:
            _check_search(study)
    return study


def _overrides(given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    written = require_mapping("overrides", {} if given is None else given, "paths to values")
    for key, value in written.items():
        require_path(f"overrides.{key}", key, value, OWN, SAYS)
    return {key: filled(value, shared) for key, value in written.items()}


def _seeds(given: Any) -> tuple[int, ...]:
    accepted = "expected a list of whole numbers from 0 on, such as [0, 1, 2]"
    if not isinstance(given, list) or not given:
        raise ConfigError(f"seeds: {given!r}; {accepted}")
    for seed in given:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MOST_SEEDS:
            raise ConfigError(f"seeds: {seed!r}; {accepted}")
        if given.count(seed) > 1:
            raise ConfigError(f"seeds: {seed} is given {given.count(seed)} times; expected each once")
    return tuple(given)


def _exclude(given: Any, axes: Sequence[Axis]) -> tuple[dict[str, str], ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise ConfigError(f"exclude: {given!r}; expected a list of mappings of axes to labels")
    excluded = tuple(_labels(f"exclude[{number}]", entry, axes) for number, entry in enumerate(given))
    for number, entry in enumerate(excluded):
        ranged = next((axis.name for axis in axes if axis.range is not None and axis.name in entry), None)
        if ranged is not None:
            raise ConfigError(f"exclude[{number}].{ranged}: the axis has a range; expected labels of axes with values")
    return excluded


def _baseline(given: Any, axes: Sequence[Axis], search: Search | None) -> dict[str, str]:
    if given is None and search is not None:
        return {}
    if given is None:
        return {axis.name: next(iter(axis.values)) for axis in axes}
    return _labels("baseline", given, axes)


def _labels(place: str, given: Any, axes: Sequence[Axis]) -> dict[str, str]:
    """Labels by axis, each one that its axis has."""
    content = require_mapping(place, given, "axes to labels")
    if not content:
        raise ConfigError(f"{place}: {{}}; expected the label of at least one axis")
    by_name = {axis.name: axis for axis in axes}
    require_known(f"{place}.", content, list(by_name))
    found = {name: label_of(label) for name, label in content.items()}
    for name, label in found.items():
        numbers = by_name[name].range
        if numbers is None:
            _require_label(f"{place}.{name}", label, by_name[name].values)
            continue
        with within(f"{place}.{name}"):
            found[name] = label_of(numbers.value(label))
    return found


def _require_label(place: str, label: str, known: Iterable[str]) -> None:
    """Raise ConfigError for a label that an axis does not have."""
    if label not in known:
        raise ConfigError(f"{place}: {label!r} is no label of the axis; its labels are {', '.join(map(repr, known))}")


def _matches(given: Any) -> tuple[Match, ...]:
    several = given if isinstance(given, list) else [given]
    found: list[Match] = []
    for number, entry in enumerate(several):
        match = _match(f"match[{number}]" if isinstance(given, list) else "match", entry)
        if match is not None and match.budget in [other.budget for other in found]:
            raise ConfigError(f"match[{number}].budget: {match.budget!r} is matched already; expected each budget once")
        found += [] if match is None else [match]
    return tuple(found)


def _match(place: str, given: Any) -> Match | None:
    content = {"budget": given} if isinstance(given, str) else given
    content = require_mapping(place, {} if content is None else content, ", ".join(_MATCH_KEYS))
    require_known(f"{place}.", content, _MATCH_KEYS)
    budget = content.get("budget", _NO_MATCH)
    if budget not in (*get_args(Budget), _NO_MATCH):
        raise ConfigError(f"{place}.budget: {budget!r}; expected one of {', '.join((*get_args(Budget), _NO_MATCH))}")
    by = content.get("by")
    if by is None and budget == "state_bytes":
        raise ConfigError(
            f"{place}.by: missing; a state does not depend on the MLPs: expected the path of a whole number that it "
            "depends on, such as model.net.mixers.swa.window"
        )
    paths = [DEFAULT_BY] if by is None else by if isinstance(by, list) else [by]
    for path in paths:
        require_path(f"{place}.by: {path!r}", path, path, OWN, SAYS)
    for key in ("context", "multiple_of"):
        value = content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{place}.{key}: {value!r}; expected a whole number of at least 1")
    tolerance = content.get("tolerance", Match.tolerance)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ConfigError(f"{place}.tolerance: {tolerance!r}; expected a share between 0 and 1, such as 0.005")
    if budget == _NO_MATCH:
        return None
    return Match(budget, tuple(paths), content.get("context"), float(tolerance), content.get("multiple_of") or 1)


def _metrics(given: Any) -> tuple[str, ...]:
    given = [] if given is None else given
    if not isinstance(given, list) or not all(isinstance(tag, str) and tag for tag in given):
        raise ConfigError(f"metrics: {given!r}; expected a list of tags, such as [test/exact]")
    return tuple(dict.fromkeys(given))


def _tune(given: Any, axes: Sequence[Axis]) -> dict[str, str]:
    found = require_mapping("tune", {} if given is None else given, "axes to tags of metrics")
    require_known("tune.", found, [axis.name for axis in axes])
    for name, tag in found.items():
        if not isinstance(tag, str) or not tag or tag.startswith("test/"):
            raise ConfigError(f"tune.{name}: {tag!r}; expected the tag of a metric of the validation, such as val/loss")
    return found


def _claims(given: Any) -> tuple[Mapping[str, Any], ...]:
    return () if given is None else tuple(given if read_claims(given) else ())


def _check_cells(study: Study) -> None:
    left = study.combinations()
    if not left:
        raise ConfigError(f"exclude: leaves no cell of {_count(study.axes)}; expected at least one")
    if not any(study.baseline.items() <= labels.items() for labels in left):
        shown = ", ".join(f"{name}: {label}" for name, label in study.baseline.items())
        raise ConfigError(f"baseline: {{{shown}}} is excluded; expected labels of a cell that is not")
    if study.claims:
        require_cells(read_claims(list(study.claims)), left, study.tune)


def _check_search(study: Study) -> None:
    """Raise ConfigError for what has no meaning where cells are chosen one after another."""
    if not study.combinations():
        raise ConfigError("baseline: is excluded, or all is; expected labels of a cell that is not")
    if study.matches and not study.baseline:
        raise ConfigError("match: a search has no first cell to match with; expected `baseline` to say with which one")
    if study.claims:
        raise ConfigError("claims: nobody knows which cells a search will have; expected none, or no search")


def _count(axes: Sequence[Axis]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return count


def _change(content: dict[str, Any], key: str, value: Any) -> None:
    """Put a value in the place of what the file says."""
    section, _, rest = key.partition(".")
    if rest and section == "overrides":
        content[section] = {**(content.get(section) or {}), rest: value}
    elif rest and section == "search":
        require_known("search.", [rest], SEARCH_KEYS)
        content[section] = {**require_mapping("search", content.get(section) or {}, "keys to values"), rest: value}
    elif rest and section == "match":
        require_known("match.", [rest], _MATCH_KEYS)
        given = content.get(section) or {}
        given = {"budget": given} if isinstance(given, str) else given
        content[section] = {
            **require_mapping("match", given, "keys to values, as one of several is changed"),
            rest: value,
        }
    elif rest and section == "axes":
        name, _, leaf = rest.partition(".")
        axes = require_mapping("axes", content.get("axes") or {}, "names to {key, values}")
        require_known("axes.", [name], [str(axis) for axis in axes])
        require_known(f"axes.{name}.", [leaf], ("key", "values", "range"))
        axis = require_mapping(f"axes.{name}", axes[name], "key and values")
        if leaf != "key":  # an axis has the one or the other
            axis.pop("range", None)
            axis.pop("values", None)
        axis[leaf] = value
    elif not rest and section in ("recipe", "seeds", "exclude", "baseline", "match", "metrics", "search"):
        content[section] = value
    else:
        raise ConfigError(
            f"{key}: expected name, root, recipe, values.NAME, overrides.PATH, axes.NAME.values, axes.NAME.range, "
            "axes.NAME.key, match, match.KEY, search, search.KEY, seeds, exclude, baseline or metrics"
        )

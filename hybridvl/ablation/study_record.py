"""study.yaml in a study's folder: what its runs have in common, so that another study does not mix with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hybridvl.ablation.axes import Axis
from hybridvl.ablation.recipes import merged_recipe
from hybridvl.ablation.records import one_at_a_time
from hybridvl.ablation.study import Study, combinations
from hybridvl.checkpoints.files import read_text, text_writer, write_files
from hybridvl.layers.errors import ConfigError
from hybridvl.pipeline.mappings import read_mapping
from hybridvl.pipeline.references import flat

RECORD = "study.yaml"

_SHOWN = 3  # differences that a message names
_NOTHING = "not set"


def record_study(study: Study, extend: bool = False) -> Path:
    """Write what a study is into its folder; returns the file.

    Keys of the file: name, root, recipe, overrides, axes (key, and values by label or range), seeds, exclude, baseline,
    match, metrics, tune, claims, search if there is one, and base, which is what the recipes come to.

    Args:
        study: the study.
        extend: whether cells and seeds, or trials, may be added to those of the study that the folder holds.

    Raises:
        ConfigError: the folder holds another study. What its runs have in common cannot be changed even with `extend`,
            and no run be left out. Names, folders, metrics, what is tuned and claims are not compared.
    """
    path = study.folder / RECORD
    text = yaml.safe_dump(_content(study), sort_keys=False, allow_unicode=True, width=120)
    with one_at_a_time(study.folder):
        compare_study(study, extend)
        if not path.exists() or read_text(path) != text:
            write_files(study.folder, {RECORD: text_writer(text)})
    return path


def compare_study(study: Study, extend: bool = False) -> None:
    """Raise ConfigError if the study's folder holds another one, as `record_study` does; nothing is written."""
    path = study.folder / RECORD
    if path.exists():
        _compare(path, read_mapping(path), study, _content(study), extend)


def _content(study: Study) -> dict[str, Any]:
    return {
        "name": study.name,
        "root": str(study.root),
        "recipe": [str(path) for path in study.recipes],
        "overrides": dict(study.overrides),
        "axes": {axis.name: _described(axis) for axis in study.axes},
        "seeds": list(study.seeds),
        "exclude": [dict(entry) for entry in study.exclude],
        "baseline": dict(study.baseline),
        "match": [{**dataclasses.asdict(match), "by": list(match.by)} for match in study.matches],
        "metrics": list(study.metrics),
        "tune": dict(study.tune),
        "claims": [dict(claim) for claim in study.claims],
        **({} if study.search is None else {"search": dataclasses.asdict(study.search)}),
        "base": merged_recipe([read_mapping(recipe) for recipe in study.recipes], {}),
    }


def _compare(path: Path, there: Mapping[str, Any], study: Study, here: Mapping[str, Any], extend: bool) -> None:
    changed = list(_changes(there, here))
    if not extend:
        changed += _added(there, here)
    if not changed:
        return
    shown = "; ".join(changed[:_SHOWN]) + ("" if len(changed) <= _SHOWN else f"; and {len(changed) - _SHOWN} more")
    what = "values of axes and seeds" if study.search is None else "trials and seeds"
    if extend:
        accepted = f"--extend adds {what} and changes nothing else; --name gives it a folder of its own"
    else:
        accepted = f"expected the same, or --extend to add {what}, or --name for a folder of its own"
    raise ConfigError(f"{path}: made with another study than {study.path} is now: {shown}; {accepted}")


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What runs have in common and is another now, and runs that are left out."""
    before, now = _axes(there), _axes(here)
    if list(before) != list(now):
        yield f"axes: {', '.join(before) or 'none'}; now {', '.join(now) or 'none'}"
        return
    for key in ("overrides", "base"):
        old, new = flat(key, _mapping(there.get(key))), flat(key, here[key])
        for path in {**old, **new}:
            if _differs(path, old, new):
                yield _said(path, old.get(path, _NOTHING), new.get(path, _NOTHING))
    for name, axis in before.items():
        for key in ("key", "range"):
            if axis.get(key) != now[name].get(key):
                yield _said(f"axes.{name}.{key}", axis.get(key), now[name].get(key))
        for label, value in _mapping(axis.get("values")).items():
            if _mapping(now[name].get("values")).get(label, value) != value:
                yield _said(f"axes.{name}.values.{label}", value, now[name]["values"][label])
    for key in ("baseline", "match"):
        if there.get(key) != here[key]:
            yield _said(key, there.get(key), here[key])
    yield from _search_changes(there, here)
    left_out = [str(seed) for seed in there.get("seeds") or [] if seed not in here["seeds"]]
    if left_out:
        yield f"seeds: without {', '.join(left_out)} now"
    if here.get("search") is not None:
        return  # its cells are chosen later
    cells = _cells(here)
    yield from (f"axes: without the cell {cell} now" for cell in _cells(there) if cell not in cells)


def _added(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    seeds = [str(seed) for seed in here["seeds"] if seed not in (there.get("seeds") or [])]
    if seeds:
        yield f"seeds: {', '.join(seeds)} added"
    if here.get("search") is not None:
        before, now = (_mapping(content.get("search")).get("trials") for content in (there, here))
        if before != now:
            yield _said("search.trials", before, now)
        return
    cells = _cells(there)
    added = [cell for cell in _cells(here) if cell not in cells]
    if added:
        yield f"axes: {len(added)} cells added, such as {added[0]}"


def _search_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What is another search now; more trials are none, but fewer are, and what is drawn from."""
    old, new = there.get("search"), here.get("search")
    if not isinstance(old, Mapping) or new is None:
        if old != new:
            yield _said("search", old, new)
        return
    for key in new:
        more = key == "trials" and isinstance(old.get(key), int) and new[key] >= old[key]
        if old.get(key) != new[key] and not more:
            yield _said(f"search.{key}", old.get(key), new[key])
    if there.get("exclude") != here["exclude"]:
        yield _said("exclude", there.get("exclude"), here["exclude"])
    for name, axis in _axes(there).items():
        before, now = (list(_mapping(values)) for values in (axis.get("values"), here["axes"][name].get("values")))
        if before != now:
            yield f"axes.{name}.values: {', '.join(before)}; now {', '.join(now)}"


def _described(axis: Axis) -> dict[str, Any]:
    if axis.range is not None:
        return {"key": axis.key, "range": axis.range.described}
    return {"key": axis.key, "values": dict(axis.values)}


def _cells(content: Mapping[str, Any]) -> list[dict[str, str]]:
    labels = {name: list(_mapping(axis.get("values"))) for name, axis in _axes(content).items()}
    return combinations(labels, content.get("exclude") or [])


def _axes(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _mapping(axis) for name, axis in _mapping(content.get("axes")).items()}


def _differs(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a value is another, and no mapping, of which the values are looked at themselves."""
    if isinstance(old.get(path), Mapping) and isinstance(new.get(path), Mapping):
        return False
    return path not in old or path not in new or old[path] != new[path]


def _said(path: str, old: Any, new: Any) -> str:
    return f"{path}: {_shown(old)}, now {_shown(new)}"


def _shown(value: Any) -> str:
    return value if value is _NOTHING else repr(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

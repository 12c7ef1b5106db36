"""Grids: one YAML file that stands for many runs.

    models: [vit_digits, deit_digits]
    criteria: [l1, taylor]
    scopes: [isomorphic]
    ratios: [0.5, 0.75]                # or macs: [0.5, 0.25], what may remain
    datasets: [digits-dg]              # names, folders, or {data: …, unseen: …, split: {…}}
    unseen: [thick, sketch]
    seeds: [0]
    exclude:                           # what the product leaves out: runs that match all that an entry says
      - {models: deit_digits, unseen: sketch}
    include:                           # products to be added; axes left out are as above
      - {models: vit_digits, seeds: [1, 2]}
    finetune: {recipe: default, epochs: 10}

`without: [sketch, photo]` adds to each run the folds of cross-validation that leave out one of these source domains as
well (see `DataConfig`). All other keys hold for every run (`OPTIONS`). Each model, data set, unseen domain and seed
also gets its dense baseline; without `criteria` there are only those.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from secateur.allocation.allocate import Scope
from secateur.criteria import find_criterion
from secateur.data import DATASETS, DataConfig
from secateur.data.hub import PREFIX
from secateur.errors import InputError, unknown_name
from secateur.experiments.base_models import BASE_MODELS, check_shipped
from secateur.experiments.config import PruneConfig, RunConfig
from secateur.experiments.models import check_name
from secateur.experiments.reading import build, convert
from secateur.training import FinetuneConfig

AXES = ("models", "criteria", "scopes", "ratios", "macs", "datasets", "unseen", "without", "seeds")
_PRUNE_OPTIONS = ("attention", "keep", "min_channels", "round_to", "compensate", "calibration")
_RUN_OPTIONS = ("weights", "probe_epochs", "latency_batch")
OPTIONS = ("finetune", "split", "family_ratios", *_PRUNE_OPTIONS, *_RUN_OPTIONS)
KEYS = (*AXES, "exclude", "include", *OPTIONS)
PROBE_EPOCHS = 2
"""Epochs in which a new head is trained alone, unless the grid says otherwise."""
_WITH_UNSEEN = ("leave_one_out", "domainbed")
"""Splits that cannot be made without naming a domain to leave out."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set of a grid: its name or folder, and what holds for it alone: unseen domains, fields of its split."""

    data: str
    unseen: str | tuple[str, ...] | None = None
    split: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The runs that a file stands for, each dense baseline before what is compared with it."""

    source: str
    runs: tuple[RunConfig, ...]


Point = dict[str, Any]
"""One value of each axis; None where an axis does not apply."""


def shipped_grids() -> dict[str, Traversable]:
    """Returns the grids that come with the package, by name."""
    folder = files("secateur.experiments") / "grids"
    return {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}


def load_grid(name: str | Path) -> Grid:
    """Returns the grid in a YAML file or of a shipped name, or the single run in the `config.json` of a run's folder.

    Raises:
        InputError: No such file or name; an unknown key; a value that no run could use; nothing to run. The message
            names the file and the key.
        DataError: The configuration of a run is of another version.
    """
    path, shipped = Path(name), shipped_grids()
    if not path.is_file() and str(name) not in shipped:
        raise unknown_name("grid (and no such file)", str(name), shipped)
    try:
        text = path.read_text("utf-8") if path.is_file() else shipped[str(name)].read_text("utf-8")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "format" in content:
        run = RunConfig.from_json(content, str(name))
        return Grid(str(name), (run.dense, run) if run.has_teacher else (run,))
    return Grid(str(name), expand(content, str(name)))


def expand(content: Any, source: str) -> tuple[RunConfig, ...]:
    """Returns the runs that the content of a grid stands for, no two alike; errors are those of `load_grid`."""
    if not isinstance(content, Mapping):
        raise InputError(f"{source}: expected the axes of a grid ({', '.join(AXES)}), found {content!r}")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{source}: {unknown_name('axis or option', str(key), KEYS)}")
    axes = _axes(content, source)
    common = axes | {k: [None] for k in AXES if k not in axes} | ({} if "seeds" in axes else {"seeds": [0]})
    _check_whole(axes, source)
    options = _Options.read(content, source)
    kind = str(options.split.get("split", DataConfig().split))
    points = _product(common, kind, source)
    points = [p for p in points if not _matches(p, _exclusions(content, points, source))]
    for i, entry in enumerate(_entries(content, "include", source)):
        own = _axes(entry, f"{source}: include[{i}]")
        amounts = {"macs": [None]} if "ratios" in own else {"ratios": [None]} if "macs" in own else {}
        points += _product(common | amounts | own, kind, f"{source}: include[{i}]")
    runs: dict[str, RunConfig] = {}
    for run in map(options.run, points):
        for each in (run.dense, run) if run.prune else (run.dense,):
            runs.setdefault(each.hash, each)
    if not runs:
        raise InputError(f"{source} expands to no run: exclude leaves nothing of the product of its axes")
    return tuple(runs.values())


# --- axes -------------------------------------------------------------------------------------------------------


def _axes(content: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    """Returns the values of each axis that is given."""
    axes = {axis: _values(content[axis], axis, source) for axis in AXES if axis in content}
    if "ratios" in axes and "macs" in axes:
        raise InputError(f"{source}: ratios and macs are both given; one of them says how much goes")
    if "without" in axes:
        axes["without"].insert(0, None)
    return axes


def _check_whole(axes: Mapping[str, list[Any]], source: str) -> None:
    """Raises InputError if an axis is missing without which there are no runs, or another has no meaning."""
    for axis in ("models", "datasets"):
        if axis not in axes:
            raise InputError(f"{source}: {axis} must be given")
    amount = "ratios" in axes or "macs" in axes
    if "criteria" in axes and not amount:
        raise InputError(f"{source}: criteria are given, but neither ratios nor macs")
    if "criteria" not in axes and (lonely := [a for a in ("ratios", "macs", "scopes") if a in axes]):
        raise InputError(f"{source}: {lonely[0]} is given, but no criteria")


def _values(value: Any, axis: str, source: str) -> list[Any]:
    """Returns the values of one axis, checked one by one; a single value stands for a list of one."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"{source}: {axis} is empty, so the grid expands to no run")
    found: list[Any] = []
    for i, each in enumerate(values):
        where = f"{source}: {axis}[{i}]"
        found.append(convert(_KINDS[axis], each, where))
        if found[i] in found[:i]:
            raise InputError(f"{where}: {each!r} is given twice")
        try:
            _CHECKS.get(axis, lambda value: None)(found[i])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return found


def _check_data(value: str | Dataset) -> None:
    name = value if isinstance(value, str) else value.data
    if name not in DATASETS and not name.startswith(PREFIX) and os.sep not in name and not Path(name).is_dir():
        raise unknown_name("data set (and no folder)", name, DATASETS)


_KINDS: Mapping[str, Any] = {
    "models": str,
    "criteria": str,
    "scopes": Scope,
    "ratios": float,
    "macs": int | float,
    "datasets": str | Dataset,
    "unseen": str,
    "without": str,
    "seeds": int,
}
_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "models": check_name,
    "criteria": find_criterion,
    "ratios": lambda ratio: PruneConfig(criterion="l1", ratio=ratio),
    "macs": lambda macs: PruneConfig(criterion="l1", macs=macs),
    "datasets": _check_data,
    "seeds": lambda seed: RunConfig(model="", data="", seed=seed),
}


def _product(axes: Mapping[str, list[Any]], split: str, source: str) -> list[Point]:
    """Returns every combination of the axes, those together that start from the same weights.

    A data set that names unseen domains of its own, or is split without any, does not take the common ones; `split` is
    the kind of split of those that say none.
    """
    order: tuple[str, ...] = (
        "models",
        "datasets",
        "unseen",
        "without",
        "seeds",
        "criteria",
        "scopes",
        "ratios",
        "macs",
    )
    points: list[Point] = []
    for given in axes["datasets"]:
        dataset = Dataset(data=given) if isinstance(given, str) else given
        own = (dataset.unseen,) if isinstance(dataset.unseen, str) else dataset.unseen
        needed = dataset.split.get("split", split) in _WITH_UNSEEN
        unseen = own or (axes["unseen"] if needed else (None,))
        if None in unseen and needed:
            raise InputError(f"{source}: unseen must be given: the domain of {dataset.data} that is never trained on")
        values: dict[str, Sequence[Any]] = {**axes, "datasets": [dataset], "unseen": unseen}
        for chosen in itertools.product(*(values[axis] for axis in order)):
            point: Point = dict(zip(order, chosen, strict=True))
            if point["without"] is None or point["without"] != point["unseen"]:
                points.append(point)
    # Models outermost, whatever the number of data sets.
    return sorted(points, key=lambda point: axes["models"].index(point["models"]))


def _entries(content: Mapping[str, Any], key: str, source: str) -> list[Mapping[str, Any]]:
    """Returns the entries of `exclude` or `include`, whose keys must be axes."""
    entries = content.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and e for e in entries):
        raise InputError(f"{source}: {key} must be a list of entries such as {{models: vit_digits, seeds: [1, 2]}}")
    for i, entry in enumerate(entries):
        for axis in entry:
            if axis not in AXES:
                raise InputError(f"{source}: {key}[{i}]: {unknown_name('axis', str(axis), AXES)}")
    return entries


def _exclusions(content: Mapping[str, Any], points: Sequence[Point], source: str) -> list[dict[str, list[Any]]]:
    """Returns for each entry of `exclude` the values it is about, all of which must occur in the grid."""
    exclusions = []
    for i, entry in enumerate(_entries(content, "exclude", source)):
        where = f"{source}: exclude[{i}]"
        about = {axis: [_name(v) for v in _values(value, axis, where)] for axis, value in entry.items()}
        for axis, values in about.items():
            known = {_name(point[axis]) for point in points}
            for value in values:
                if value not in known:
                    raise InputError(f"{where}: {unknown_name(f'value of {axis}', str(value), map(str, known))}")
        exclusions.append(about)
    return exclusions


def _matches(point: Point, exclusions: Iterable[Mapping[str, Sequence[Any]]]) -> bool:
    return any(all(_name(point[axis]) in values for axis, values in about.items()) for about in exclusions)


def _name(value: Any) -> Any:
    return value.data if isinstance(value, Dataset) else value


# --- options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """What holds for every run of a grid."""

    source: str
    run_options: Mapping[str, Any]
    prune_options: Mapping[str, Any]
    split: Mapping[str, Any]
    finetune: FinetuneConfig

    @classmethod
    def read(cls, content: Mapping[str, Any], source: str) -> _Options:
        """Returns the options in the content of a grid, each of its type."""
        of_run, of_prune = get_type_hints(RunConfig), get_type_hints(PruneConfig)
        run = {k: convert(of_run[k], content[k], f"{source}: {k}") for k in _RUN_OPTIONS if k in content}
        prune = {k: convert(of_prune[k], content[k], f"{source}: {k}") for k in _PRUNE_OPTIONS if k in content}
        if "family_ratios" in content:
            prune["ratios"] = convert(of_prune["ratios"], content["family_ratios"], f"{source}: family_ratios")
        split = convert(Mapping[str, Any], content.get("split", {}), f"{source}: split")
        return cls(source, run, prune, split, _finetune(content.get("finetune", {}), f"{source}: finetune"))

    def run(self, point: Point) -> RunConfig:
        """Returns the run at a point of the grid."""
        dataset: Dataset = point["datasets"]
        where = f"{self.source}: split of {dataset.data}"
        axes = {"unseen": point["unseen"], "without": point["without"]}
        for axis in axes:
            if axis in self.split or axis in dataset.split:
                raise InputError(f"{where}: {axis} belongs beside split, not into it")
        split = build(DataConfig, {**self.split, **dataset.split, **axes}, where)
        own_head = point["models"] in BASE_MODELS
        options: dict[str, Any] = {"probe_epochs": PROBE_EPOCHS, **self.run_options} | (
            {"probe_epochs": 0} if own_head else {}
        )
        try:
            if own_head and options.get("weights") != "random":
                check_shipped(point["models"], point["unseen"], point["without"])
            return RunConfig(
                model=point["models"],
                data=dataset.data,
                seed=point["seeds"],
                split=split,
                finetune=replace(self.finetune, seed=point["seeds"]),
                prune=self._prune(point),
                **options,
            )
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from error

    def _prune(self, point: Point) -> PruneConfig | None:
        if point["criteria"] is None:
            return None
        scope = {"scope": point["scopes"]} if point["scopes"] else {}
        amount = {"ratio": point["ratios"], "macs": point["macs"]}
        return PruneConfig(criterion=point["criteria"], **amount, **scope, **self.prune_options)


def _finetune(value: Any, where: str) -> FinetuneConfig:
    """Returns a recipe by its name with changes to single fields."""
    changes = convert(Mapping[str, Any], value, where)
    recipe = changes.pop("recipe", "default")
    if "seed" in changes:
        raise InputError(f"{where}.seed: seeds are an axis of the grid")
    try:
        chosen = FinetuneConfig.recipe(str(recipe))
    except InputError as error:
        raise InputError(f"{where}.recipe: {error}") from error
    given = {f.name: getattr(chosen, f.name) for f in fields(FinetuneConfig)}
    return build(FinetuneConfig, given | changes, where)

"""Where a model comes from: enough to build its architecture again, as plain JSON."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from torch import nn

from secateur.errors import CheckpointError, InputError, unknown_name

Kind = Literal["timm", "transformers", "torchvision"]
Weights = Literal["pretrained", "random"]
RUNS_CODE = ("trust_remote_code", "attn_implementation", "_attn_implementation", "checkpoint_path")
"""Options by which a builder would run code, or read pickles, from elsewhere: loading a model must never do that."""


@dataclass(frozen=True)
class ModelSource:
    """A recipe for one architecture.

    `name` is a timm or torchvision model name or, for transformers, a class (`ViTForImageClassification`), a folder
    with a config.json, or a name on the Hugging Face Hub. `options` are the keyword arguments of the builder or, for
    transformers, the fields of the configuration that differ from the default; JSON values only.
    """

    kind: Kind
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON values."""
        return {"kind": self.kind, "name": self.name, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, value: Any) -> ModelSource:
        """Returns the recipe that `to_dict` wrote.

        Raises:
            CheckpointError: The value is something else.
        """
        kinds = get_args(Kind)
        match value:
            case {
                "kind": ("timm" | "transformers" | "torchvision") as kind,
                "name": str(name),
                "options": dict(options),
            }:
                return cls(kind, name, options)
        raise CheckpointError(
            f"expected a model source with kind ({', '.join(kinds)}), name and options, found {value}"
        )


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{name} is needed for this model: pip install 'secateur[models]' ({error})") from error


def parse(name: str, *, img_size: int | None = None, num_classes: int | None = None) -> ModelSource:
    """Returns the source that a name on the command line stands for.

    `hf:` or a name with a slash means transformers, `torchvision:` torchvision, anything else timm. `img_size` (pixels
    per side) and `num_classes` (of a fresh head) are put in where the architecture takes them.

    Raises:
        InputError: No such model; the message has the nearest names.
    """
    if name.startswith("torchvision:"):
        return _parse_torchvision(name.removeprefix("torchvision:"), img_size, num_classes)
    if name.startswith("hf:") or "/" in name:
        options = {"image_size": img_size, "num_labels": num_classes}
        source = ModelSource("transformers", name.removeprefix("hf:"), _given(options))
        if _is_class_name(source.name):
            _transformers_class(source.name)
        return source
    return _parse_timm(name, img_size, num_classes)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _parse_timm(name: str, img_size: int | None, num_classes: int | None) -> ModelSource:
    timm = _library("timm")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise unknown_name("timm model", name, timm.list_models())
    tags = timm.list_pretrained(f"{base}.*")
    if tag and name not in tags:
        raise unknown_name(f"pretrained tag of the timm model {base}", name, tags)
    fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
    return ModelSource("timm", name, _given({"img_size": img_size if fixed else None, "num_classes": num_classes}))


def _parse_torchvision(name: str, img_size: int | None, num_classes: int | None) -> ModelSource:
    models = _library("torchvision.models")
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    fixed = name.startswith("vit_")
    return ModelSource(
        "torchvision", name, _given({"image_size": img_size if fixed else None, "num_classes": num_classes})
    )


def _is_class_name(name: str) -> bool:
    return "/" not in name and not Path(name).is_dir()


def _transformers_class(name: str) -> Any:
    transformers: Any = _library("transformers")
    found = getattr(transformers, name, None)
    if (
        inspect.isclass(found)
        and issubclass(found, transformers.PreTrainedModel)
        and getattr(found, "config_class", None)
    ):
        return found
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    known = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    classes = {c for entry in known for c in ([entry] if isinstance(entry, str) else entry)}
    raise unknown_name("transformers model class", name, classes)


def build_model(source: ModelSource, weights: Weights) -> nn.Module:
    """Returns the model in eval mode, with its published weights or random ones (from torch's current random state).

    Raises:
        InputError: The weights (or, on the Hub, the configuration) cannot be had, or the options do not suit the model.
    """
    refused = sorted(source.options.keys() & set(RUNS_CODE))
    if refused:
        raise InputError(
            f"{source.kind} model {source.name}: option {', '.join(refused)} could run code from elsewhere"
        )
    builders: dict[Kind, Callable[[ModelSource, bool], nn.Module]] = {
        "timm": _build_timm,
        "transformers": _build_transformers,
        "torchvision": _build_torchvision,
    }
    return builders[source.kind](source, weights == "pretrained").eval()


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _no_weights(source: ModelSource, error: Exception | str) -> InputError:
    reason = _one_line(error)
    return InputError(
        f"no pretrained weights for {source.kind} model {source.name}: {reason}. "
        'Pass --random-weights (weights="random" in Python) to go on without them.'
    )


def _bad_options(source: ModelSource, error: Exception) -> InputError:
    options = ", ".join(f"{key}={value}" for key, value in source.options.items()) or "its default options"
    return InputError(f"cannot build {source.kind} model {source.name} with {options}: {_one_line(error)}")


def _build_timm(source: ModelSource, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    if pretrained and not timm.models.is_model_pretrained(source.name):
        raise _no_weights(source, "timm lists none")
    try:
        return timm.create_model(source.name, pretrained=pretrained, **source.options)
    except (OSError, RuntimeError) as error:
        raise (_no_weights if pretrained else _bad_options)(source, error) from error
    except (TypeError, ValueError, AssertionError) as error:
        raise _bad_options(source, error) from error


def _build_transformers(source: ModelSource, pretrained: bool) -> nn.Module:
    transformers = _library("transformers")
    if _is_class_name(source.name):
        if pretrained:
            raise _no_weights(source, "a class alone has none; name a model on the Hub for its weights")
        model_class = _transformers_class(source.name)
        try:
            return model_class(model_class.config_class.from_dict(dict(source.options)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise _bad_options(source, error) from error
    try:
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the configuration of {source.name} cannot be had: {_one_line(error)}. Without it, "
            "give a class instead, with random weights: hf:ViTForImageClassification --random-weights"
        ) from error
    named = (config.architectures or [""])[0]
    model_class = getattr(transformers, named, None) or transformers.AutoModelForImageClassification
    try:
        if pretrained:
            # A head for other classes is made afresh; any other mismatch is an error.
            new_head = "num_labels" in source.options and "image_size" not in source.options
            return model_class.from_pretrained(source.name, config=config, ignore_mismatched_sizes=new_head)
        return model_class(config) if hasattr(transformers, named) else model_class.from_config(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise (_no_weights if pretrained else _bad_options)(source, error) from error


def _build_torchvision(source: ModelSource, pretrained: bool) -> nn.Module:
    models = _library("torchvision.models")
    try:
        return models.get_model(source.name, weights="DEFAULT" if pretrained else None, **source.options)
    except (OSError, RuntimeError) as error:
        raise (_no_weights if pretrained else _bad_options)(source, error) from error
    except (TypeError, ValueError) as error:
        raise _bad_options(source, error) from error


def source_of(model: nn.Module) -> ModelSource:
    """Returns the source of a model made by timm or transformers, read off the model before it is cut.

    Of a timm model, the number of classes, the input size and the input channels are recovered; of a transformers
    model, all of its configuration. Other arguments are not written down anywhere in a timm model: the caller then
    states the source.

    Raises:
        InputError: The model does not say how it was made (it is from elsewhere, or made by calling its class).
    """
    library = type(model).__module__.partition(".")[0]
    if library == "transformers" and (config := getattr(model, "config", None)) is not None:
        return ModelSource("transformers", type(model).__name__, config.to_dict())
    published = getattr(model, "pretrained_cfg", None)
    if library == "timm" and isinstance(published, Mapping) and published.get("architecture"):
        name = ".".join(filter(None, (published["architecture"], published.get("tag"))))
        return ModelSource("timm", name, _timm_options(model, published))
    raise InputError(
        f"a {type(model).__module__}.{type(model).__name__} does not say how it was made; pass "
        "source=ModelSource(kind, name, options), for example ModelSource('torchvision', 'vit_b_16')"
    )


def _timm_options(model: nn.Module, published: Mapping[str, Any]) -> dict[str, Any]:
    channels, *size = published["input_size"]
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    found = {
        "num_classes": (getattr(model, "num_classes", None), published["num_classes"]),
        "img_size": (None if sides is None else list(sides), size),
        "in_chans": (getattr(model, "in_chans", None), channels),
    }
    return {key: value for key, (value, usual) in found.items() if value is not None and value != usual}

"""Where a model to check comes from: a module, a config, a file, a folder, or a function's name."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.model.config import read_config_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be built.

    Attributes:
        config: its transformers config; None for any other model.
        make: builds a model of a config of the same kind.
        model: the live model; None where there is only a config.
    """

    config: Any
    make: Callable[[Any], nn.Module]
    model: nn.Module | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> Source:
        """A live model; adapters and other wrappers cannot be made of a config."""
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            return cls(model.config, type(model), model)
        return cls(None, _no_config, model)

    def build(self, config: Any) -> nn.Module:
        """The model of a config, with random weights.

        Raises:
            PipelineConfigError: if its class makes none of it.
        """
        return _built(self.make, config)

    def build_bare(self) -> nn.Module:
        """The model as large as it is and in its own dtype, without weights.

        Raises:
            PipelineConfigError: if its class makes none of the config.
        """
        make = getattr(self.make, "_from_config", self.make)  # it minds the config's dtype
        with torch.device("meta"):
            return _built(make, copy.deepcopy(self.config))


def _built(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    try:
        return make(config)
    except Exception as error:  # whatever the model's own code raises
        raise PipelineConfigError(
            f"no model can be built of this {type(config).__name__}: {_said(error)}. Check "
            f"that transformers can build it."
        ) from error


def find_source(
    model: nn.Module | PretrainedConfig | str | PathLike[str], *, trust_remote_code: bool = False
) -> Source:
    """What ``model`` names.

    Args:
        model: a module, a transformers config, the path of a config.json or of a folder with one,
            or ``module:function`` that returns a module or a config.
        trust_remote_code: whether a folder's own Python code may run.

    Raises:
        PipelineConfigError: if there is no such thing.
    """
    from transformers import PretrainedConfig

    if isinstance(model, nn.Module):
        return Source.of_model(model)
    if isinstance(model, PretrainedConfig):
        return Source(model, _class_of(model, None, trust_remote_code=trust_remote_code))
    if not isinstance(model, str | PathLike):
        raise PipelineConfigError(
            f"model is a {type(model).__name__}: give an nn.Module, a transformers config, a path "
            f"or 'module:function'."
        )
    path = Path(model)
    if not path.exists() and isinstance(model, str) and _is_function_name(model):
        return find_source(_call(model), trust_remote_code=trust_remote_code)
    return _from_files(path, trust_remote_code=trust_remote_code)


def _is_function_name(name: str) -> bool:
    module, colon, function = name.partition(":")
    steps = [*module.split("."), *function.split(".")]
    return bool(colon) and all(step.isidentifier() for step in steps)


def _call(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    with _importable(Path.cwd()):
        try:
            target: Any = importlib.import_module(module_name)
            for step in function_name.split("."):
                target = getattr(target, step)
            made = target()
        except Exception as error:
            raise PipelineConfigError(
                f"{name!r} gives no model: {_said(error)}. Name a function that can be called "
                f"without arguments, of a module on the path or in the current folder."
            ) from error
    from transformers import PretrainedConfig

    if not isinstance(made, nn.Module | PretrainedConfig):
        raise PipelineConfigError(
            f"{name!r} returned a {type(made).__name__}: it must return an nn.Module or a "
            f"transformers config."
        )
    return made


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _from_files(path: Path, *, trust_remote_code: bool) -> Source:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        values = read_config_file(file).value
    except FileNotFoundError:
        raise PipelineConfigError(
            f"{str(path)!r} has no readable config.json (no such file): give the path of a "
            f"config.json, a local folder with one, or 'module:function'."
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise PipelineConfigError(
            f"{str(file)!r} names no model_type: give the config of a transformers model."
        )
    if "auto_map" in values and not trust_remote_code:
        raise PipelineConfigError(
            f"{str(file)!r} has code of its own (auto_map), which is run only where you allow it: "
            f"read it, then give --trust-remote-code (trust_remote_code=True)."
        )
    where = file if file.name != "config.json" else file.parent
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parts raise
        raise PipelineConfigError(
            f"transformers makes no config of {str(file)!r}: {_said(error)}"
        ) from error
    return Source(config, _class_of(config, file.parent, trust_remote_code=trust_remote_code))


def _class_of(
    config: Any, folder: Path | None, *, trust_remote_code: bool
) -> Callable[[Any], nn.Module]:
    """The class that the config was saved with, else the causal language model of its kind."""
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    for auto in _AUTO_CLASSES:
        if auto in remote and folder is not None and trust_remote_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            own: Callable[[Any], nn.Module]
            own = get_class_from_dynamic_module(remote[auto], str(folder))
            return own
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in _AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found  # type: ignore[no-any-return]
    raise PipelineConfigError(
        f"transformers has no model class for a {type(config).__name__}: give "
        f"'module:function' that builds the model."
    )


_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModel",
)


def _no_config(_config: Any) -> nn.Module:
    raise AssertionError("a model without a config is never built anew")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]

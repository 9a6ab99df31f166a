"""Tiny configs of the same kind: every size small, what makes the model what it is kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, MutableMapping
from typing import Any

from hfpp.check.shrink_defaults import OPEN_DEFAULTS
from hfpp.check.shrink_layers import (
    KeptLayers,
    choose_layers,
    is_ints,
    point_into_stacks,
    shrink_layer_attribute,
)
from hfpp.check.shrink_rope import name_sections, shrink_rope
from hfpp.check.shrink_rules import Change, apply_rules
from hfpp.check.shrink_sizes import (
    GRID,
    HIDDEN,
    PATCH,
    SharedSizes,
    StackSizes,
    find_heads,
    first_int,
    role_of,
    small_head_dim,
    small_hidden,
)
from hfpp.errors import PipelineConfigError

Attributes = MutableMapping[str, Any]

# Sub-configs of other stacks than the decoder: fewer layers, another width.
_ENCODER_KEY = re.compile(
    r"vision|visual|image|audio|video|speech|encoder|vq|vit|qformer|perceiver|resampler|adapter"
    r"|projector|codec|depth_dec|sam_|patcher|backbone"
)
_NESTED_DICT = re.compile(r"_(config|cfg)$")
_ROPE = frozenset({"rope_parameters", "rope_scaling"})
_ENCODER_LAYERS = 2


def shrink_config(config: Any, *, layers: int = 4) -> Any:
    """A tiny config of the same kind as `config`, which is left untouched.

    Sizes shrink under whatever name they have, in nested configs too; sizes that were equal stay
    equal. What the model multiplies by, its activations, norms, ties and kinds of rope stay. Each
    kind of layer occurs still, nothing is dropped at random, windows are 8 tokens long, and the
    vocabulary has 128 tokens with the special ones among the first 16 or at its end. Weights are to
    be initialized wider: their sums over fewer inputs then have the magnitudes they had.

    Args:
        config: A transformers config object.
        layers: How many decoder layers to keep; more are kept where the model has more kinds.

    Returns:
        A deep copy with other values. Its dtype fields are those of `config`.

    Raises:
        PipelineConfigError: `layers` is below 1, or the shrunk config does not satisfy its class.
    """
    if layers < 1:
        raise PipelineConfigError(f"layers ({layers}) must be at least 1: use 4 or more.")
    small = copy.deepcopy(config)
    nested = list(_nested(small))
    for _, part in nested:
        model_type = getattr(part, "model_type", "")
        name_sections(model_type, _attributes(part).get("rope_parameters"))
    shared = _shared_sizes([_attributes(part) for _, part in nested])
    for text in (True, False):  # text stacks first: encoders take over their widths where equal
        for key, part in nested:
            hidden = first_int(_attributes(part), HIDDEN)
            if hidden is not None and _is_text(key) == text:
                small_hidden(hidden, shared, text=text)
    stacks: dict[str, KeptLayers] = {}
    _shrink(small, "", shared, layers, outer=None, stacks=stacks)
    encoder = next((stack for key, stack in stacks.items() if not _is_text(key)), None)
    decoder = next((stack for key, stack in stacks.items() if _is_text(key)), None)
    for _, part in nested:
        point_into_stacks(_attributes(part), encoder, decoder)
    for _, part in nested:
        _validate(part, config)
    return small


def tiny_config(config_class: type, model_class: type | None = None) -> Any:
    """A tiny config from a config class's defaults.

    Args:
        config_class: The config class to start from.
        model_class: The model class to be built, which may want a part of a composite config
            (a causal LM its text config): its `config_class` tells.

    Returns:
        What `shrink_config` makes of the defaults.

    Raises:
        PipelineConfigError: The class has no usable defaults, or none that `model_class` accepts.
    """
    wanted = getattr(model_class, "config_class", None) or config_class
    config: Any
    try:
        config = _defaults(config_class)
    except Exception as error:
        raise PipelineConfigError(
            f"{config_class.__name__} cannot be made from its defaults ({error}): "
            "give a config of your own."
        ) from error
    if not isinstance(config, wanted):
        parts = (part for _, part in _nested(config))
        config = next((part for part in parts if isinstance(part, wanted)), None) or _defaults(
            wanted
        )
    if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # encoders by default, which as causal LMs look back only
    return shrink_config(config)


def _defaults(config_class: Any) -> Any:
    """A config of this class, with values for what the class leaves open, in nested ones too."""
    config = config_class(**copy.deepcopy(OPEN_DEFAULTS.get(config_class.model_type, {})))
    for name, value in list(vars(config).items()):
        if _is_config(name, value) and not isinstance(value, dict):
            inner = OPEN_DEFAULTS.get(value.model_type)
            if inner is not None:
                setattr(config, name, type(value)(**copy.deepcopy(inner)))
    return config


def _attributes(part: Any) -> Attributes:
    """A config's attributes under their real names, without the config's own setters."""
    return part if isinstance(part, dict) else vars(part)


def _is_config(name: str, value: object) -> bool:
    if isinstance(value, dict):
        return _NESTED_DICT.search(name) is not None and name not in _ROPE
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _nested(part: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All configs inside a config, itself first, with the path of attributes that leads there."""
    yield key, part
    for name, value in _attributes(part).items():
        if _is_config(name, value):
            yield from _nested(value, f"{key}/{name}")


def _is_text(key: str) -> bool:
    return _ENCODER_KEY.search(key) is None


def _shared_sizes(parts: list[Attributes]) -> SharedSizes:
    hidden = [first_int(part, HIDDEN) or 0 for part in parts]
    vocab = max((first_int(part, ("vocab_size",)) or 0 for part in parts), default=0)
    shared = SharedSizes(
        text_hidden=max(hidden) or 1,
        vocab=vocab,
        grid=next(filter(None, map(_grid, parts)), (1, 1)),
    )
    ids: set[int] = set()
    for part in parts:
        for name, value in part.items():
            if role_of(name) == "token":
                ids.update([value] if isinstance(value, int) else value if is_ints(value) else [])
    shared.add_tokens(ids)
    return shared


def _stack_sizes(
    part: Attributes, key: str, shared: SharedSizes, outer: StackSizes | None
) -> StackSizes:
    """The measures of one config; those that it lacks are those of the config around it."""
    old = first_int(part, HIDDEN)
    if old is None and outer is not None:
        return outer
    hidden = (old or 1, small_hidden(old, shared, text=_is_text(key)) if old else 1)
    heads = find_heads(part, hidden[1])
    patch = _side(part.get("patch_size")) or 1
    return StackSizes(
        shared=shared,
        hidden=hidden,
        heads=heads,
        head_dim=small_head_dim(part, hidden, heads),
        grid=_grid(part) or shared.grid,
        patch=(patch, min(patch, PATCH)),
    )


def _side(size: Any) -> int | None:
    """A square's side, given as such or as height and width; None where neither."""
    side = size[0] if is_ints(size) else size
    return side if isinstance(side, int) and side > 0 else None


def _grid(part: Attributes) -> tuple[int, int] | None:
    """Patches along the side of an image, before and after; None without images."""
    patch, image = _side(part.get("patch_size")), _side(part.get("image_size"))
    if patch is None or image is None:
        return None
    return max(1, image // patch), min(max(1, image // patch), GRID)


def _overrides(part: Any) -> dict[int, dict[str, Any]]:
    """What single layers override of a config whose layers differ."""
    if not getattr(part, "is_heterogeneous", False):
        return {}
    return {int(index): dict(v) for index, v in part.to_dict()["per_layer_config"].items()}


def _shrink(
    part: Any,
    key: str,
    shared: SharedSizes,
    layers: int,
    outer: tuple[StackSizes, KeptLayers | None] | None,
    stacks: dict[str, KeptLayers],
) -> None:
    """Shrink a config and those inside it, in place; note in `stacks` what layers each keeps."""
    attributes = _attributes(part)
    before = {
        name: copy.deepcopy(value) if isinstance(value, dict) else value
        for name, value in attributes.items()
    }
    sizes = _stack_sizes(attributes, key, shared, outer and outer[0])
    wanted = layers if _is_text(key) else _ENCODER_LAYERS
    stack = choose_layers(attributes, wanted, _overrides(part))
    if stack is not None:
        stacks[key] = stack
    elif outer is not None:
        stack = outer[1]
    if stack is not None and stack.overrides:
        part.per_layer_config = None
    for name, value in list(attributes.items()):
        if _is_config(name, value):
            _shrink(value, f"{key}/{name}", shared, layers, (sizes, stack), stacks)
        elif name in _ROPE and isinstance(value, dict):
            shrink_rope(value, sizes.head_dim, attributes.get("partial_rotary_factor") or 1.0)
        else:
            attributes[name] = _small_value(name, value, sizes, stack)
    model_type = getattr(part, "model_type", "")
    apply_rules(Change(model_type=model_type, old=before, new=attributes, sizes=sizes))
    if stack is not None and stack.overrides:
        part.per_layer_config = {
            index: {
                name: _small_value(name, value, sizes, None)
                for name, value in stack.overrides[old].items()
            }
            for index, old in enumerate(stack.kept)
            if old in stack.overrides
        }


def _small_value(name: str, value: Any, sizes: StackSizes, stack: KeptLayers | None) -> Any:
    """The small value of one attribute, or the same value where it is no size."""
    if stack is not None:
        done, value = shrink_layer_attribute(name, value, stack)
        if done:
            return value
    role = role_of(name)
    if role is None or role == "kept" or isinstance(value, bool):
        return value
    if role == "probability":
        return type(value)(0) if isinstance(value, (int, float)) else value
    if role == "spread":
        return sizes.spread(value) if isinstance(value, (int, float)) else value
    if isinstance(value, int):
        return sizes.small(role, value)
    if is_ints(value):
        return type(value)(sizes.small(role, item) for item in value)
    return value


def _validate(part: Any, config: Any) -> None:
    validate = getattr(part, "validate", None)
    if validate is None:
        return
    try:
        validate()
    except Exception as error:
        raise PipelineConfigError(
            f"{type(config).__name__} cannot be shrunk to a valid config ({error}): "
            "use the model as it is."
        ) from error

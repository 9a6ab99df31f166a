"""The shape of a model, read from its config.json alone: layers, widths, parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from hfpp.errors import PipelineConfigError
from hfpp.plan.model.config import ModelConfig, read_config
from hfpp.plan.model.family import Family, count_of, holds
from hfpp.plan.model.layer_kinds import LayerKind, layer_kinds
from hfpp.plan.model.layer_reading import HIDDEN_KEYS, norm_parameters, read_layer
from hfpp.plan.model.layer_shape import Attention
from hfpp.plan.model.needs import check_needs
from hfpp.plan.model.uncounted import UNCOUNTED, family_of

if TYPE_CHECKING:
    from hfpp.plan.model.layer_shape import LayerShape, NormKind

__all__ = ["ModelShape"]

_TEXT_KEYS = ("text_config", "language_config", "llm_config")
_ENCODER = re.compile(r"(vision|visual|image|audio|speech|encoder|vit).*_(config|cfg)$")
_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size")
_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a decoder is made of.

    Attributes:
        model_type: of the config; empty where it names none.
        hidden_size: width of the hidden states.
        vocab_size: width of the logits.
        layers: one entry per layer; equal ones are the same object.
        embedding_parameters: of what precedes the first layer.
        head_parameters: of what follows the last layer, the matrix of the head included; where
            the head is tied too, its weights are the embedding's and counted there only in
            `parameters`.
        is_tied: whether the head's matrix is the embedding's.
        norm: the kind of the final norm.
        has_final_norm: whether there is one.
        has_logit_softcap: whether the logits are capped.
        dtype: torch's name of the dtype that the config gives; None where it gives none.
        is_known: whether its model_type is known, so that the count is exact; otherwise it is what
            the usual keys say.
        not_counted: sub-configs whose parameters are not counted, such as a vision encoder's.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    embedding_parameters: int
    head_parameters: int
    is_tied: bool
    norm: NormKind = "rms"
    has_final_norm: bool = True
    has_logit_softcap: bool = False
    dtype: str | None = None
    is_known: bool = True
    not_counted: tuple[str, ...] = ()

    @classmethod
    def from_config(
        cls, source: Mapping[str, Any] | str | PathLike[str], *, dtype: str | None = None
    ) -> ModelShape:
        """Read a model's shape from its config.

        Args:
            source: the config's values as a dict, the path of a config.json, or of a folder with
                one. Of a multimodal config the text model is read.
            dtype: instead of the config's, by torch's name; None takes the config's.

        Raises:
            FileNotFoundError: no such file.
            PipelineConfigError: the file holds no JSON object, a needed key is absent, a size is
                absurd, or the model type is one that the keys do not tell enough of; naming the
                file, the line and the keys.

        Example:
            >>> shape = ModelShape.from_config(
            ...     {
            ...         "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248,
            ...         "num_hidden_layers": 126, "num_attention_heads": 128,
            ...         "num_key_value_heads": 8, "vocab_size": 128256,
            ...     }
            ... )
            >>> f"{shape.parameters:,}"
            '405,853,388,800'
        """
        if dtype is not None and dtype not in _DTYPES:
            raise PipelineConfigError(
                f"dtype ({dtype!r}) must be one of {', '.join(sorted(_DTYPES))}: use dtype=None "
                "for the config's"
            )
        return _read(cls, read_config(source), dtype)

    @cached_property
    def widest_head(self) -> int:
        """The largest head dimension of any attention; 0 without attention."""
        attentions = (m for layer in self.layers for m in layer.mixers if isinstance(m, Attention))
        return max((part.head_dim for part in attentions), default=0)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        tied = self.vocab_size * self.hidden_size if self.is_tied else 0
        layers = sum(layer.parameters for layer in self.layers)
        return self.embedding_parameters + layers + self.head_parameters - tied

    @cached_property
    def active_parameters(self) -> int:
        """Number of parameters that one token is multiplied by, the embedding's left out."""
        return sum(layer.active_parameters for layer in self.layers) + self.head_parameters


def _read(cls: type[ModelShape], config: ModelConfig, dtype: str | None) -> ModelShape:
    outer = config
    for key in _TEXT_KEYS:
        inner = config.inner(key)
        if inner is not None:
            config = inner
            break
    if config is not outer and outer.model_type in UNCOUNTED:
        family_of(outer)  # says why not
    encoders = tuple(
        key
        for key, value in outer.values.items()
        if isinstance(value, Mapping) and _ENCODER.search(str(key)) and value
    )
    family = family_of(config)
    is_known = family is not None
    family = family or Family()
    config = config.merged(family.nested)
    check_needs(config)
    lacking = {k: v for k, v in family.defaults.items() if not config.has(k)}
    config = config.with_values(lacking)
    if family.change is not None:
        config = config.with_values(family.change(config))
    for key in family.refuse:
        if config.values.get(key):
            config.fail(key, "is set, which changes the layers in ways that are not known")
    hidden = config.integer(*HIDDEN_KEYS)
    vocabulary = config.integer(*_VOCABULARY_KEYS)
    layers = _layers(config, family)
    tied = outer.flag("tie_word_embeddings", config.flag("tie_word_embeddings", family.tied))
    tied = tied and not family.never_tied
    norm = norm_parameters(family.norm, hidden, bias=family.norm_bias)
    final = holds(family.final_norm, config)
    embedding = vocabulary * hidden + count_of(family.embedding_besides, config)
    embedding += norm if family.embedding_norm else 0
    if family.positions is not None:
        key, more = family.positions
        embedding += (config.integer(key) + more) * hidden
    head = vocabulary * hidden + (vocabulary if holds(family.head_bias, config) else 0)
    return cls(
        model_type=config.model_type,
        hidden_size=hidden,
        vocab_size=vocabulary,
        layers=layers,
        embedding_parameters=embedding,
        head_parameters=head + (norm if final else 0),
        is_tied=tied,
        norm=family.norm,
        has_final_norm=final,
        has_logit_softcap=config.has("final_logit_softcapping", "logits_soft_cap"),
        dtype=dtype or _dtype(config) or _dtype(outer),
        is_known=is_known,
        not_counted=encoders,
    )


def _dtype(config: ModelConfig) -> str | None:
    """Torch's name of the config's dtype; None where it has none."""
    for key in ("dtype", "torch_dtype"):
        value = config.values.get(key)
        if value is None or value == "auto":
            continue
        name = str(value).removeprefix("torch.")  # a live config's is an object of torch
        if name not in _DTYPES:
            shown = json.dumps(value) if isinstance(value, str) and len(value) < 40 else "no dtype"
            config.fail(
                key,
                f"is {shown}: it must be one of {', '.join(sorted(_DTYPES))}; or say what is "
                "trained in, with hfpp plan --dtype or from_config(dtype=...)",
            )
        return name
    return None


def _layers(config: ModelConfig, family: Family) -> tuple[LayerShape, ...]:
    kinds = layer_kinds(config, family)
    changes = _changes_by_layer(config, len(kinds))
    made: dict[tuple[LayerKind, str], LayerShape] = {}
    layers = []
    for index, kind in enumerate(kinds):
        change = changes.get(index, {})
        key = (kind, repr(sorted(change.items())))
        if key not in made:
            made[key] = read_layer(config.with_values(change), family, kind)
        layers.append(made[key])
    besides = count_of(family.last_layer_besides, config)
    if besides:
        layers[-1] = replace(layers[-1], besides=layers[-1].besides + besides)
    return tuple(layers)


def _changes_by_layer(config: ModelConfig, count: int) -> dict[int, Mapping[str, Any]]:
    """What single layers override, by index."""
    found: dict[int, Mapping[str, Any]] = {}
    for index, change in (config.object("per_layer_config") or {}).items():
        if not (str(index).isdecimal() and len(str(index)) < 7 and isinstance(change, Mapping)):
            config.fail("per_layer_config", "must hold an object by number of layer")
        found[int(index)] = change
    heads = config.listed("num_attention_heads_per_layer")
    if heads and len(heads) < count:
        config.fail("num_attention_heads_per_layer", f"has {len(heads)} entries for {count} layers")
    for layer, number in enumerate(heads or ()):
        found[layer] = {**found.get(layer, {}), "num_attention_heads": number}
    return found

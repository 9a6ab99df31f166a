"""Telling models apart by all that their forward can read without weights.

Two models of equal digest run the same code on the same shapes. Values are compared by content;
functions and classes are compared by identity, as a patched one differs in nothing else. Where
something could tell two models apart that cannot be looked into, there is no digest at all. That
is so wherever code takes part that is not of a known package: it may read any state of its own, as
a flag of another module, which no look at the model shows.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hfpp.runtime.code_identity import (
    Identity,
    is_importable,
    is_known,
    is_known_import,
    is_written_in_python,
    modules_around,
    shows_its_state,
)
from hfpp.runtime.skeleton import keeps_values
from hfpp.runtime.torch_compat import is_intercepted

_ATOMS = frozenset(
    (
        *(int, float, complex, bool, str, bytes, type(None), type(...), range, slice),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)
_OWN_TABLES: Mapping[str, Any] = nn.Module().__dict__
_VOLATILE = frozenset(
    (
        # where a model came from and what it warned of: no forward reads it
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("warnings_issued", "_is_hf_initialized"),
        # set anew by a copy, or left behind
        *("training", "_compiled_call_impl"),
    )
)
_CLASS_BOOKKEEPING = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"),
        *("__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
        *("__abstractmethods__", "_abc_impl", "__static_attributes__", "__parameters__"),
        *("__orig_bases__", "__type_params__", "__match_args__", "__slotnames__"),
    )
)
_DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)


class ModelDigest(NamedTuple):
    """Equal for models whose hollow runs are the same.

    Attributes:
        content: a hash of all values, and of the order in which ``identities`` were met.
        identities: functions and classes.
    """

    content: bytes
    identities: tuple[Identity, ...]


def digest_of(model: nn.Module) -> ModelDigest | None:
    """The digest of ``model``, whose weights are not read; None where something is opaque."""
    if is_intercepted():
        return None  # what intercepts operators or modules may change the run
    writer = _Writer(model)
    try:
        writer.write_model()
    except (_OpaqueError, RecursionError):
        return None
    content = hashlib.blake2b("\0".join(writer.parts).encode(errors="surrogatepass"))
    return ModelDigest(content.digest(), tuple(writer.identities))


class _OpaqueError(Exception):
    """Something whose meaning does not show in its attributes."""


class _Writer:
    """Writes a model down, part by part; every object once."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: list[str] = []
        self.identities: list[Identity] = []
        self._modules = list(model.modules())
        self._module_numbers = {id(m): number for number, m in enumerate(self._modules)}
        self._numbers: dict[int, int] = {}  # of functions and classes, by id
        self._seen: dict[int, int] = {}  # containers and tensors, by id: all are held by the model
        self._classes: dict[type, None] = {}

    def write_model(self) -> None:
        """The ambience, all modules, their classes and what those call."""
        self.parts.append(str(torch.get_default_dtype()))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                self.parts.append(f"autocast {kind} {torch.get_autocast_dtype(kind)}")
        for module in self._modules:
            self._module(module)
        self._code()

    # ---- modules

    def _module(self, module: nn.Module) -> None:
        self._type(type(module))
        for name, value in module.__dict__.items():
            if name in _VOLATILE:
                continue
            if name in _OWN_TABLES and not value:
                continue
            self.parts.append(name)
            if name == "_modules":
                for child_name, child in value.items():
                    number = None if child is None else self._module_numbers[id(child)]
                    self.parts.append(f"{child_name}={number}")
            elif name in ("_parameters", "_buffers"):
                for tensor_name, tensor in value.items():
                    self.parts.append(tensor_name)
                    self._registered(tensor)
            elif name in _OWN_TABLES and type(value) is not type(_OWN_TABLES[name]):
                raise _OpaqueError
            elif name in _OWN_TABLES and isinstance(value, Mapping):
                for hook in value.values():  # the keys number all hooks of the process
                    self.value(hook)
            else:
                self.value(value)

    def _registered(self, tensor: torch.Tensor | None) -> None:
        if tensor is None or id(tensor) in self._seen:
            self.value(tensor)
        else:
            self._seen[id(tensor)] = len(self._seen)
            self._tensor(tensor)  # a large buffer has no values in a skeleton

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise _OpaqueError
        meta = "meta" if tensor.is_meta else "data"
        layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
        self.parts.append(f"{type(tensor).__name__} {meta} {layout}")
        if isinstance(tensor, nn.Parameter):
            return
        if keeps_values(tensor):
            plain = tensor.detach().to("cpu").contiguous().resolve_conj().resolve_neg()
            size = plain.numel() * plain.element_size()
            data = ctypes.string_at(plain.data_ptr(), size) if size else b""
            self.parts.append(hashlib.blake2b(data).hexdigest())

    # ---- values

    def value(self, value: Any) -> None:
        """One value that a copy of the model holds too."""
        kind = type(value)
        if kind in _ATOMS:
            self.parts.append(f"{kind.__name__} {value!r}")
        elif id(value) in self._module_numbers:
            self.parts.append(f"module {self._module_numbers[id(value)]}")
        elif isinstance(value, nn.Module):
            raise _OpaqueError
        elif isinstance(value, type | types.FunctionType):
            if not (is_importable(value) and is_known(value)):
                raise _OpaqueError  # may read or hold anything
            self._type(value) if isinstance(value, type) else self._identity(value)
        elif isinstance(value, types.BuiltinFunctionType):
            if not (isinstance(value.__self__, types.ModuleType | type | None) and is_known(value)):
                raise _OpaqueError
            self._identity(value)
        elif isinstance(value, types.ModuleType):
            if not is_known(value):
                raise _OpaqueError
            self.parts.append(f"import {value.__name__}")
        elif id(value) in self._seen:
            self.parts.append(f"again {self._seen[id(value)]}")
        else:
            self._seen[id(value)] = len(self._seen)
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if not (isinstance(value, nn.Parameter) or value.is_meta or keeps_values(value)):
                raise _OpaqueError
            self._tensor(value)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__)
            self.value(value.__self__)
        elif isinstance(value, functools.partial):
            for item in (value.func, value.args, value.keywords):
                self.value(item)
        elif isinstance(value, enum.Enum):
            self._type(type(value))
            self.parts.append(value.name)
        elif isinstance(value, set | frozenset):
            if not all(type(item) in _ATOMS for item in value):
                raise _OpaqueError
            self.parts.append(f"{type(value).__name__} {sorted(map(repr, value))}")
        else:
            self._parts_of(value)

    def _parts_of(self, value: Any) -> None:
        """The items of a container, and the attributes of whatever a class statement made."""
        self._type(type(value))
        if isinstance(value, dict):
            self.parts.append(f"{len(value)} items")
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif isinstance(value, list | tuple):
            self.parts.append(f"{len(value)} items")
            for item in value:
                self.value(item)
        elif not shows_its_state(type(value)):
            raise _OpaqueError
        for name, item in getattr(value, "__dict__", {}).items():
            if name not in _VOLATILE:
                self.parts.append(name)
                self.value(item)

    # ---- classes and the code around them

    def _type(self, kind: type) -> None:
        if id(kind) not in self._numbers and not (is_importable(kind) and is_known(kind)):
            raise _OpaqueError
        self._classes.setdefault(kind)
        self._identity(kind)

    def _identity(self, thing: Any) -> None:
        number = self._numbers.get(id(thing))
        if number is None:
            identity = Identity(thing)  # fails before anything is written
            number = self._numbers[id(thing)] = len(self.identities)
            self.identities.append(identity)
        self.parts.append(f"identity {number}")

    def _code(self) -> None:
        """The classes with all their bases, and the global names that their code can see."""
        bases = dict.fromkeys(b for kind in list(self._classes) for b in kind.__mro__)
        for base in bases:
            if is_written_in_python(base):
                self._identity(base)
                for name, member in base.__dict__.items():
                    if name not in _CLASS_BOOKKEEPING:
                        self.parts.append(name)
                        self._member(member)
        for module in (torch, nn.functional):  # where others put their own operators
            for name, value in list(module.__dict__.items()):
                if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
                    self.parts.append(name)
                    self._refer(value)
        for module in modules_around(bases):
            self.parts.append(module.__name__)
            for name, value in list(module.__dict__.items()):
                if not name.startswith("__"):
                    self.parts.append(name)
                    self._global(value)

    def _member(self, member: Any) -> None:
        if isinstance(member, staticmethod | classmethod):
            self._global(member.__func__)
        elif isinstance(member, property):
            for function in (member.fget, member.fset, member.fdel):
                self._global(function)
        elif not isinstance(member, _DESCRIPTORS):
            self._global(member)

    def _global(self, value: Any) -> None:
        """What no copy of a model holds, and so must not be kept alive."""
        kind = type(value)
        if kind in _ATOMS:
            self.parts.append(f"{kind.__name__} {value!r}")
        elif id(value) in self._seen or id(value) in self._numbers:
            self.parts.append(f"again {self._seen.get(id(value))} {self._numbers.get(id(value))}")
        elif isinstance(value, dict | list | tuple | set | frozenset):
            self._seen[id(value)] = len(self._seen)
            self.parts.append(f"{kind.__name__} {len(value)}")
            # as the base class has them: looking up may load what is not needed
            items = dict.items(value) if isinstance(value, dict) else ((None, v) for v in value)
            for key, item in items:
                self._global(key)
                self._global(item)
        else:
            self._refer(value)
            if isinstance(value, Mapping) and shows_its_state(kind):
                self._registry(value)

    def _registry(self, registry: Mapping[Any, Any]) -> None:
        """What functions stand under which names, of an instance's own and of all of its class."""
        for holder in (registry, *type(registry).__mro__):
            for item in list(getattr(holder, "__dict__", {}).values()):
                if isinstance(item, dict):
                    self._global(item)

    def _refer(self, value: Any) -> None:
        if id(value) not in self._numbers and not is_known_import(value):
            raise _OpaqueError
        try:
            self._identity(value)
        except TypeError:  # no weak references to it
            self.parts.append(type(value).__qualname__)

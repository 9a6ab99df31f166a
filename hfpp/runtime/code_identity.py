"""Functions and classes as themselves: what a patched one differs in."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made it
_STANDARD = frozenset(sys.stdlib_module_names) - {"__main__"}
KNOWN_PACKAGES = frozenset(("torch", "transformers", "peft"))
"""Those whose forwards read no flags that they keep in other modules or in objects of their own.

Not ``transformers_modules``, where transformers puts the code that comes with checkpoints.
"""
_THEIR_LIBRARIES = frozenset(
    (
        *("huggingface_hub", "accelerate", "safetensors", "tokenizers", "numpy", "packaging"),
        *("tqdm", "regex", "_regex", "yaml", "httpx", "httpx2", "requests", "filelock", "psutil"),
        *("typing_extensions", "PIL", "fsspec", "torchvision", "pybind11_builtins"),
    )
)
"""What the known packages import for other things than forwards."""


class Identity(weakref.ref[Any]):
    """An object as itself, not kept alive.

    One that outlived its object equals no other: a patch that was undone is never taken for a later
    one, even if that lies at the same address.
    """

    __slots__ = ("_address",)

    def __init__(self, thing: Any, callback: None = None) -> None:
        super().__init__(thing, callback)  # type: ignore[call-arg]
        self._address = id(thing)

    def __eq__(self, other: object) -> bool:
        thing = self()
        return thing is not None and isinstance(other, Identity) and other() is thing

    def __hash__(self) -> int:
        return self._address


def is_importable(thing: type | types.FunctionType) -> bool:
    """Whether a module holds it: no closure over somebody's model, no class made to order."""
    found: Any = sys.modules.get(thing.__module__ or "")
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is thing


def is_known(thing: Any) -> bool:
    """Whether a known package or the standard library defines ``thing``."""
    return _packages_of(thing) <= KNOWN_PACKAGES | _STANDARD


def is_known_import(thing: Any) -> bool:
    """Whether ``thing`` is what a known package has among its globals of its own accord."""
    return _packages_of(thing) <= KNOWN_PACKAGES | _STANDARD | _THEIR_LIBRARIES


def _packages_of(thing: Any) -> set[str]:
    """Of the code that runs where ``thing`` is used; of the wrapped too if a wrapper tells."""
    if isinstance(thing, types.ModuleType):
        names = [thing.__name__]
    elif isinstance(thing, type):
        names = [base.__module__ for base in thing.__mro__]
    elif isinstance(thing, types.MethodType):
        return _packages_of(thing.__func__) | _packages_of(thing.__self__)
    elif isinstance(thing, functools.partial):
        return _packages_of(thing.func)
    else:
        names = [base.__module__ for base in type(thing).__mro__]
        names.append(getattr(thing, "__module__", None) or "builtins")
        if isinstance(thing, types.FunctionType):  # what wraps others takes their module's name
            names.append(thing.__globals__.get("__name__", ""))
    return {str(name).partition(".")[0] for name in names}


def is_written_in_python(kind: type) -> bool:
    """Whether a class statement made it."""
    return bool(kind.__flags__ & _HEAP_TYPE)


def shows_its_state(kind: type) -> bool:
    """Whether instances have all they have in their ``__dict__``."""
    return all(
        base is object or (is_written_in_python(base) and not base.__dict__.get("__slots__"))
        for base in kind.__mro__
    )


def modules_around(classes: Iterable[type]) -> Iterator[types.ModuleType]:
    """The modules that define ``classes``, and those whose functions they use, without torch's."""
    names = sorted({kind.__module__ for kind in classes})
    packages = {name.partition(".")[0] for name in names} - _STANDARD - {"torch"}
    seen: set[str] = set()
    while names:
        name = names.pop()
        module = sys.modules.get(name)
        if name in seen or module is None or name.partition(".")[0] not in packages:
            continue
        seen.add(name)
        yield module
        functions = (v for v in module.__dict__.values() if isinstance(v, types.FunctionType))
        names += [function.__module__ for function in functions if function.__module__]

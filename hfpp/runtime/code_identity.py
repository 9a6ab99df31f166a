"""Functions and classes as themselves: what a patched one differs in."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made it


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
    elsewhere = {*sys.stdlib_module_names, "torch"} - {"__main__"}
    names = sorted({kind.__module__ for kind in classes})
    packages = {name.partition(".")[0] for name in names} - elsewhere
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

"""Following the advice of an error message: ``use a=1 and b='x' or c=3`` as changed arguments."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hfpp import PipelineConfigError

_ASSIGNMENT = re.compile(r"(\w+)=('[^']*'|None|True|False|-?\d+)")


def alternatives(message: str) -> list[dict[str, Any]]:
    """What a message says to pass instead: one dict of arguments per alternative.

    Args:
        message: The text of an error; the advice follows its last ": use ".

    Returns:
        The alternatives, in order; empty where the message gives no advice in this form.
    """
    _, found, advice = message.rpartition(": use ")
    if not found:
        return []
    changes = (
        {name: ast.literal_eval(value) for name, value in _ASSIGNMENT.findall(alternative)}
        for alternative in advice.split(" or ")
    )
    return [change for change in changes if change]


def followed(message: str, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of the failed call with each alternative of the advice applied.

    Args:
        message: The text of the error.
        arguments: The keyword arguments of the call that raised it.

    Yields:
        The keyword arguments to try next.
    """
    for change in alternatives(message):
        unknown = change.keys() - arguments.keys()
        assert not unknown, f"the advice names {unknown}, which is no argument: {message}"
        yield {**arguments, **change}


def check_advice(call: Callable[..., Any], arguments: Mapping[str, Any], depth: int = 5) -> None:
    """Follows every alternative of an error's advice, and of the errors after it, until all work.

    Args:
        call: What may refuse its arguments with a `PipelineConfigError`.
        arguments: Its keyword arguments.
        depth: How many errors may follow on one another: one per wrong argument.

    Raises:
        AssertionError: If a message gives no advice, or following it does not lead anywhere.
    """
    try:
        call(**arguments)
    except PipelineConfigError as error:
        message = str(error)
    else:
        return
    assert depth, f"advice goes round in circles, lastly: {message}"
    next_calls = list(followed(message, arguments))
    assert next_calls, f"no advice to follow: {message}"
    for next_arguments in next_calls:
        check_advice(call, next_arguments, depth - 1)

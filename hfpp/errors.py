"""The one error class for configurations that cannot work."""

__all__ = ["PipelineConfigError"]


class PipelineConfigError(ValueError, AssertionError):
    """A pipeline configuration that cannot work.

    The message names the argument as the caller spelled it, its value, the rule it breaks and what
    to use instead. It is a ``ValueError`` and an ``AssertionError`` at once because code written
    against other pipeline libraries catches the one here and the other there.
    """

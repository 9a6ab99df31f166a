"""How a run ends early: errors whose message alone tells the user what is wrong."""

from hfpp.errors import PipelineConfigError

__all__ = ["OptionError", "TrainingError"]


class OptionError(PipelineConfigError):
    """An option of `hfpp train` that cannot work; the message names the option."""


class TrainingError(RuntimeError):
    """A run that started and cannot go on; the message needs no traceback."""

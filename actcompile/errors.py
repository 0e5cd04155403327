"""Errors: of the user's making, or found by a check; each names the rule, the value received and the remedy."""


class ConfigError(ValueError):
    """A setting that the compiler cannot follow."""


class CompileError(RuntimeError):
    """A machine or a graph that the compiler cannot work with."""


class GradientError(RuntimeError):
    """A gradient that is further from the exact one than what it was computed from explains (``Config.check``)."""

"""Errors of the user's making, each naming the rule, the value received and the remedy."""


class ConfigError(ValueError):
    """A setting that the compiler cannot follow."""


class CompileError(RuntimeError):
    """A machine or a graph that the compiler cannot work with."""

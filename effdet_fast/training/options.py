"""How an option of a training run is declared: once, for Python, the command line, the docs page and resumed runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

GROUPS = ("data", "model", "recipe", "device and speed", "run")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_0 = Rule("at least 0", lambda x: x >= 0)
AT_LEAST_1 = Rule("at least 1", lambda x: x >= 1)
ABOVE_0 = Rule("above 0", lambda x: x > 0)
SHARE = Rule("in [0, 1]", lambda x: 0 <= x <= 1)


def one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda x: x in values)


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of a field beside its type and default.

    Attributes:
        group: One of `GROUPS`.
        help: What it does; continues "--flag: ".
        default: The default in words, where the value does not say it.
        metavar: What stands for its values in the help.
        rule: What a value must be; None, where that is the default, always may be.
        fixed: Whether a resumed run keeps it: weights, optimizer state or order of the samples would not fit otherwise.
        negatable: Of a switch, whether there is a flag that switches it off.
    """

    group: str
    help: str
    default: str | None = None
    metavar: str | tuple[str, ...] | None = None
    rule: Rule | None = None
    fixed: bool = False
    negatable: bool = False

    def check(self, name: str, value: Any) -> None:
        """ValueError unless a run can have this value."""
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f"train: {name} must be finite, got {value!r}")
        if self.rule is not None and value is not None and not self.rule.holds(value):
            raise ValueError(f"train: {name} must be {self.rule.words}, got {value!r}")


def option(group: str, value: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass: `value` is its default, or makes it if it is a function; see `Option` for the rest."""
    metadata = {"option": Option(group, help, **more)}
    if callable(value):
        return dataclasses.field(default_factory=value, metadata=metadata)
    return dataclasses.field(default=value, metadata=metadata)


def options_of(config_class: Any) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(config_class)}


def default_in_words(field: dataclasses.Field) -> str:
    """What help and docs say of a default; empty if there is nothing to say."""
    option: Option = field.metadata["option"]
    if option.default is not None:
        return option.default
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, bool):
        return "yes" if value else "no" if option.negatable else ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def help_text(field: dataclasses.Field) -> str:
    """The help of a flag, or of an argument of the class."""
    text, default = field.metadata["option"].help, default_in_words(field)
    return f"{text} (default: {default})" if default else text


def docstring(config_class: Any) -> str:
    """The class's docstring with its options as arguments."""
    options = (f"    {field.name}: {help_text(field)}." for field in dataclasses.fields(config_class))
    return "\n".join([config_class.__doc__ or "", "", "Args:", *options, ""])

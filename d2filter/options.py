"""`option` declares the command-line option of a configuration field, beside the field.

The command line, the YAML file and `sweep` are derived from these declarations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Kind = Literal[
    "text", "texts", "repeated", "whole number", "number", "flag", "yes or no", "share",
    "auto or share", "auto or number", "copies", "bytes", "partitions",
]  # fmt: skip
"""how the text of a value is converted; `cli/values.py` has a function for each kind"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """The option of a field on the command line and in the YAML file."""

    help: str
    kind: Kind
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    without_value: Any = None
    """value if the option is given without a value; None: a value is required"""
    shown_default: Any = ...
    """default of the command line, if it differs from that of the field"""


def option(
    default: Any,
    help: str,
    kind: Kind = "text",
    *,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    without_value: Any = None,
    shown_default: Any = ...,
) -> Any:
    """A dataclass field with an `Option`. default: of the field; `...` if it has none."""
    declared = Option(
        help=help, kind=kind, choices=tuple(choices), metavar=metavar,
        without_value=without_value, shown_default=shown_default,
    )  # fmt: skip
    metadata = {"option": declared}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def options_in(part: Any) -> dict[str, tuple[Option, Any]]:
    """The options of a configuration class by field name, each with the field's default."""
    return {
        one.name: (one.metadata["option"], one.default)
        for one in fields(part)
        if "option" in one.metadata
    }

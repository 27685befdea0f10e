"""Parses a command line; values of `--config` and `--recipe` stand in for options not given."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from d2filter.cli.commands import Parser, build_parser
from d2filter.cli.recipes import RECIPES
from d2filter.errors import UsageError

_NOT_IN_A_FILE = ("help", "config", "recipe")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Options that are not given come from --config, then from --recipe.

    Raises UsageError.
    """
    words = [_dashed(word) for word in argv]
    parser, parser_of = build_parser()
    early = Parser(add_help=False)
    early.add_argument("command", nargs="?")
    early.add_argument("--config", default="")
    early.add_argument("--recipe", default="")
    early.add_argument("--budget", default=None)
    known, _ = early.parse_known_args(words)
    chosen = parser_of.get(known.command)
    if chosen is not None:
        if known.recipe:
            _apply_recipe(chosen, known.recipe, known.budget is not None)
        if known.config:
            _apply_config(chosen, known.config)
    if known.command is not None and chosen is None:
        nearest = _nearest(known.command, parser_of)
        raise UsageError(
            f"{known.command!r} is not a command{nearest}, allowed are {', '.join(parser_of)}"
        )
    # a misspelled option is named here, because argparse would first name required options
    options_of = chosen or parser
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if re.match("-+[a-z]", name) and name not in options_of._option_string_actions:
            nearest = _nearest(name, options_of._option_string_actions)
            options_of.error(f"unrecognized arguments: {word}{nearest}")
    return parser.parse_args(words)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelled name, for a message; empty if no known name is similar."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _dashed(word: str) -> str:
    """--out_dir=x → --out-dir=x: underscores and dashes in option names are the same."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _apply_recipe(command: argparse.ArgumentParser, name: str, with_budget: bool) -> None:
    """Make the values of a recipe the defaults of a command's options. with_budget: whether
    --budget is given, which replaces the recipe's fraction.
    """
    if name not in RECIPES:
        raise UsageError(f"recipe is {name!r}, allowed are {', '.join(RECIPES)}")
    for option, value in RECIPES[name].values.items():
        replaced = with_budget and option == "fraction"
        if not replaced and f"--{option}" in command._option_string_actions:
            command.set_defaults(**{option.replace("-", "_"): value})  # argparse converts texts


def _apply_config(command: argparse.ArgumentParser, path: str) -> None:
    """Make the values of a YAML file the defaults of a command's options."""
    import fsspec
    import yaml

    try:
        with fsspec.open(path, "rt", encoding="utf-8") as stream:
            values = yaml.safe_load(stream) or {}
    except FileNotFoundError as error:
        raise UsageError(f"--config {path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"--config {path} is not valid YAML: {text}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines")
    known = {action.dest: action for action in command._actions if action.option_strings}
    if values.get("budget") is not None and values.get("fraction") is None:
        command.set_defaults(fraction=None)  # the budget replaces the fraction of a recipe
    for name, value in values.items():
        action = known.get(str(name).replace("-", "_"))
        if action is None or action.dest in _NOT_IN_A_FILE:
            allowed = ", ".join(sorted(d for d in known if d not in _NOT_IN_A_FILE))
            nearest = _nearest(str(name).replace("-", "_"), known)
            raise UsageError(
                f"--config {path}: unknown option {name!r}{nearest}, allowed are {allowed}"
            )
        if value is None:
            continue  # `name:` without a value: not given
        command.set_defaults(**{action.dest: _from_yaml(action, value, f"--config {path}: {name}")})
        action.required = False


def _from_yaml(action: argparse.Action, value: Any, where: str) -> Any:
    """Convert a YAML value to the value that the command line would give. where: for messages."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {value!r}, allowed are true and false")
        return value
    many = action.nargs == "+" or isinstance(action.default, list)
    if isinstance(value, list | dict) and not (many and isinstance(value, list)):
        raise UsageError(f"{where} is {value!r}, allowed is one value")
    convert = action.type if callable(action.type) else str
    try:
        converted = [convert(str(v)) for v in (value if isinstance(value, list) else [value])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{where} is {value!r}: {error}") from error
    return converted if many else converted[0]

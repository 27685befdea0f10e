"""The documentation refers only to links, files, tests, commands, options and names that exist."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2filter.algorithm.methods import selectors
from d2filter.algorithm.scores import registry as scores
from d2filter.cli import commands as commands_of
from d2filter.cli import main as cli
from d2filter.cli import options, recipes
from jobs import run as named_runs

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
README_BYTES = 9_000

FENCE = re.compile(
    r"^(?P<ticks>`{3,}) *(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=ticks) *$", re.M | re.S
)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HTML_LINK = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.M)
OWN_FOLDERS = ("d2filter/", "jobs/", "tests/", "deploy/", "docker/", "docs/")
OWN_PATH = re.compile(rf"(?<![\w./:])(?:{'|'.join(OWN_FOLDERS)})[\w./*-]*")
TEST = re.compile(r"test_\w+")
OPTION = re.compile(r"--[a-z][a-z0-9-]*")
OTHER_PROGRAMS = {"--set", "--list"}
"""options that text names beside those of d2filter: of `python -m jobs.run`"""
LEFT_OUT = "…"


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text("utf-8")


@functools.cache
def prose_of(path: Path) -> str:
    """All but the fenced blocks."""
    return FENCE.sub("", text_of(path))


@functools.cache
def spans_of(path: Path) -> tuple[str, ...]:
    """What stands in backticks, outside of fenced blocks. In a table, \\| is a |."""
    found = (match[2] for match in SPAN.finditer(prose_of(path)))
    return tuple(" ".join(span.split()).replace("\\|", "|") for span in found)


def blocks_of(path: Path, *languages: str) -> Iterator[str]:
    for match in FENCE.finditer(text_of(path)):
        if match["language"] in languages:
            yield match["body"]


# links


@functools.cache
def anchors_of(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a file."""
    found: set[str] = set()
    for match in HEADING.finditer(prose_of(path)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
        shown = re.sub(r"[*`]|(?<!\w)_|_(?!\w)", "", shown).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        again, unique = 0, anchor
        while unique in found:
            again += 1
            unique = f"{anchor}-{again}"
        found.add(unique)
    return frozenset(found)


def links_of(path: Path) -> list[str]:
    without_code = SPAN.sub("", prose_of(path))
    # a link around code has lost only its text
    return [*LINK.findall(without_code), *HTML_LINK.findall(without_code)]


def broken_links(path: Path) -> list[str]:
    found = []
    for link in links_of(path):
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.I):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        is_inside = target.is_relative_to(ROOT)
        is_anchored = not anchor or (target.suffix == ".md" and target.is_file())
        if not (is_inside and target.exists() and is_anchored):
            found.append(link)
            continue
        if anchor and anchor not in anchors_of(target):
            found.append(link)
    return found


@pytest.mark.parametrize("name", [*NAMES, "deploy/README.md", "docker/README.md"])
def test_relative_links_and_anchors_exist(name: str) -> None:
    assert not broken_links(ROOT / name)


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `d2filter run`, **bold**: [link](x.md)!\n\n## Same\n## Same\n```\n# no\n```\n"
    )
    assert anchors_of(page) == {"a-d2filter-run-bold-link", "same", "same-1"}


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_code_exist(name: str) -> None:
    code = [
        *spans_of(ROOT / name),
        *(match["body"] for match in FENCE.finditer(text_of(ROOT / name))),
    ]
    paths = {path.rstrip(".") for text in code for path in OWN_PATH.findall(text)}
    assert not [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


@functools.cache
def known_tests() -> frozenset[str]:
    files = list((ROOT / "tests").rglob("test_*.py"))
    names = {file.name for file in files} | {file.stem for file in files}
    for file in files:
        names |= set(re.findall(r"^ *def (test_\w+)", text_of(file), re.M))
    return frozenset(names)


@pytest.mark.parametrize("name", NAMES)
def test_tests_in_backticks_exist(name: str) -> None:
    named = [span for span in spans_of(ROOT / name) if TEST.fullmatch(span.removesuffix(".py"))]
    assert not set(named) - known_tests()


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_benchmarks_link_all_results() -> None:
    linked = {Path(link).name for link in links_of(ROOT / "docs/benchmarks.md")}
    assert not {path.name for path in (ROOT / "jobs/results").glob("*.md")} - linked


# commands


@functools.cache
def commands() -> dict[str, argparse.ArgumentParser]:
    return commands_of.build_parser()[1]


@functools.cache
def known_options() -> frozenset[str]:
    actions = (action for command in commands().values() for action in command._actions)
    names = {name for action in actions for name in action.option_strings}
    return frozenset({name for name in names if name.startswith("--")} - {"--help"})


def command_lines(path: Path) -> Iterator[str]:
    """What a reader may type: lines of shell blocks, and code that begins like a command."""
    for block in blocks_of(path, "", "sh", "bash", "shell", "console"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from spans_of(path)


def commands_in(line: str) -> Iterator[tuple[str, list[str]]]:
    """The commands in a line: `d2filter` or `jobs.run`, and the words after it."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:
        return  # a line of text
    for part in _parts(words):
        if part[:1] == ["d2filter"]:
            yield "d2filter", part[1:]
        elif "jobs.run" in part and part[part.index("jobs.run") - 1] == "-m":
            yield "jobs.run", part[part.index("jobs.run") + 1 :]


def _parts(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in ("&&", "||", "|", ";"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


def trouble_of(words: list[str]) -> str:
    """Why d2filter would refuse these words; empty when it would not. A command that is only named,
    or of which something is left out (…), need not be complete.
    """
    if not words:
        return ""
    if words[0] not in commands() and not words[0].startswith("-"):
        return f"{words[0]} is no command"
    if words[1:] and LEFT_OUT not in words:
        try:
            arguments = cli.parse(words)
            if arguments.command in ("embed", "graph", "rank", "select", "run"):
                options.run_config(arguments)
        except SystemExit as ended:  # of --help
            return "" if ended.code == 0 else f"exit code {ended.code}"
        except Exception as error:
            return str(error)
    elif words[0] in commands():
        there = commands()[words[0]]._option_string_actions
        unknown = [word for word in words if OPTION.match(word) and word.split("=")[0] not in there]
        return f"{words[0]} has no {' '.join(unknown)}" if unknown else ""
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_accepted(name: str) -> None:
    troubles = {}
    for line in command_lines(ROOT / name):
        for program, words in commands_in(line):
            if program == "d2filter":
                why = trouble_of(words)
            elif LEFT_OUT in "".join(words):
                continue
            else:
                try:
                    given = named_runs.command_line(words)
                    why = trouble_of(given) if given else ""
                except Exception as error:
                    why = str(error) if words else ""
            if why:
                troubles[line.strip()] = why
    assert not troubles


def test_the_readme_shows_commands_to_type() -> None:
    lines = [words for line in command_lines(ROOT / "README.md") for _, words in commands_in(line)]
    assert ["demo"] in lines
    assert len([words for words in lines if len(words) > 1]) >= 10


def options_in(path: Path) -> set[str]:
    """Options that stand in backticks on their own, not in a command of another program."""
    found: set[str] = set()
    for span in spans_of(path):
        if span.startswith("--"):
            found |= {word.split("=")[0] for word in span.split() if OPTION.match(word)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_options_in_backticks_exist(name: str) -> None:
    assert not options_in(ROOT / name) - known_options() - OTHER_PROGRAMS - {"--version", "--help"}


def test_settings_has_every_option() -> None:
    tables = text_of(ROOT / "docs/settings.md").partition("## All options")[2]
    assert not known_options() - set(OPTION.findall(" ".join(re.findall(r"`[^`]+`", tables))))


def test_settings_has_every_command_recipe_score_and_method() -> None:
    code = set(spans_of(ROOT / "docs/settings.md"))
    assert not [n for n in commands() if n not in code and f"d2filter {n}" not in code]
    assert not {f"--recipe {name}" for name in recipes.RECIPES} - code
    assert not (set(scores.SCORES) | set(selectors.SELECTORS)) - code


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_settings_has_the_values_of_a_recipe(name: str) -> None:
    lines = text_of(ROOT / "docs/settings.md").splitlines()
    line = next(line for line in lines if f"`--recipe {name}`" in line and line.startswith("|"))
    words = SPAN.findall(line)[-1][1].split()
    given = ["run", "--out-dir", "out"]
    shown, set_by_recipe = cli.parse([*given, *words]), cli.parse([*given, "--recipe", name])
    # image|text is the default, and not shown
    assert {**vars(shown), "recipe": name} == vars(set_by_recipe)


# python


def unknown_names(source: str) -> list[str]:
    """Imports, and attributes of d2filter, that do not exist."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            is_ours = re.fullmatch(r"d2filter(\.\w+)+", dotted)
            wanted = [("d2filter", dotted.partition(".")[2])] if is_ours else []
        else:
            wanted = []
        found += [
            f"{module} {name}".strip() for module, name in wanted if not _is_there(module, name)
        ]
    return found


def _is_there(module: str, name: str) -> bool:
    try:
        place: Any = importlib.import_module(module)
    except ImportError:
        return False
    for part in name.split(".") if name else ():
        module = f"{module}.{part}"
        if not hasattr(place, part):
            try:
                place = importlib.import_module(module)
            except ImportError:
                return False
        else:
            place = getattr(place, part)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile_and_use_what_exists(name: str) -> None:
    for block in blocks_of(ROOT / name, "python", "py"):
        compile(block, name, "exec")
        assert not unknown_names(block)


@pytest.mark.parametrize("name", NAMES)
def test_python_in_backticks_uses_what_exists(name: str) -> None:
    unknown = []
    for span in spans_of(ROOT / name):
        if re.match(r"d2filter(\.\w+)+(\(|$)", span):
            unknown += unknown_names(span)
    assert not unknown

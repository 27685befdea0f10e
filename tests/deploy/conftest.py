"""Fixtures to check images and manifests: project file, version pins, and parsers of the commands
that they start.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from d2filter.cli import main as cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml, and `build`, its build requirements."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {**whole["project"], "build": whole["build-system"]["requires"]}


@pytest.fixture(scope="session")
def pins() -> dict[str, Version]:
    """Version of each package in constraints.txt."""
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.fixture(scope="session")
def ray_range(project: dict[str, Any]) -> Requirement:
    """What the project takes of Ray."""
    [ray] = [one for one in map(Requirement, project["dependencies"]) if one.name == "ray"]
    return ray


@pytest.fixture(scope="session")
def started_ray() -> Callable[[list[str]], dict[str, Any]]:
    """Options of a `ray start`, read by Ray; it raises for those that it does not know."""
    from ray.scripts.scripts import start

    return lambda words: dict(start.make_context("ray start", list(words)).params)


@pytest.fixture(scope="session")
def named_run() -> Callable[[str], str]:
    """Name of the run that a command line starts, read by the programs that would run it; they
    raise for names, options and values that do not exist.
    """
    from jobs.run import command_line

    def check(command: str) -> str:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "jobs.run"], command
        cli.parse(command_line(words[3:]))
        return words[3]

    return check

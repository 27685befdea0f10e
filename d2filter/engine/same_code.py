"""Makes sure that workers run the same d2filter as the driver, imported in the same way.

Ray puts the driver's current folder first in the import path of its workers. If a command starts
inside a clone, workers would import the clone instead of the installed package, or import a file
numba.py of that folder instead of the package numba. `import_path` removes this folder. Nodes may
also have another version installed, so `run_task` compares a hash of the sources with the driver's
before it runs a task.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import d2filter
from d2filter.errors import DependencyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The d2filter package that a process has imported."""

    version: str
    folder: str
    node: str
    digest: str
    """of names and contents of all .py files, 16 hex digits"""

    def __str__(self) -> str:
        return f"{self.version} at {self.folder} on {self.node} (sources {self.digest})"


@functools.cache
def own() -> Sources:
    """The d2filter of this process. Reads its sources once."""
    folder = Path(str(d2filter.__file__)).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return Sources(
        version=d2filter.__version__,
        folder=str(folder),
        node=platform.node(),
        digest=digest.hexdigest(),
    )


def require_same(driver: Sources) -> None:
    """Raise DependencyError if this process has another d2filter than the driver."""
    if own().digest != driver.digest:
        raise different(str(own()), driver)


def different(found: str, driver: Sources) -> DependencyError:
    """The error for a worker whose d2filter is `found`."""
    return DependencyError(
        f"a worker has another d2filter than this process: {found}; this one is {driver}: install "
        "one version on all nodes, or submit with --working-dir"
    )


def run_task(digest: str, call: bytes, *more: Any) -> Any:
    """Run a pickled (function, arguments) in a worker, if its d2filter has the digest of the
    driver's. Returns the function's result, or a string that describes the other d2filter.

    Ray sends this function by value (`by_value`), because another version of d2filter may lack it,
    or have another signature for the function in `call`.
    """
    import pickle
    import platform

    try:
        import d2filter
    except ImportError:
        return f"none on {platform.node()}"
    try:
        from d2filter.engine.same_code import own
    except ImportError:
        place = f"{d2filter.__file__} on {platform.node()}"
        return f"{getattr(d2filter, '__version__', 'no version')} at {place}"
    if own().digest != digest:
        return str(own())
    function, arguments = pickle.loads(call)
    return function(*arguments, *more)


def by_value(ray: Any, *modules: str) -> None:
    """Make Ray send the definitions of these modules by value, so that a worker need not import
    them.
    """
    for name in (__name__, *modules):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])


def import_path(added: Sequence[str]) -> list[str]:
    """The folders to keep of those that Ray adds to the import path of its workers.

    Ray adds the folder of the driver's script and the current one. A folder is kept if the driver
    has imported d2filter from it and it precedes the installed packages: a clone in which
    `python -m` runs, or a clone in PYTHONPATH.
    """
    mine = os.path.realpath(Path(str(d2filter.__file__)).parent.parent)
    installed = os.path.realpath(os.path.dirname(os.__file__))
    for entry in sys.path:
        folder = os.path.realpath(entry or os.curdir)
        if folder == installed:
            break
        if folder == mine:
            return [one for one in added if os.path.realpath(one) == mine]
    return []


def job_config(ray: Any) -> Any:
    """Ray's configuration of a job whose workers have the import path of `import_path`."""

    class Job(ray.job_config.JobConfig):  # type: ignore[misc]  # Ray has no types
        def _serialize(self) -> Any:
            # Ray has no option for this; it adds the folders just before it calls _serialize
            added = vars(self)["_py_driver_sys_path"]
            added[:] = import_path(added)
            return super()._serialize()

    return Job()

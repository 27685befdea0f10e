"""Functions compiled by numba, which is loaded at the first call only.

Importing numba takes longer than `d2filter --help` may take. The compiled code is cached if a cache
can be written, but does not need one. A compiled loop releases the interpreter lock and runs in one
thread; `threads.in_blocks` runs it in several. numba's own parallel loops are not used: they need
an OpenMP library that slim systems lack, and they end the process when two threads call them or
after a fork.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Inline = Literal["never", "always"]

_intrinsics: list[_Lazy] = []


def njit(*, fastmath: bool | set[str] = False, inline: Inline = "never") -> Callable[..., Any]:
    """`numba.njit` at the first call, with nogil, and cached where a folder can be written."""

    def make(function: Callable[..., Any]) -> Any:
        import numba

        for one in _intrinsics:  # numba looks for new ones when it begins to compile
            _ = one.made
        made: Any = numba.njit(nogil=True, fastmath=fastmath, inline=inline)(function)
        cache = _cache_of(function)
        if cache is not None:
            made._cache = cache
        return made

    return lambda function: _Lazy(function, make)


def intrinsic(function: Callable[..., Any]) -> Any:
    """`numba.extending.intrinsic` at the first use."""

    def make(function: Callable[..., Any]) -> Any:
        from numba import extending

        return extending.intrinsic(function)

    lazy = _Lazy(function, make)
    _intrinsics.append(lazy)
    return lazy


class _Lazy:
    """Stands for what numba makes of a function, for Python and in other compiled functions."""

    def __init__(
        self, function: Callable[..., Any], make: Callable[[Callable[..., Any]], Any]
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._make = make
        self._made: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._made or self.made)(*arguments)

    @property
    def made(self) -> Any:
        """What numba made; two threads that come first at once may both make one, which is one
        compilation lost.
        """
        if self._made is None:
            self._made = self._make(self._function)
        return self._made

    @property
    def _numba_type_(self) -> Any:
        """How numba sees it where another compiled function names it."""
        from numba.core.registry import cpu_target

        return cpu_target.typing_context.resolve_value_type(self.made)

    @property
    def targetoptions(self) -> Any:
        """numba reads here whether to inline."""
        return getattr(self.made, "targetoptions", None)

    @property
    def py_func(self) -> Any:
        """What it inlines."""
        return self._function


def _cache_of(function: Callable[..., Any]) -> Any:
    """numba's cache of a function: beside the package, in the user's cache, or in a folder of
    TMPDIR; None where none of them can be written.
    """
    import numba

    try:
        return _cache_class()(function)
    except RuntimeError:  # no place that can be written
        folder = _private_folder()
    if folder is None:
        return None
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]  # set at run time
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    try:
        return _cache_class()(function)
    except RuntimeError:
        return None
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


@functools.cache
def _cache_class() -> Any:
    from numba.core.caching import FunctionCache

    class Cache(FunctionCache):
        """A file that cannot be read or written costs a compilation, not the run."""

        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__(function)
            # a loop holds copies of those it calls, which may be in other files
            file = self._cache_file
            file._source_stamp = file._source_stamp, _sources()

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # whatever a torn file makes of unpickling
                self.flush()
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except OSError:  # a full disk, a folder that is gone
                self.disable()

        def flush(self) -> None:
            try:
                super().flush()
            except OSError:
                self.disable()

    return Cache


@functools.cache
def _sources() -> str:
    """Hash of the files that hold compiled loops."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _private_folder() -> str | None:
    """A folder of TMPDIR that only this user can write; None where there is none. numba unpickles
    what lies in a cache, so nobody else may put a file there.
    """
    try:
        folder = os.path.join(tempfile.gettempdir(), f"d2filter-numba-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if ours and not found.st_mode & 0o077 else None

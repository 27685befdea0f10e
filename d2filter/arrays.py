"""Converts tensors, data frames, Arrow columns and lists of rows to NumPy arrays.

None of these packages is imported; objects are recognized by their methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import InputError

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_NUMBERS = "fiub"  # kinds of dtypes: floats, integers, booleans
_EXACT = 2**24  # integers up to it are exact in float32
_STEPS = 2**16  # of float32 between the least and the largest score: fewer tell little apart


def modalities(given: Any) -> list[Array]:
    """One array (n, d) of numbers for each modality.

    given: a matrix, a list of rows, a column of rows, or a list of several such. Raises InputError
    for what is none of them.
    """
    if isinstance(given, list | tuple):
        if not given:
            raise InputError("embeddings is empty: pass an array (n, d), or several")
        first = array(given[0], "embeddings")
        if first.ndim >= 2:
            return [first, *(array(one, "embeddings") for one in given[1:])]
    return [array(given, "embeddings")]


def difficulty(given: Any) -> F32:
    """Scores as float32, (n,). Raises InputError, naming the first bad row, for what is not finite
    or too large for it, for integers that it would make equal, and for floats of which it tells too
    few apart.
    """
    scores = array(given, "scores")
    if scores.ndim != 1 or not scores.size:
        raise InputError(f"scores has shape {scores.shape}, expected (n,) with n of at least 1")
    with np.errstate(over="ignore"):
        narrow: F32 = scores.astype(np.float32)
    refuse(np.isinf(narrow) & np.isfinite(scores), "score is beyond ±3.4e38, the end of float32,")
    refuse(~np.isfinite(narrow), "score is not finite")
    _refuse_merged(scores, narrow)
    return narrow


def labels(given: Any) -> Array:
    """Labels of samples, of any type, (n,)."""
    if hasattr(given, "to_pylist"):
        given = given.to_pylist()
    elif hasattr(given, "to_numpy"):
        given = given.to_numpy()
    return _of_tensor(given) if hasattr(given, "detach") else np.asarray(given)


def array(given: Any, name: str) -> Array:
    """An array of numbers, without a copy where it is one already."""
    try:
        found = _array(given)
        if found.dtype.kind == "O":
            found = _of_objects(found)
        if found.dtype.kind == "V":
            found = found.astype(np.float32)  # bfloat16 and the like, of packages beside NumPy
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is a {type(given).__name__} and cannot become an array of numbers ({text}): "
            "pass a NumPy array"
        ) from error
    if found.dtype.kind not in _NUMBERS:
        raise InputError(f"{name} has dtype {found.dtype}, expected real numbers")
    return found


def refuse(bad: Any, what: str) -> None:
    """Raise InputError, with the first of them, where some rows are bad."""
    rows = np.flatnonzero(bad)
    if rows.size:
        raise InputError(
            f"{what} in {rows.size} rows, first in row {rows[0]}: drop or mend them first"
        )


def _array(given: Any) -> Array:
    if isinstance(given, np.ma.MaskedArray):
        if np.ma.getmaskarray(given).any():
            raise InputError("some values are masked: fill them in, or drop their rows")
        return np.asarray(given.data)
    if isinstance(given, np.ndarray):
        return given
    if hasattr(given, "detach"):
        return _of_tensor(given)
    if hasattr(given, "to_pylist") and hasattr(given, "null_count"):
        return _of_arrow(given)
    if hasattr(given, "to_numpy"):  # a column or a frame
        return np.asarray(given.to_numpy())
    if isinstance(given, list | tuple) and any(_converted(one) for one in given):
        return _stacked([_array(one) for one in given])
    if isinstance(given, list | tuple) and given and hasattr(given[0], "__len__"):
        return _stacked(given)
    return np.asarray(given)


def _converted(one: Any) -> bool:
    return hasattr(one, "detach") or hasattr(one, "to_pylist") or hasattr(one, "to_numpy")


def _of_tensor(tensor: Any) -> Array:
    """torch: out of the graph, off the GPU, bfloat16 as float32, which holds it exactly."""
    tensor = tensor.detach().cpu()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:  # NumPy has no such type
        if tensor.is_sparse:
            raise
        return np.asarray(tensor.float().numpy())


def _of_arrow(column: Any) -> Array:
    """An Arrow column of numbers, or of lists of one length."""
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    if hasattr(column, "chunks"):  # of no chunk, or of one that holds the rest
        column = column.chunk(0)
    if not hasattr(column, "flatten"):  # no lists
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if column.null_count:
        missing = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise InputError(f"{missing.size} rows are missing, the first is row {missing[0]}")
    flat = _of_arrow(column.flatten())
    return flat.reshape(len(column), _one_length(column.value_lengths().to_numpy()))


def _of_objects(found: Array) -> Array:
    """A column of arrays, or of Python's numbers."""
    if found.ndim == 1 and found.size and hasattr(found[0], "__len__"):
        return _stacked([_array(one) for one in found])
    values = np.array(found.tolist())  # which finds the type of plain numbers
    if values.dtype.kind != "O":
        return values
    large = [x for x in found.ravel() if isinstance(x, int)]
    if any(not -(2**63) <= x < 2**64 for x in large):
        raise InputError("some integers need more than 64 bits: pass floats, which round them")
    return found.astype(np.float64)


def _stacked(rows: Sequence[Any]) -> Array:
    parts = [np.asarray(row) for row in rows]
    for at, part in enumerate(parts):
        if part.ndim != parts[0].ndim:
            raise InputError(f"row {at} has shape {part.shape}, row 0 has {parts[0].shape}")
    if parts[0].ndim:
        _one_length(np.array([len(part) for part in parts]))
    return np.array(parts)


def _one_length(lengths: npt.NDArray[np.integer]) -> int:
    odd = np.flatnonzero(lengths != lengths[:1])
    if odd.size:
        raise InputError(f"row {odd[0]} has length {lengths[odd[0]]}, row 0 has {lengths[0]}")
    return int(lengths[0]) if lengths.size else 0


def _refuse_merged(scores: Array, narrow: F32) -> None:
    """float32 holds the scores of a ranking, on disk too. What it rounds a little may be ranked;
    integers stay apart, and so do floats where it has few values in their range.
    """
    if scores.dtype.kind == "b" or np.can_cast(scores.dtype, np.float32):
        return
    least, largest = scores.min(), scores.max()
    size = max(abs(least.item()), abs(largest.item()))
    whole = scores.dtype.kind in "iu"
    span = largest.item() - least.item()
    if size <= _EXACT if whole else span >= _STEPS * float(np.spacing(np.float32(size))):
        return
    order = np.argsort(scores, kind="stable")
    same = (narrow[order[1:]] == narrow[order[:-1]]) & (scores[order[1:]] != scores[order[:-1]])
    if not same.any():
        return
    at = int(np.argmax(same))
    one, other = order[at], order[at + 1]
    cure = "pass scores - scores.min()"
    if whole and span > _EXACT:
        cure = "divide them, or pass floats, which round them"
    raise InputError(
        f"scores {scores[one]} and {scores[other]} in rows {one} and {other} become the same "
        f"float32 value: {cure}"
    )

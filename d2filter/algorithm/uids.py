"""Order and hashes of uids, which are held as two uint64 arrays.

A uid is the integer `hi·2⁶⁴ + lo`. Samples that train the centroids or measure the recall are
chosen by a hash of the uid, so that the layout of files cannot change the choice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# one purpose, one salt: samples drawn for different purposes are independent
SALT_TRAIN = 1
SALT_CALIBRATE = 2
SALT_MEASURE = 3
SALT_RANDOM_BASELINE = 4
SALT_BATCH = 5
SALT_STRATUM = 6
SALT_SEMDEDUP = 7
SALT_PROTOTYPES = 8
SALT_HELD_OUT = 9
SALT_SHUFFLE = 10
SALT_REPORT = 11
SALT_CLASS = 12
SALT_TUNING = 13
SALT_PAIRS = 14
SALT_JOIN = 15
SALT_SOFT = 16
SALT_DENSITY = 17
SALT_SELFCHECK = 18


def ascending(hi: U64, lo: U64) -> I64:
    """Row numbers, shape (n,) int64, that sort the uids ascending."""
    return np.lexsort((lo, hi)).astype(np.int64, copy=False)


def repeats(hi: U64, lo: U64) -> npt.NDArray[np.bool_]:
    """Which uids equal the one before them, shape (n,) bool. Equal uids must be adjacent."""
    out = np.zeros(hi.size, np.bool_)
    out[1:] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
    return out


def falls(hi: U64, lo: U64) -> npt.NDArray[np.bool_]:
    """Which uids are smaller than the one before them, shape (n,) bool."""
    out = np.zeros(hi.size, np.bool_)
    out[1:] = (hi[1:] < hi[:-1]) | ((hi[1:] == hi[:-1]) & (lo[1:] < lo[:-1]))
    return out


def hashed(hi: U64, lo: U64, *, salt: int, seed: int = 0) -> U64:
    """A 64-bit hash per uid, shape (n,) uint64: SplitMix64's finalizer over both halves.

    Equal uids hash equally wherever they lie; `salt` and `seed` give independent hashes.
    """
    start = (seed * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03) % 2**64
    return _finalize(_finalize(hi ^ np.uint64(start)) + lo)


def hash_sample(hi: U64, lo: U64, size: int, *, salt: int, seed: int = 0) -> I64:
    """Up to `size` row numbers with the smallest hashes, in ascending order of uid, int64.

    Ties of the hash go to the smaller uid, so the chosen uids depend on the set of uids alone.
    """
    key = hashed(hi, lo, salt=salt, seed=seed)
    if size >= key.size:
        return ascending(hi, lo)
    bound = np.partition(key, size - 1)[size - 1] if size > 0 else np.uint64(0)
    rows = np.flatnonzero(key <= bound)
    rows = rows[np.lexsort((lo[rows], hi[rows], key[rows]))][:size]
    return rows[ascending(hi[rows], lo[rows])]


def positions(hi: U64, lo: U64, wanted_hi: U64, wanted_lo: U64) -> I64:
    """Row of each wanted uid among ascending distinct uids, int64; −1 where it is missing."""
    low = np.zeros(wanted_hi.size, np.int64)
    high = np.full(wanted_hi.size, hi.size, np.int64)
    for _ in range(hi.size.bit_length()):  # binary search for all at once
        middle = np.minimum((low + high) // 2, max(0, hi.size - 1))
        less = (hi[middle] < wanted_hi) | ((hi[middle] == wanted_hi) & (lo[middle] < wanted_lo))
        less &= low < high
        low = np.where(less, middle + 1, low)
        high = np.where(less, high, np.minimum(high, middle))
    there = np.flatnonzero(low < hi.size)
    same = (hi[low[there]] == wanted_hi[there]) & (lo[low[there]] == wanted_lo[there])
    found = np.full(wanted_hi.size, -1, np.int64)
    found[there[same]] = low[there[same]]
    return found


BUCKET_ROWS = 256  # on average: two pages of memory
_BUCKET_BITS = 20


def buckets(pairs: U64) -> tuple[I64, int]:
    """Where ascending (n, 2) pairs of hi and lo start for each value of the first bits of hi:
    (2^bits + 1,) int64, and 64 − bits. A search among millions of pairs then reads few pages of
    memory.
    """
    bits = min(_BUCKET_BITS, max(1, (len(pairs) // BUCKET_ROWS).bit_length()))
    return _bucket_starts(pairs, bits), 64 - bits


@compiled.njit()
def _bucket_starts(pairs, bits):  # type: ignore[no-untyped-def]  # compiled by numba
    starts = np.full(2**bits + 1, pairs.shape[0], np.int64)
    low = 0
    for b in range(2**bits):
        first = np.uint64(b) << np.uint64(64 - bits)
        high = pairs.shape[0]
        while low < high:
            middle = (low + high) // 2
            if pairs[middle, 0] < first:
                low = middle + 1
            else:
                high = middle
        starts[b] = low
    return starts


@compiled.njit()
def occurrences(pairs, starts, shift, digits):  # type: ignore[no-untyped-def]
    """How often a uid, given as 32 lowercase hex digits in bytes, occurs in ascending (n, 2) uint64
    pairs of hi and lo; −1 if it is not 32 such digits.

    starts, shift: the `buckets` of the pairs. The digits are parsed here, because parsing them in
    Python would take as long as everything else.
    """
    hi, lo = np.uint64(0), np.uint64(0)
    if len(digits) != 32:
        return -1
    for i in range(32):
        c = digits[i]
        if 48 <= c <= 57:
            digit = c - 48
        elif 97 <= c <= 102:
            digit = c - 87
        else:
            return -1
        hi = (hi << np.uint64(4)) | (lo >> np.uint64(60))
        lo = (lo << np.uint64(4)) | np.uint64(digit)
    bucket = np.int64(hi >> np.uint64(shift))
    low, high = starts[bucket], starts[bucket + 1]
    while low < high:
        middle = (low + high) // 2
        a = pairs[middle, 0]
        if a < hi or (a == hi and pairs[middle, 1] < lo):
            low = middle + 1
        else:
            high = middle
    count = 0
    while low + count < pairs.shape[0] and (
        pairs[low + count, 0] == hi and pairs[low + count, 1] == lo
    ):
        count += 1
    return count


def _finalize(x: U64) -> U64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: U64 = x ^ (x >> np.uint64(31))
    return mixed

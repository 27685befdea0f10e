"""Named runs. Each function returns a whole run; `--list` prints its docstring.

A run is a command of d2filter with options. The memory figures below follow from the code:

- Features of a sample, image|text of ViT-L-14: 2 × 768 float16, 3,072 bytes.
- Graph: a task holds for each row of its partition (`stages/graph/build.py`, `_partitions`) the
  features, a sketch of 2 bytes per axis, 200 bytes for copies and cells, and 32 bytes for each of
  the 32 places of its shortlist. A sketch has at most half as many axes as the features (768), so
  this is 3,072 + 1,536 + 200 + 1,024 = 5,832 bytes at most; with 160 of 512 axes, as measured on
  synthetic rows (jobs/results/bench_memory.md), it is less.
- Libraries take 0.45 GB of a worker. Half of the rest is for rows, the other half for products,
  arrow's buffers and copies. So partitions = rows × 5,832 / ((memory − 0.45 GB) / 2). Measured at
  1 GB: 105,663 rows of 512 dimensions in the largest partition, peak 0.83 GB.
- Training holds 16 rows per cell, of 4·√n cells, 131,072 at most: 0.7 GB for 12.8M samples, 2.2 GB
  for 128M, 6.4 GB for 1.28B.
- The ranking holds about 85 bytes per sample, for all partitions at once, spread over the nodes,
  and reads about 100 more from mapped files (jobs/results/bench_rank_large.md, 128M samples). With
  edges in memory it holds about 240: 0.2 GB, 0.3 GB and 0.7 GB per partition with the partitions
  below.
- OUT needs space for the features (3,072 bytes per sample) and for the rows that are sent to
  partitions: each row goes to 2.8 of 19 partitions (bench_memory.md); 5 is assumed for more
  partitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from d2filter import config
from d2filter.cli import options
from d2filter.cli.parser import parse
from d2filter.errors import UsageError

_LISTS = ("shards", "feature-keys")  # options that take several values, parted by spaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A command of d2filter with its options."""

    command: str
    """run, demo, …"""
    options: dict[str, str]
    """values by the names of the command line, without dashes in front"""
    needs: tuple[str, ...] = ("out-dir",)
    """options that only the user can know"""

    def words(self, name: str, given: dict[str, str]) -> list[str]:
        """The command line, `given` in place of what is set here. Raises UsageError that names, in
        one line, all that is needed and not given.
        """
        chosen = {**self.options, **given}
        missing = [need for need in self.needs if not chosen.get(need)]
        if missing:
            raise UsageError(
                f"{name} needs {' and '.join(missing)}: add --set "
                + " ".join(f"{need}=…" for need in missing)
            )
        words = [self.command]
        for option, value in chosen.items():
            if value in ("true", "false"):
                words.append(f"--{option}" if value == "true" else f"--no-{option}")
            elif option in _LISTS:
                words += [f"--{option}", *value.split()]
            else:
                words.append(f"--{option}={value}")
        return words

    def configuration(self, name: str, given: dict[str, str]) -> config.RunConfig:
        """What the stages get. Raises UsageError as the command line does."""
        return options.run_config(parse(self.words(name, given)))


def datacomp_small() -> Run:
    """DataComp small, 12.8M pairs: metadata to subset as published, in 20 workers of 8 GB."""
    # 12.8e6 × 5,832 B = 75 GB; a worker of 8 GB has (8 − 0.45) / 2 = 3.8 GB for rows: 20 of them.
    # OUT: 39 GB of features, 0.1 to 0.2 TB on their way to partitions. One node will do: tasks take
    # turns, as many at a time as its memory holds.
    return _datacomp(partitions=20, memory="8GB")


def datacomp_medium() -> Run:
    """DataComp medium, 128M pairs: metadata to subset as published, in 100 workers of 16 GB."""
    # 128e6 × 5,832 B = 746 GB; (16 − 0.45) / 2 = 7.8 GB for rows: 97. OUT: 0.4 TB of features,
    # 2 TB on their way. Ray hands out some 70% of a node's memory: four nodes of 256 GB take three
    # turns.
    return _datacomp(partitions=100, memory="16GB")


def datacomp_large() -> Run:
    """DataComp large, 1.28B pairs: metadata to subset as published, in 480 workers of 32 GB."""
    # 1.28e9 × 5,832 B = 7.5 TB; (32 − 0.45) / 2 = 15.8 GB for rows: 480. OUT: 3.9 TB of features,
    # 20 TB on their way. The ranking alone needs 110 GB over all nodes, and twice that from files
    # that should stay in their page caches. 16 nodes of 512 GB take three turns.
    return _datacomp(partitions=480, memory="32GB")


def shards_to_subset() -> Run:
    """Shards to subset: embedded with OpenAI's ViT-L-14, on GPUs where there are any."""
    # Partitions are left to the size of the pool. A model of 428M float32 weights takes 1.7 GB, and
    # twice that while it is loaded; `embed` measures it and asks for as much.
    # open_clip downloads the weights on each node; elsewhere --set pretrained=/shared/weights.pt
    return Run(
        command="run",
        options={
            "recipe": "datacomp", "model": "ViT-L-14", "pretrained": "openai",
            "batch-size": "256",
        },
        needs=("shards", "out-dir"),
    )  # fmt: skip


def demo() -> Run:
    """Drawn pairs with planted truth, filtered and compared: does this cluster work?"""
    return Run(command="demo", options={})


def _datacomp(*, partitions: int, memory: str) -> Run:
    """k=1, gamma=1, image|text, 30% kept, difficulty from the column of ViT-L-14."""
    return Run(
        command="run",
        options={
            "recipe": "datacomp", "arch": "l14", "partitions": str(partitions),
            "memory-per-worker": memory,
        },
        needs=("metadata-dir", "out-dir"),
    )  # fmt: skip


RUNS: dict[str, Callable[[], Run]] = {
    run.__name__: run
    for run in (datacomp_small, datacomp_medium, datacomp_large, shards_to_subset, demo)
}

"""Recipes and named runs: values of options under a name.

A recipe (`--recipe NAME`) sets options that suit one kind of pool. A named run
(`python -m jobs.run NAME`) is a command with a recipe and with values for a cluster. Names and
values are those of the command line, without dashes in front. Options that the user gives take
precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Values of options for one situation."""

    summary: str
    """the situation, for the help"""
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRun:
    """A command of d2filter with values of its options."""

    summary: str
    """one sentence, for `--list`"""
    command: str
    """run, demo, …"""
    recipe: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    """options beside those of the recipe; `true` and `false` for options without a value"""
    needs: tuple[str, ...] = ("out-dir",)
    """options that only the user can know"""


RECIPES = {
    "datacomp": Recipe(
        summary="as published for DataComp",
        values={
            "feature-type": "image|text",
            "n-neighbors": "1",
            "gamma": "1.0",
            "kernel": "rbf",
            "collapse-copies": "none",
            "fraction": "0.3",
        },
    ),
    # the best setting of jobs/results/gamma_rules.md
    "web": Recipe(
        summary="image-text pairs from the web, with settings fitted to the pool and the budget",
        values={
            "feature-type": "image|text",
            "n-neighbors": "10",
            "gamma": "auto",
            "kernel": "local",
            "collapse-copies": "auto",
            "fraction": "0.3",
        },
    ),
    # the best setting of jobs/results/bench_cifar_cuda.md and bench_supervised.md
    "labels": Recipe(
        summary="samples with classes, with or without wrong labels, and a score that puts hard "
        "samples first",
        values={
            "n-neighbors": "10",
            "gamma": "auto",
            "kernel": "rbf",
            "collapse-copies": "none",
            "cut-hardest": "auto",
        },
    ),
    "text": Recipe(
        summary="texts with classes, if few are kept",
        values={
            "n-neighbors": "10",
            "gamma": "0.1",
            "kernel": "rbf",
            "gamma-scale": "median",
            "collapse-copies": "none",
            "cut-hardest": "0.2",
        },
    ),
}

# the stages derive the number of partitions from --memory-per-worker (algorithm/sizes.py)
RUNS = {
    "datacomp_small": NamedRun(
        summary="DataComp small, 12.8M pairs: metadata to subset as published, in workers of 8 GB.",
        command="run",
        recipe="datacomp",
        values={"arch": "l14", "memory-per-worker": "8GB"},
        needs=("metadata-dir", "out-dir"),
    ),
    "datacomp_medium": NamedRun(
        summary="DataComp medium, 128M pairs: metadata to subset as published, in workers of "
        "16 GB.",
        command="run",
        recipe="datacomp",
        values={"arch": "l14", "memory-per-worker": "16GB"},
        needs=("metadata-dir", "out-dir"),
    ),
    "datacomp_large": NamedRun(
        summary="DataComp large, 1.28B pairs: metadata to subset as published, in workers of "
        "32 GB.",
        command="run",
        recipe="datacomp",
        values={"arch": "l14", "memory-per-worker": "32GB"},
        needs=("metadata-dir", "out-dir"),
    ),
    # open_clip downloads the weights on each node; elsewhere --set pretrained=/shared/weights.pt
    "shards_to_subset": NamedRun(
        summary="Shards to subset: embedded with OpenAI's ViT-L-14, on GPUs where there are any.",
        command="run",
        recipe="datacomp",
        values={"model": "ViT-L-14", "pretrained": "openai", "batch-size": "256"},
        needs=("shards", "out-dir"),
    ),
    "demo": NamedRun(
        summary="Drawn pairs with planted truth, filtered and compared: does this cluster work?",
        command="demo",
    ),
}

"""The algorithms: arrays in, arrays out. No Ray, no files, no clock, no torch.

Features and neighbors (docs/method.md#features-and-distances and the sections after it)
features.py   the float16 vectors of samples, exact distances, groups of exact copies
sketch.py     short projections of features that propose neighbors
cells.py      centroids on two levels, and which cells a sample probes
search.py     exact neighbors within cells: one matrix product per cell
backend.py    matrix products on CPU or GPU; loads faiss
shortlist.py  the nearest samples by sketch, from which exact distances choose
lists.py      exact neighbor lists: from proposals, in ring order, merged
calibrate.py  how many cells to probe, and whether to refine, for a target recall
refine.py     compares samples with the neighbors of their neighbors
partition.py  assigns cells to partitions, and samples to the partitions that compare them
sizes.py      memory per sample, and the number of partitions that follows from it
knn.py        all these steps for a pool in memory; measured recall

Ranking (docs/method.md#d2-pruning)
messages.py   fixed-point scores, edge weights, the sum of the forward pass
schemes.py    kernels, forward rules and reverse rules, each an entry of a table
local.py      the kernel `local`: distances relative to those around both ends
greedy.py     the exact parallel greedy on one graph in memory
supersteps.py the same in one partition of several: states in, states out
bestfirst.py  its compiled inner loop
cut.py        edges between partitions, and the graph that each partition works on
share.py      the ranking of one partition, from its rows to its final scores
merge.py      the global order from the scores of all partitions
ranking.py    the whole ranking in memory
certificate.py proves that a ranking is the one of the sequential greedy
budget.py     budgets as prefixes of a ranking

Before and after the ranking
scores.py     difficulty from embeddings, and the table of all scores
dynamics.py   difficulty from a training log
terms.py      scores that are sums of other scores
spread.py     whether scaling makes scores equal, and where to clip them
settling.py   settings that depend on the whole pool, in order
tuning.py     automatic gamma; pairs.py: the share of wrong pairs that it needs
hardest.py    automatic share of the hardest samples to cut
copies.py     automatic distance of near-copies
late.py       demoted samples: the hardest ones and near-copies
groups.py     classes: neighbors inside each, and a share of every budget for each
soft.py       repeats of samples by score
quantile.py   exact quantiles of values that lie in several parts

Other methods and measures
selectors.py  the table of other ranking methods; pool.py: what they get
baselines.py, geometric.py, density.py, submodular.py: these methods
metrics.py    quality of a ranking if the truth is known
coverage.py, distinct.py  what a subset covers, without knowing the truth
selfcheck.py  how many wrong pairs a setting keeps, measured with swapped captions

Tools for the others
uids.py       order and hashes of uids
threads.py, compiled.py  threads; functions compiled by numba
intervals.py  confidence intervals
"""

import os

# faiss and numba bring an OpenMP pool each and take turns many times a second. By default the
# threads of the pool that waits spin on the cores that the other one needs: a search by cell on two
# cores took four times as long. OpenMP reads this when it is loaded, so it is set before both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

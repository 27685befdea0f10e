"""Arrays in, arrays out: no Ray, no files, no clock, no torch.

features.py  what a sample is: fixed float16 rows, exact distances, groups of copies
cells.py     centroids on two levels, exact choice of cells
sketch.py    short rows, projections, that propose neighbors
search.py    exact neighbors within chosen cells: one matrix product a cell
shortlist.py the nearest by sketch, of which exact distances choose
lists.py     exact lists in ring order from what the products proposed; merging lists
backend.py   threads, products on a CPU or a GPU
calibrate.py how many cells to probe, and whether to refine, for a recall
refine.py    neighbors of neighbors
partition.py cells to partitions, rows to where they must be compared
sizes.py     memory of rows, and the partitions that it makes
knn.py       all these steps for a pool in memory; measured recall
messages.py  fixed-point scores, edge weights, sums over neighbors
schemes.py   message schemes: kernels, forward and reverse rules, each a table entry
supersteps.py the exact parallel greedy in one partition: states in, states out
bestfirst.py  its compiled part: the queue, and what is checked before a sample is final
cut.py       what partitions of a graph must tell each other
share.py     the whole program of one partition of a ranking
merge.py     the global order from the partitions' scores
greedy.py    the greedy over lists in one piece
budget.py    how many, and which: budgets as prefixes of one ranking
ranking.py   a ranking in one partition, in memory
certificate.py  proof that a ranking is the greedy's
late.py      what ranks after everything else: the hardest, copies; the unit of distances
quantile.py  the k-th smallest of a pool in parts
spread.py    whether scaling leaves scores apart, where a clip cuts them
groups.py    classes: edges inside, budgets for each
scores.py    difficulty from embeddings, and the table of all scores
dynamics.py  difficulty from a training log
selectors.py other methods, each a ranking of the pool; baselines.py: the two simplest
submodular.py facility location and graph cut on a sparse graph
metrics.py   how good a ranking is where the truth is known
coverage.py  what a subset covers and keeps, without any truth
uids.py      order and hashes of 128-bit sample ids
"""

import os

# faiss and numba bring an OpenMP pool each and take turns many times a second. By default the
# threads of the pool that waits spin on the cores that the other one needs: a search by cell on two
# cores took four times as long. OpenMP reads this when it is loaded, so it is set before both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""The nearest neighbors of every sample (docs/method.md#exact-search and the sections after it).

in_memory.py   all the steps below for a pool in memory; measured recall
sketch.py      short projections of features that propose neighbors
cells.py       centroids on two levels, and which cells a sample probes
search.py      exact neighbors within cells: one matrix product per cell
products.py    matrix products on CPU or GPU; loads faiss
shortlist.py   the nearest samples by sketch, from which exact distances choose
exact_lists.py exact neighbor lists: from proposals, in ring order, merged
calibrate.py   how many cells to probe, and whether to refine, for a target recall
refine.py      compares samples with the neighbors of their neighbors
partition.py   assigns cells to partitions, and samples to the partitions that compare them
"""

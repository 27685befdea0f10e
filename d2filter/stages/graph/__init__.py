"""Catalog → graph/: the nearest neighbors of every sample.

build.py      the order of the tasks, and the memory of each
train.py      sketches, centroids, the cells of every sample
calibrate.py  how to search, from exact neighbors of a few samples
route.py      sends samples to the partitions that compare them
search.py     searches, merges, refines and measures
by_class.py   the same for samples with classes
"""

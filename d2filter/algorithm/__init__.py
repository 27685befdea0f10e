"""The algorithms: arrays in, arrays out. No Ray, no files, no clock, no torch.

knn/          the nearest neighbors of every sample
greedy/       D2: weights, messages, the exact parallel greedy, automatic settings
scores/       scores that can be a sample's difficulty
methods/      other selection methods, to compare D2 with
measures/     how good a subset is

features.py   the float16 vectors of samples, exact distances, groups of exact copies
by_class.py   classes: neighbors inside each, and a share of every budget for each
budget.py     budgets as prefixes of a ranking
soft.py       repeats of samples by score
sizes.py      bytes of samples in each stage; partitions and memory that follow from them
quantile.py   exact quantiles of values that lie in several parts
uids.py       order and hashes of uids
threads.py    threads of a process; compiled.py: functions compiled by numba
"""

import os

# faiss and numba bring an OpenMP pool each and take turns many times a second. By default the
# threads of the pool that waits spin on the cores that the other one needs: a search by cell on two
# cores took four times as long. OpenMP reads this when it is loaded, so it is set before both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""D2 Pruning (docs/method.md#d2-pruning): from a graph and difficulties to a ranking.

in_memory.py     the whole ranking in memory
messages.py      fixed-point scores, edge weights, the sum of the forward pass
schemes.py       kernels, forward rules and reverse rules, each an entry of a table
local_kernel.py  the kernel `local`: distances relative to those around both ends
supersteps.py    the exact parallel greedy in a partition: states in, states out
best_first.py    its compiled inner loop
halo.py          edges between partitions, and the graph that each partition works on
ranker.py        the ranking of one partition, from its rows to its final scores
merge.py         the global order from the scores of all partitions
certificate.py   proves that a ranking is the one of the sequential greedy

Settings that depend on the whole pool
auto_settings.py all of them, in order
auto_gamma.py    gamma, for `--gamma auto`
auto_cut.py      the share of the hardest samples to cut, for `--cut-hardest auto`
near_copies.py   the distance of near-copies, for `--collapse-copies auto`
demoted.py       which samples rank last: the hardest ones and near-copies
"""

"""The selection methods that D2 is compared with.

selectors.py   the table of all methods; pool.py: what a method may look at
baselines.py   random and score alone
geometric.py   moderate, k-center, herding, SemDeDup
submodular.py  facility location, graph cut, InfoMax
density.py     density-based pruning
"""

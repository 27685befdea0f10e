"""The stages of a run. Ray lives here and nowhere else; stages meet only through files.

runner.py     fan-out on Ray, progress, failures
pipeline.py   which stages run, which are there already, what is recorded
embed.py      shards → metadata
catalog.py    metadata → valid, distinct samples
index.py      samples → centroids and the number of probes
neighbors.py  samples + index → kNN graph, measured recall
rank.py       graph → ranking
select.py     ranking → subset.npy, kept/
"""

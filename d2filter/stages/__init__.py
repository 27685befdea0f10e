"""The stages of a run, on Ray. Stages exchange data through files only.

How stages and tasks are run
pipeline.py   runs the stages of a command, skips finished ones, records results
plans.py      the planned options and inputs of each stage
runner.py     starts Ray and runs the tasks of a stage
fanout.py     submits tasks to Ray, retries lost ones; hands.py: processes that keep a GPU
worker.py     runs one task in a worker and writes its completion marker
shared.py     checks that all nodes see one run directory
sources.py    checks that all workers have the same d2filter
progress.py, metrics.py  progress bar; figures for Prometheus

The stages
embed.py      shards → metadata; pictures.py: decoding images
catalog.py    metadata → valid, distinct samples; outside.py, score.py, spread.py: its scores
graph.py      catalog → graph: index.py, choosing.py, route.py, neighbors.py are its steps
grouped.py    the same for samples with classes
rank.py       graph → ranking: late.py and supersteps.py are its steps
others.py     the same for other methods than D2
select.py     ranking → subset.npy and kept/; soft.py: with repeats

Reshard
reshard.py    shards + subset → new shards: wanted.py, placing.py, fill.py are its steps
"""

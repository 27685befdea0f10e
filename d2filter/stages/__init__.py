"""The stages of a run. They exchange data through files only.

pipeline.py  runs the stages of a command, skips finished ones, records results
plans.py     the planned options and inputs of each stage

embed.py     shards → metadata; decode.py: images
catalog/     metadata → valid, distinct samples with their scores
graph/       catalog → the neighbors of every sample
rank/        graph → ranking
select.py    ranking → subset.npy and kept/; select_soft.py: with repeats
reshard/     shards + subset → new shards
"""

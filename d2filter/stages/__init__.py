"""The stages of a run. They exchange data through files only.

pipeline.py  runs the stages of a command, skips finished ones, records results
stage.py     the base class of a stage
registry.py  the stages as objects: plan, build, line for people

embed.py     shards → metadata; decode.py: images
catalog/     metadata → valid, distinct samples with their scores
graph/       catalog → the neighbors of every sample
rank/        graph → ranking
select.py    ranking → subset.npy and kept/; select_soft.py: with repeats
reshard/     shards + subset → new shards
"""

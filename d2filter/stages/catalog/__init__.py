"""Metadata → catalog: valid, distinct samples with their scores.

plan.py         options and input files
build.py        the stage and its tasks
side_inputs.py  prepares target sets, training logs and score files for the tasks
pool_scores.py  scores that depend on the whole pool
clip_scores.py  checks that scaled scores stay apart, and clips outliers
"""

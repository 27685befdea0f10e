"""Scores that can be a sample's difficulty.

registry.py           the table of all scores; those that embeddings give
training_dynamics.py  scores from a training log
terms.py              scores that are sums of other scores
clipping.py           whether scaling makes scores equal, and where to clip them
mismatched.py         the share of pairs that match no better than random ones
"""

"""How good a subset is.

distinct.py      coverage of distinct groups, near-copies counted once
coverage.py      distances to what is kept, shares kept by score and density
selfcheck.py     how many wrong pairs a setting keeps, measured with swapped captions
ground_truth.py  quality of a ranking if the truth is known
intervals.py     confidence intervals
"""

"""Models that embed images and captions.

clip.py  open_clip's factory, transforms and tokenizers
tiny/    the bundled model: config, weights, measured quality
"""

BUNDLED_MODEL = "d2filter-tiny"

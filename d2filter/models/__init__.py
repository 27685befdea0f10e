"""Models that embed.

clip.py  open_clip's factory, transforms and tokenizers
tiny/    the bundled model: config, weights, how good it is
"""

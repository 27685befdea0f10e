"""Whole runs by name, for `ray job submit`, and the programs that measure them."""

"""Named runs for `ray job submit`, and the benchmarks."""

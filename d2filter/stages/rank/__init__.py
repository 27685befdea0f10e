"""Graph → ranking/: the order in which samples are kept.

build.py          the order of the tasks; edges between partitions; the global order
auto_settings.py  settings that depend on the whole pool
actors.py         the greedy in partitions: actors that exchange states
in_memory.py      other methods than D2
"""

"""Graph → ranking/: the order in which samples are kept.

plan.py             options, and the methods and settings that a pool allows
build.py            the order of the tasks; edges between partitions; the global order
auto_settings.py    settings that depend on the whole pool
actors.py           the greedy in partitions: the driver calls actors that exchange states
partition_actor.py  an actor: a process that holds some partitions
in_memory.py        other methods than D2
"""

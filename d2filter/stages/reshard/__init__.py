"""Shards and a subset → new shards of the kept samples.

build.py   the command and its tasks
match.py   which samples of the input shards are wanted
layout.py  which sample goes into which new shard
write.py   writes a new shard
"""

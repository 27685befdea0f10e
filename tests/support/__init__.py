"""What several test modules use.

Input
    pools.py            small pools of metadata
    shard_files.py      small shards, whole and broken
    kept_pools.py       shards with a run directory that keeps some of their samples, without a run
    graph_strategies.py random graphs and scores with many ties, for hypothesis

Running and reading
    runs.py             runs a command in this process; reads a run directory
    processes.py        processes of this machine: parents, titles, which of them run tasks

The truth to compare with
    oracle.py                the definitions of docs/method.md as naive Python
    greedy_in_one_piece.py   the parallel greedy on a whole graph in memory

Faults
    faults.py           kills workers, actors, nodes and drivers of a run
    kill_points.py      kills a process before it renames or removes a file
    ray_nodes.py        a Ray cluster of two machines, each with its own network and files
    flaky_proxy.py      breaks connections to an object store
    web_server.py       a web server that misbehaves
"""

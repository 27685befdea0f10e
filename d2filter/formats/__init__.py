"""What lies on disk, one module a format (docs/files.md).

paths.py       folders on local disks and fsspec URLs; atomic publication
addresses.py   paths, URLs with queries, names of files that are called after others
remote.py      file systems behind a network: ranges, lengths, versions; patience.py, web.py
logs.py        logs/
uid.py         32 hex digits ↔ two uint64
metadata.py    DataComp parquet + npz pairs, read and written
columns.py     columns of tables that others made
shardlist.py   which shards some patterns name (braces.py), and their names in a run
webdataset.py  samples of tar shards (tarindex.py; filetype.py: what was given instead)
catalog.py     valid, distinct samples with fixed features
graph.py       kNN graph parts
ranking.py     ranking parts
subset.py      subset.npy and kept/
ledger.py      bad_samples.parquet
runstate.py    config.json, stats.json, completions/
"""

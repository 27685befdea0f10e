"""What lies on disk, one module a format (DESIGN §6).

paths.py       folders on local disks and fsspec URLs; atomic publication
uid.py         32 hex digits ↔ two uint64
metadata.py    DataComp parquet + npz pairs, read and written
columns.py     columns of tables that others made
webdataset.py  samples of tar shards
catalog.py     valid, distinct samples with fixed features
graph.py       kNN graph parts
ranking.py     ranking parts
subset.py      subset.npy and kept/
ledger.py      bad_samples.parquet
runstate.py    config.json, stats.json, completions/
"""

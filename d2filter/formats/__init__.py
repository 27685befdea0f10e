"""Files on disk, one module per format. docs/files.md lists all files with their schemas.

Storage
paths.py       folders on local disks and fsspec URLs; atomic publication of files
addresses.py   paths, URLs and file names
remote.py      file systems behind a network; retry.py: retries; web.py: web servers
lock.py        one writer per run directory
rows.py        arrays in numbered .npy files; sparse.py: a few rows of parquet parts

Input
uid.py         uids as 32 hex digits and as two uint64
metadata.py    DataComp's pairs of parquet and npz; npz.py, columns.py: untrusted arrays and columns
scored.py      the score of each row; content_hash.py: hash of a file's content
side_inputs.py inputs beside the metadata: scorefile.py, traininglog.py; join_table.py: joins
shardlist.py   shards by patterns (braces.py); shardnames.py: shards of a run by URL
webdataset.py  samples of tar shards; tarindex.py: their members; filetype.py: by first bytes
loader_samples.py  samples of webdataset's loader

Run directory
catalog.py, graph.py, ranking.py   parts of the catalog, the graph, the ranking
subset.py, kept.py                 subset.npy and kept/
ledger.py                          bad_samples.parquet
runstate.py                        config.json, stats.json, completions/
logs.py                            logs/

tables.py      reading parquet, with clear errors; parquet_footer.py: sizes of its columns
tarwriter.py   new shards
"""

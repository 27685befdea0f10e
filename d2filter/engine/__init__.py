"""Runs the tasks of stages on Ray. No other package starts Ray.

stage_run.py      runs the tasks of one stage: skips finished ones, adds up what they took
runner.py         starts or joins Ray, decides CPUs, GPUs and memory of a task
fanout.py         submits tasks to Ray, retries lost ones
task.py           runs one task in a worker and writes its completion marker
gpu_workers.py    processes that keep a GPU and its model between tasks
shared_folder.py  checks that all nodes see one run directory
same_code.py      checks that all workers have the same d2filter
progress.py       progress bar; prometheus.py: figures for Prometheus
"""

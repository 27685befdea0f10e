"""`python -m d2filter` is the command line."""

from d2filter.cli import entry

entry()

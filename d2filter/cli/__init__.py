"""The command line.

main.py      the entry point: runs a command, reports a failure in one line and an exit code
parser.py    parses a command line; --config and --recipe
commands.py  the commands: their options, and what they call
options.py   options in groups, from the fields of the configuration
values.py    texts of values, converted
recipes.py   recipes and named runs: values of options under a name
printing.py  printed lines, without secrets and control characters
"""

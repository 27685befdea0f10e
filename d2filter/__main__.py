"""`python -m d2filter` is the command line."""

import os
import sys

# `-m` puts the current folder before all others: a numba.py there would be taken for the package
if (
    not getattr(sys.flags, "safe_path", False)
    and sys.path[:1] == [os.getcwd()]
    and not os.path.samefile(sys.path[0], os.path.join(os.path.dirname(__file__), os.pardir))
):
    del sys.path[0]

from d2filter.cli.main import entry

entry()

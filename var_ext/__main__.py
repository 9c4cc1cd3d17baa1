"""`python -m var_ext`: what was built, on which chip it runs, and which backend each op has.

`python -m var_ext sample ...` is `var-ext sample ...`, for launchers such as torchrun that start modules.
"""

import sys

from var_ext.cli import main
from var_ext.info import describe_installation

if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(prog_name="var-ext")
    else:
        print(describe_installation())

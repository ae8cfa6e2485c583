"""`python -m benchmarks.flat`: the command of run/flat.py."""

import sys

from wavlm_fast.benchmarks.run.flat import main

if __name__ == "__main__":
    sys.exit(main())

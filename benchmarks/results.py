"""`python -m benchmarks.results`: the command of page/results.py."""

import sys

from wavlm_fast.benchmarks.page.results import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.tasks`: the command of ops/tasks.py."""

import sys

from wavlm_fast.benchmarks.ops.tasks import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu_step`: the command of gpu/step.py."""

import sys

from wavlm_fast.benchmarks.gpu.step import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu_fp32`: the command of gpu/fp32.py."""

import sys

from wavlm_fast.benchmarks.gpu.fp32 import main

if __name__ == "__main__":
    sys.exit(main())

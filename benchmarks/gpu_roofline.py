"""`python -m benchmarks.gpu_roofline`: the command of gpu/roofline.py."""

import sys

from wavlm_fast.benchmarks.gpu.roofline import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu_static`: the command of gpu/static.py."""

import sys

from wavlm_fast.benchmarks.gpu.static import main

if __name__ == "__main__":
    sys.exit(main())

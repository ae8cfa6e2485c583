"""`python -m benchmarks.gpu_bytes`: the command of gpu/bytes.py."""

import sys

from wavlm_fast.benchmarks.gpu.bytes import main

if __name__ == "__main__":
    sys.exit(main())

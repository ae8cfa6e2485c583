"""`python -m benchmarks` and `make bench`."""

import sys

from wavlm_fast.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))

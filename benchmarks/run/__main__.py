"""The process that fresh.py starts; `python -m benchmarks` runs the suite."""

from .fresh import main

main()

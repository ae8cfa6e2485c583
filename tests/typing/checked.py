"""What a checker of types says of usage.py and wrong.py, and what it should."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = HERE / "usage.py", HERE / "wrong.py"
REFUSED = re.compile(r"# refused: ([a-z-]+)$")


def wanted():
    """Line of wrong.py -> the code of mypy's error."""
    lines = FILES[1].read_text().splitlines()
    return {number: found[1] for number, line in enumerate(lines, 1) if (found := REFUSED.search(line))}

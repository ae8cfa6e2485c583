"""How docs/ is built: `make docs`. Nothing is fetched, neither here nor by the pages.

The sources are read from the root of the checkout, so that links mean the same here as where Markdown is looked at.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

import wavlm_fast  # noqa: E402

project = "wavlm-fast"
author = "the authors of wavlm-fast"
release = version = wavlm_fast.__version__

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "docs/**.md", "examples/*.md"]
exclude_patterns = ["build", "dist", "results", ".*", "*.egg-info", "wavlm_fast", "tests", "csrc", "kernels"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]

myst_heading_anchors = 4  # as GitHub makes them
myst_enable_extensions = ["attrs_inline"]

smartquotes = False  # which would make a dash of --option
default_role = "code"  # docstrings are written with single backticks
nitpicky = True
nitpick_ignore_regex = [  # what others document
    ("py:(class|exc|obj)", r"(torch|transformers|numpy|collections|argparse|pathlib)\..*"),
    ("py:class", r"wavlm_fast\.\w+\.Module"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "wavlm-fast"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_extra_path = ["entry"]  # a page that leads to docs/index
pygments_style, pygments_dark_style = "tango", "monokai"

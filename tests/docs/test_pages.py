"""Every block of Python and of shell lines that the README and docs/ show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_blocks import ROOT, PageError, blocks, named, pages, shell_lines

PAGES = [page for page in pages() if re.search(r"^\s*```(python|sh)\b", page.read_text(encoding="utf-8"), re.MULTILINE)]
MAKEFILE = ROOT.joinpath("Makefile").read_text()
TARGETS = {target for line in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE) for target in line.split()}
EXTRAS = re.findall(
    r"^(\w+) = ", ROOT.joinpath("pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.MULTILINE
)


@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_runs(page: Path, place) -> None:
    ran = place.run(page)
    assert ran.status == 0, f"{ran.out[-2000:]}\n{ran.err[-6000:]}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_not_run_is_there(page: Path) -> None:
    for line in (line for block in blocks(page) if block.kind == "sh" for line in shell_lines(block)):
        for program, *words in line.commands:
            where = f"{named(page)}:{line.number}"
            if program == "make":
                asked = [word for word in words if not word.startswith("-") and "=" not in word]
                assert set(asked) <= TARGETS, f"{where}: the Makefile has no such target: make {' '.join(asked)}"
            for extras in re.findall(r"(?:wavlm-fast|\.)\[([\w,]+)\]", " ".join(words)):
                assert set(extras.split(",")) <= set(EXTRAS), f"{where}: pyproject.toml has no such extra: {extras}"


def _page(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


GOOD = """# A page

<!-- given
import torch
waveform = torch.zeros(1, 16000)
-->
```python
from transformers import AutoModel

model = AutoModel.from_pretrained("microsoft/wavlm-base-plus-sv")
shape = tuple(model(waveform).last_hidden_state.shape)
```

```sh
pip install something-that-is-not-there && make nothing   # is not run
wavlm-fast extract corpus/ --model microsoft/wavlm-large --layer 2 \\
    --out feats/
test $(ls feats/*/*.npy | wc -l) = 3 && far=away
```

- In a list:

  ```python
  from pathlib import Path
  Path("written.txt").write_text(f"{shape} {Path('feats/manifest.jsonl').exists()}")
  ```

<!-- not run: it is no Python -->
```python
of course not
```

```{note}
Directives hold blocks too.

    ```python
    is no block
    ```

```sh
cat written.txt
```
```
"""


@pytest.mark.xdist_group("pages")
def test_a_page_runs_in_order_in_one_namespace_and_folder(tmp_path, place) -> None:
    ran = place.run(_page(tmp_path, GOOD.replace("```{note}", "````{note}").removesuffix("```\n") + "````\n"))
    assert ran.status == 0, ran
    assert ran.out.endswith("(1, 49, 32) True"), ran


@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# T\n\n```python\nok = 1\nmissing()\n```\n", ":5: NameError: name 'missing' is not defined"),
        ("# T\n\n```python\nok = 1\nno python\n```\n", ":5: SyntaxError"),
        ("# T\n\n```python\nraise SystemExit(3)\n```\n", ":4: the block ended Python with 3"),
        ("# T\n\n<!-- given\nx = 1\ny = x + z\n-->\n", ":5: NameError"),
        ("# T\n\n```sh\ntrue\n\n# more\nfalse\ntrue\n```\n", ":7: ended with status 1"),
        ("# T\n\n```sh\ntrue &&\nls there-is-none\n```\n", ":4: ended with status 2"),
        ("# T\n\n```sh\nwavlm-fast doctor --out there\n```\n", "wavlm-fast: unrecognized arguments: --out there"),
        ("# T\n\n```sh\nWAVLM_FAST_BACKEND=none wavlm-fast doctor\n```\n", "WAVLM_FAST_BACKEND"),
    ],
)
def test_what_fails_is_named_by_its_line(tmp_path, place, text, said) -> None:
    ran = place.run(_page(tmp_path, text))
    assert ran.status == 1
    assert said in ran.err, ran.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- not run -->\n```sh\nls\n```\n", ":1: why a block is not run is missing"),
        ("<!-- not run: slow -->\n\nText.\n\n```sh\nls\n```\n", ':1: "not run" stands directly in front of a block'),
        ("Text.\n\n<!-- not run: slow -->\n", ':3: "not run" stands in front of nothing'),
        ("```bash\nls\n```\n", ":1: a fence is one of python, sh, text"),
        ("```{code-block} python\nx\n```\n", ":1: a fence is one of python, sh, text"),
    ],
)
def test_a_block_that_would_never_run_is_refused(tmp_path, text, said) -> None:
    with pytest.raises(PageError, match=re.escape(said)):
        blocks(_page(tmp_path, text))


def test_commands_are_told_apart(tmp_path) -> None:
    page = _page(tmp_path, "```sh\nA=1 wavlm-fast doctor > log 2>&1 | grep -v 'a; b' # why\nPYTHON=x make docs\n```\n")
    first, second = shell_lines(blocks(page)[0])
    assert first.commands == [["wavlm-fast", "doctor"], ["grep", "-v", "a; b"]]
    assert not first.left_out
    assert (second.commands, second.left_out) == ([["make", "docs"]], True)

"""One table in its three forms, and figures as the text of its cells."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wavlm_fast import console

from .document import Row, number

if TYPE_CHECKING:
    from rich.console import Console

NONE = "-"
_GB = 1e9


@dataclass
class Table:
    """Cells of text under a title, and remarks below."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    text: int = 1  # how many columns at the left are text
    remarks: list[str] = field(default_factory=list)

    def show(self, out: Console) -> None:
        """Print it."""
        from rich.markup import escape

        shown = console.table(*map(escape, self.columns), text=self.text)
        for row in self.rows:
            shown.add_row(*map(escape, row))
        console.print_table(out, escape(self.title), shown)
        for remark in self.remarks:
            out.print(remark, markup=False, soft_wrap=True)
        if self.remarks:
            out.print()

    def markdown(self) -> str:
        """As a Markdown table after its title."""
        rule = ["---" if i < self.text else "---:" for i in range(len(self.columns))]
        lines = [self.columns, *self.rows]
        head, *body = (" | ".join(map(in_markdown, cells)) for cells in lines)
        parts = [in_markdown(self.title), "".join(f"| {line} |\n" for line in (head, " | ".join(rule), *body))]
        remarks = "".join(f"- {in_markdown(remark)}\n" for remark in self.remarks)
        return "\n\n".join(filter(None, (parts[0], parts[1].strip(), remarks.strip()))) + "\n"

    def plain(self) -> str:
        """As text in columns, for where no library draws tables."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        sides = ["<" if i < self.text else ">" for i in range(len(self.columns))]
        cells = ([f"{c:{side}{w}}" for c, side, w in zip(line, sides, widths, strict=True)] for line in lines)
        shown = [self.title, *("  ".join(line).rstrip() for line in cells), *(f"- {r}" for r in self.remarks)]
        return "\n".join(shown) + "\n"

    def html(self) -> str:
        """As an HTML table with its caption."""
        kinds = ["" if i < self.text else ' class="n"' for i in range(len(self.columns))]
        heads = zip(kinds, map(html.escape, self.columns), strict=True)
        head = "".join(f'<th scope="col"{kind}>{name}</th>' if name else "<td></td>" for kind, name in heads)
        body = "".join(f"<tr>{self._cells(row, kinds)}</tr>\n" for row in self.rows)
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in self.remarks)
        below = f'\n<ul class="remarks">{remarks}</ul>' if remarks else ""
        made = f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
        return f'<div class="wide">{made}{below}</div>\n'

    @staticmethod
    def _cells(row: Sequence[str], kinds: Sequence[str]) -> str:
        first, *others = map(html.escape, row)
        cells = (f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        return f'<th scope="row">{first}</th>{"".join(cells)}'

    def without_empty_columns(self) -> Table:
        """The same without the figures that no row has."""
        cells = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        kept = [i for i in range(len(self.columns)) if i < self.text or any(c not in ("", NONE) for c in cells[i])]
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        return Table(self.title, tuple(self.columns[i] for i in kept), rows, self.text, self.remarks)


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


# Figures as text; whatever is no finite number is NONE.


def figure(value: Any, write: Callable[[float], str]) -> str:
    return NONE if number(value) is None else write(value)


def digits(value: float) -> str:
    """With four significant digits, more where that takes no point."""
    if abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.{min(3, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def as_error(value: Any) -> str:
    return figure(value, "{:.1e}".format)


def as_share(value: Any) -> str:
    return figure(value, lambda share: f"{100 * share:.0f} %")


def as_gb(value: Any) -> str:
    return figure(value, lambda size: f"{size / _GB:.2f}")


def spread(timing: Row | None, write: Callable[[float], str]) -> str:
    ends = [number((timing or {}).get(name)) for name in ("p10", "p90")]
    return NONE if None in ends else "-".join(map(write, ends))

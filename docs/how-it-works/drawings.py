"""`python docs/how-it-works/drawings.py`: writes the drawings of this folder, which tests/docs hold equal to it.

They are plain SVG, text as text, on paper of their own, which is dark where the reader's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path

_STYLE = """
svg{--ink:#23211d;--pale:#66615a;--paper:#fcfbf8;--edge:#d9d5cc;--box:#ffffff;--line:#7a756c;
--a:#cfe1f2;--b:#f6dcc0;--c:#d3e8cc;--d:#e8d7ec;--e:#f3cdca;--f:#e6e3dc}
@media (prefers-color-scheme:dark){svg{--ink:#ece9e2;--pale:#c4bfb5;--paper:#1d1e20;--edge:#3c3d40;--box:#292a2d;
--line:#9a958c;--a:#234767;--b:#6b4418;--c:#2d5527;--d:#543a5c;--e:#6b302c;--f:#3a3b3e}}
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.pale{fill:var(--pale);font-size:11.5px}.bold{font-weight:600}
.code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.file{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:var(--pale)}
.paper{fill:var(--paper);stroke:var(--edge)}.box{fill:var(--box)}.none{fill:none}
.a{fill:var(--a)}.b{fill:var(--b)}.c{fill:var(--c)}.d{fill:var(--d)}.e{fill:var(--e)}.f{fill:var(--f)}
rect,circle{stroke:var(--line)}.line{stroke:var(--line);stroke-width:1.4;fill:none}.dashed{stroke-dasharray:5 4}
.head{fill:var(--line)}
""".replace("\n", "")

_CLASSES = {"*": "bold", "`": "code", "~": "pale", "^": "file"}  # of a line, by its first letter
_DRAWINGS: dict[str, Callable[[], str]] = {}


class Drawing:
    """What is drawn, piece by piece."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
            f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>'
        ]

    def rect(self, x: float, y: float, width: float, height: float, kind: str = "box", round_: float = 0) -> None:
        """A rectangle of a class of the style."""
        corner = f' rx="{round_}"' if round_ else ""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corner}/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text, its baseline at y."""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text{kind} x="{x:g}" y="{y:g}"{place}>{escape(text, quote=False)}</text>')

    def box(self, x: float, y: float, width: float, height: float, lines: str, kind: str = "box") -> None:
        """A box with lines in its middle, each of a class by its first letter."""
        self.rect(x, y, width, height, kind, 5)
        texts = lines.split("\n")
        top = y + height / 2 - 16 * (len(texts) - 1) / 2 + 4.5
        for i, text in enumerate(texts):
            of = _CLASSES.get(text[0], "")
            self.text(x + width / 2, top + 16 * i, text[1:] if of else text, of, "middle")

    def path(self, d: str, kind: str = "", arrow: bool = True) -> None:
        """A line along an SVG path, with a head at its end."""
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<path class="{f"line {kind}".strip()}" d="{d}"{head}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, kind: str = "") -> None:
        """A straight one."""
        self.path(f"M{x:g} {y:g}L{to_x:g} {to_y:g}", kind)

    def svg(self) -> str:
        """The file."""
        return "\n".join((*self.parts, "</svg>\n"))


def _drawn(name: str, title: str, width: int, height: int) -> Callable[[Callable[[Drawing], None]], None]:
    def register(draw: Callable[[Drawing], None]) -> None:
        def made() -> str:
            drawing = Drawing(title, width, height)
            draw(drawing)
            return drawing.svg()

        _DRAWINGS[name] = made

    return register


@_drawn("path", "The path of a call from a model to a kernel", 720, 470)
def _path(d: Drawing) -> None:
    stations = (
        ("model", "a", "as its users know it; swap.py gave its modules other classes", "families/transformers.py"),
        ("module", "a", "which op runs on which submodules: a step", "modules/attention.py"),
        ("op", "b", "the contract: schema, checks, gradient, a line of torch", "ops/gated_attention.py"),
        ("chooser", "b", "asks one backend after the other: why not you?", "backends/__init__.py"),
    )
    for i, (name, kind, what, file) in enumerate(stations):
        y = 20 + 78 * i
        d.box(24, y, 110, 48, f"*{name}", kind)
        d.text(150, y + 20, what)
        d.text(150, y + 38, file, "file")
        if i < 3:
            d.arrow(79, y + 48, 79, y + 78)
    d.box(560, 98, 136, 48, "the module's own\nforward", "f")
    d.path("M490 122L560 122", "dashed")
    d.text(628, 164, "hook, adapter, patch:", "pale", "middle")
    d.text(628, 179, "it is called, not fused", "pale", "middle")
    d.box(560, 254, 136, 48, "report(model)\nsays the sentence", "f")
    d.path("M490 278L560 278", "dashed")
    backends = (
        (24, "triton", "c", "GPUs, by Triton kernels", "kernels/gated_attention.py"),
        (262, "cpu", "c", "C++, oneDNN through torch", "csrc/gated_attention*.cpp"),
        (500, "reference", "d", "plain torch, any device", "ops/gated_attention.py"),
    )
    d.path("M79 302L79 345L598 345", arrow=False)
    for x, name, kind, what, file in backends:
        d.arrow(x + 98, 345, x + 98, 366)
        d.box(x, 366, 196, 80, f"*{name}\n{what}\n^{file}", kind)


def _buckets(distance: int) -> str:
    """Of a toy model: the distances 0, 1 and 2 or more, in both directions."""
    return {0: "f", 1: "a", 2: "c", -1: "b", -2: "d"}[max(-2, min(2, distance))]


@_drawn("position-bias", "A Toeplitz bias is one vector, and each row of it is a window of that vector", 720, 330)
def _position_bias(d: Drawing) -> None:
    T, size = 7, 26
    d.text(24, 30, "bias of one head, [T, T]", "bold")
    for i in range(T):
        for j in range(T):
            d.rect(44 + size * j, 60 + size * i, size, size, _buckets(j - i))
        d.text(36, 78 + size * i, str(i), "pale", "end")
        d.text(57 + size * i, 54, str(i), "pale", "middle")
    d.text(24, 262, "Equal along every diagonal: entry i, j", "pale")
    d.text(24, 278, "depends on j − i alone. One colour is", "pale")
    d.text(24, 294, "one bucket, one row of the table.", "pale")
    x, y, size = 300, 60, 30
    d.text(x, 30, "kept: rel_bias[h], one vector of 2T − 1", "bold")
    for n in range(2 * T - 1):
        d.rect(x + size * n, y, size, size, _buckets(n - T + 1))
        d.text(x + size * n + 15, y - 6, str(n - T + 1), "pale", "middle")
    for i, at, begin in ((1, 112, 5), (5, 156, 1)):
        left = x + size * (T - 1 - i)
        d.path(f"M{left + 2} {at}l0 7l{size * T - 4} 0l0 -7", arrow=False)
        d.text(left + size * T / 2, at + 23, f"row {i}: entries {begin} to {begin + T - 1}", "", "middle")
    d.text(x, 216, "score of query i and key j", "bold")
    d.box(x, 230, 150, 44, "`q[i]·k[j]·scale", "f")
    d.text(x + 157, 257, "+")
    d.box(x + 173, 230, 70, 44, "`gate[i]", "e")
    d.text(x + 249, 257, "·")
    d.box(x + 258, 230, 142, 44, "`rel_bias[j−i+T−1]", "a")
    d.text(x, 298, "The gate is one number per frame and head, so a row of the", "pale")
    d.text(x, 314, "gated bias is never stored either: one multiply-add per score.", "pale")


@_drawn("group-norm", "The statistics of a convolution's output follow from the windows of its input", 720, 400)
def _group_norm(d: Drawing) -> None:
    d.text(24, 30, "as it is written", "bold")
    stations = ("waveform", "a"), ("y [T, C]", "e"), ("mean, variance", "f"), ("out [T, C]", "c")
    for i, (text, kind) in enumerate(stations):
        d.box(24 + 176 * i, 46, 128, 40, text, kind)
    steps = ("convolution", "written"), ("over time", "read"), ("norm, activation", "read again")
    for i, (over, under) in enumerate(steps):
        d.arrow(152 + 176 * i, 66, 200 + 176 * i, 66)
        d.text(176 + 176 * i, 104, under, "pale", "middle")
        d.text(176 + 176 * i, 40, over, "pale", "middle")
    d.text(24, 150, "from the Gram matrix", "bold")
    points = []
    for n in range(0, 241, 4):
        points.append(f"{24 + n} {196 + 15 * math.sin(n / 9) * math.sin(n / 47 + 0.4):.1f}")
    d.path("M" + "L".join(points), "", False)
    for t in range(5):
        d.rect(24 + 30 * t, 220 + 9 * t, 60, 7, "a")
    d.text(196, 232, "windows x_t of K = 10", "pale")
    d.text(196, 248, "samples, 5 apart", "pale")
    d.box(24, 300, 150, 74, "`m = mean x_t\n`G = mean x_t x_tᵀ\n~10 + 100 numbers", "f")
    d.arrow(84, 268, 84, 300)
    d.box(216, 300, 216, 74, "`mean_c = w_c · m\n`var_c = w_cᵀ (G − m mᵀ) w_c\n~for each channel c", "f")
    d.arrow(174, 337, 216, 337)
    d.box(492, 300, 204, 74, "gain, offset for each c\n~known before any frame", "b")
    d.arrow(432, 337, 492, 337)
    d.box(492, 176, 204, 64, "convolution, norm and\nactivation in one pass", "c")
    d.arrow(594, 300, 594, 240)
    d.path("M264 190L492 190")
    d.text(378, 182, "the waveform once more", "pale", "middle")
    d.text(594, 166, "y is never in memory", "pale", "middle")


@_drawn("positional-conv", "A block of frames is convolved by transforms along time", 720, 420)
def _positional_conv(d: Drawing) -> None:
    d.text(24, 28, "one group: 48 channels in, 48 out, K = 128 taps, blocks of P = 128 frames", "bold")
    for n, kind in enumerate(("f", "f", "f", "f", "f")):
        d.rect(24 + 134 * n, 44, 134, 26, kind)
        d.text(91 + 134 * n, 62, f"block {n}", "pale", "middle")
    d.rect(292, 44, 134, 26, "c")
    d.text(359, 62, "block 2", "", "middle")
    d.path("M225 76L225 84L493 84L493 76", "", False)
    d.text(359, 100, "the 2P = 256 frames that its taps meet, from K / 2 before it", "pale", "middle")
    d.box(24, 126, 190, 62, "*fold\n`z[n] = x[n] + i x[n+P]\n~P complex numbers", "a")
    d.path("M225 84L119 84L119 126")
    d.box(264, 126, 190, 62, "*transform\nz at the P roots of\n`t^P = i", "a")
    d.arrow(214, 157, 264, 157)
    d.box(504, 126, 190, 62, "*at each root\n`[rows, 48] × [48, 48]\n~complex, filters conjugated", "b")
    d.arrow(454, 157, 504, 157)
    d.box(504, 226, 190, 62, "*transform back\nthe real part of z is\nthe block's P frames", "a")
    d.arrow(599, 188, 599, 226)
    d.box(264, 226, 190, 62, "*bias, GELU, + x\n~written once", "c")
    d.arrow(504, 257, 454, 257)
    d.box(24, 226, 190, 62, "*spectra of the filters\n~once per weight,\n~while it does not learn", "f")
    d.path("M119 226L119 207L560 207L560 188", "dashed")
    d.text(24, 322, "products for each frame of a block and each pair of channels", "bold")
    d.rect(24, 336, 512, 20, "e")
    d.text(546, 351, "K = 128, tap by tap")
    d.rect(24, 366, 16, 20, "c")
    d.text(50, 381, "4: a complex product at each of P roots; and the transforms, for each channel, not each pair")


@_drawn("minimal-filtering", "Three outputs of a convolution, three taps, stride two, in seven products", 720, 400)
def _minimal_filtering(d: Drawing) -> None:
    names = ("e0", "o0", "e1", "o1", "e2", "o2", "e3")
    d.text(24, 28, "directly: nine products for three frames", "bold")
    for n, name in enumerate(names):
        d.box(24 + 42 * n, 46, 34, 28, f"`{name}", "b" if name[0] == "o" else "a")
    for t in range(3):
        x = 66 + 84 * t
        d.box(x - 3, 128, 40, 28, f"`y{t}", "c")
        for k in range(3):
            d.path(f"M{41 + 84 * t + 42 * k} 74L{x + 17} 128", "", False)
    d.text(24, 184, "even rows e meet the taps w0 and w2,", "pale")
    d.text(24, 200, "odd rows o meet the tap w1.", "pale")
    d.text(372, 28, "in seven", "bold")
    products = (
        ("o0", "w1", "b"), ("o1", "w1", "b"), ("o2", "w1", "b"), ("e0 − e2", "w0", "a"), ("e3 − e1", "w2", "a"),
        ("e1 + e2", "(w0 + w2) / 2", "d"), ("e2 − e1", "(w0 − w2) / 2", "d"),
    )  # fmt: skip
    for n, (rows, tap, kind) in enumerate(products):
        y = 42 + 36 * n
        d.box(372, y, 76, 28, f"`{rows}", kind)
        d.text(458, y + 18, "×")
        d.box(474, y, 116, 28, f"`{tap}", "f")
        d.text(602, y + 18, ("= a0", "= a1", "= a2", "= b", "= c", "= p", "= m")[n], "code")
    d.text(24, 240, "The two outer taps over three frames are a", "pale")
    d.text(24, 256, "filter of two taps on the even rows: four", "pale")
    d.text(24, 272, "products in place of six.", "pale")
    for t, formula in enumerate(("y0 = a0 + b + p + m", "y1 = a1 + p − m", "y2 = a2 + c + p + m")):
        d.box(372, 306 + 29 * t, 218, 25, f"`{formula}", "c")
    d.text(24, 318, "Only neighbouring even rows are combined:", "pale")
    d.text(24, 334, "they are of like magnitude, and rounding", "pale")
    d.text(24, 350, "errors grow by a tenth.", "pale")


@_drawn("packed-frames", "Utterances one behind the other, and where each of them begins", 720, 400)
def _packed_frames(d: Drawing) -> None:
    lengths, kinds, size = (8, 4, 2, 6), "abcd", 20
    d.text(24, 28, "padded: [B, T, C]", "bold")
    for b, (length, kind) in enumerate(zip(lengths, kinds, strict=True)):
        for t in range(8):
            inside = t < length
            d.rect(24 + size * t, 42 + 26 * b, size, 20, kind if inside else "none")
            if not inside:
                d.path(f"M{24 + size * t} {62 + 26 * b}l{size} -20", "", False)
    d.text(200, 58, "Padding is computed like everything else, and the norm of the first")
    d.text(200, 76, "convolution, which is over time, sees it: every frame gets other")
    d.text(200, 94, "numbers than in the utterance alone.")
    d.text(24, 180, "packed: [1, N, C], and offsets", "bold")
    first, starts = 0, []
    for length, kind in zip(lengths, kinds, strict=True):
        starts.append(first)
        for t in range(first, first + length):
            d.rect(24 + size * t, 194, size, 20, kind)
        first += length
    for at in (*starts, first):
        d.path(f"M{24 + size * at} 218l0 8", "", False)
        d.text(24 + size * at, 240, str(at), "code", "middle")
    d.text(452, 209, "nothing between them")
    d.text(452, 239, "offsets [B + 1], int32, on the device", "pale")
    free = "*knows no boundaries\nlinear layers, layer norms,\nthe gate, activations:\ntake the frames as they are"
    bound = "*knows boundaries\nconvolutions, group norm,\nposition convolution, attention,\npooling: take the offsets"
    d.box(24, 276, 200, 96, free, "f")
    d.box(240, 276, 224, 96, bound, "b")
    cell = 4.4
    x, y = 500, 272
    d.rect(x, y, cell * 20, cell * 20, "none")
    for start, length, kind in zip(starts, lengths, kinds, strict=True):
        d.rect(x + cell * start, y + cell * start, cell * length, cell * length, kind)
    d.text(600, 290, "attention: a block", "pale")
    d.text(600, 306, "an utterance, one", "pale")
    d.text(600, 322, "bias for all", "pale")
    d.text(500, 380, "the rest is never computed", "pale")


@_drawn("packed-weights", "When a copy of a weight is used, and when it is made anew", 720, 420)
def _packed_weights(d: Drawing) -> None:
    d.box(24, 24, 190, 56, "*a kernel wants\npacked weight of W", "a")
    d.box(270, 24, 190, 56, "gradient wanted, graph\ntraced, or on a GPU?", "f")
    d.arrow(214, 52, 270, 52)
    d.box(516, 24, 180, 56, "*build, keep nothing\n~cheap there, or avoided", "b")
    d.arrow(460, 52, 516, 52)
    d.text(488, 44, "yes", "pale", "middle")
    d.box(270, 128, 190, 88, "*state of W now\naddress, version, dtype,\nshape, strides,\n64 of its values", "f")
    d.arrow(365, 80, 365, 128)
    d.text(374, 108, "no", "pale")
    d.box(270, 264, 190, 48, "as when the copy\nwas made?", "f")
    d.arrow(365, 216, 365, 264)
    d.box(516, 264, 180, 48, "*use the copy", "c")
    d.arrow(460, 288, 516, 288)
    d.text(488, 280, "yes", "pale", "middle")
    d.box(24, 264, 190, 48, "*build, and remember\n~with the state of W", "b")
    d.arrow(270, 288, 214, 288)
    d.text(242, 280, "no", "pale", "middle")
    d.text(24, 142, "W, row after row", "pale")
    for n in range(66):
        row, column = divmod(n, 11)
        d.rect(24 + 17 * column, 150 + 13 * row, 17, 13, "e" if n % 7 == 0 else "box")
    d.text(24, 246, "looked at, evenly spaced", "pale")
    changes = (
        ("optimizer step, load_state_dict, in-place write", "another version"),
        (".to, .half, new .data", "another address, dtype, shape"),
        ("write through .data, of all or much", "other values where it is looked"),
        ("write through .data, of a few elements", "may pass unnoticed"),
    )
    for n, (change, seen) in enumerate(changes):
        d.text(24, 346 + 18 * n, change)
        d.text(350, 346 + 18 * n, f"→ {seen}", "bold" if n == 3 else "")
    d.text(516, 142, "W dies: so does the copy.", "pale")
    d.text(516, 160, "Never in state_dict, not", "pale")
    d.text(516, 176, "copied, not pickled.", "pale")


@_drawn("parity", "Ours is compared with the truth, and allowed twice the error of plain torch", 720, 410)
def _parity(d: Drawing) -> None:
    d.box(24, 118, 132, 72, "*inputs\nsensitive, rounded\nto the dtype", "f")
    rows = (
        (24, "truth", "sums and products,", "float64", "d"),
        (122, "plain torch", "as transformers runs it,", "the dtype", "a"),
        (220, "ours", "twice: as it is, and with", "fresh memory NaN", "c"),
    )
    for y, name, what, where, kind in rows:
        d.box(222, y, 190, 66, f"*{name}\n{what}\n{where}", kind)
        d.path(f"M156 154L190 154L190 {y + 33}L222 {y + 33}")
    d.box(474, 74, 218, 40, "`e_plain = max|plain − truth|", "f")
    d.box(474, 172, 218, 40, "`e_ours = max|ours − truth|", "f")
    d.path("M412 57L445 57L445 94L474 94")
    d.path("M412 155L445 155L445 106L474 106")
    d.path("M412 57L430 57L430 184L474 184")
    d.path("M412 253L445 253L445 200L474 200")
    d.box(478, 240, 210, 58, "~passes if\n`e_ours ≤ 2 e_plain + tiny", "b")
    d.arrow(583, 212, 583, 240)
    d.path("M692 94L704 94L704 269L688 269")
    d.path("M24 318L696 318", "dashed", False)
    d.text(24, 344, "and the harness itself", "bold")
    d.box(24, 356, 190, 36, "ours, broken on purpose", "e")
    d.arrow(214, 374, 262, 374)
    d.box(262, 356, 150, 36, "the same comparison", "f")
    d.arrow(412, 374, 460, 374)
    d.box(460, 356, 228, 36, "must fail, or parity is blind", "b")


@_drawn("compile-gate", "What is asked of a Triton kernel before it meets a GPU", 720, 470)
def _compile_gate(d: Drawing) -> None:
    d.box(24, 24, 150, 52, "`kernels/*.py\nthe source", "a")
    d.box(24, 178, 150, 52, "*Triton's IR\n~the compiler's own", "f")
    d.box(24, 300, 150, 52, "*machine code\n~for each architecture", "f")
    d.arrow(99, 76, 99, 178)
    d.arrow(99, 230, 99, 300)
    gates = (
        (24, "interpreter", "float32, float16; mistakes put in on purpose", "make test"),
        (98, "counted bytes", "loads and stores, over compulsory bytes", "python -m benchmarks.gpu_bytes"),
        (178, "emulator", "bfloat16, TF32; bounds, races, unwritten memory", "make test-kernels"),
        (300, "read", "spills, shared memory, tensor cores, instructions", "python -m benchmarks.gpu_static"),
    )
    for y, name, what, command in gates:
        d.box(236, y, 120, 52, f"*{name}", "c")
        d.text(372, y + 22, what)
        d.text(372, y + 41, command, "file")
    d.arrow(174, 50, 236, 50)
    d.path("M174 62L205 62L205 124L236 124")
    d.arrow(174, 204, 236, 204)
    d.arrow(174, 326, 236, 326)
    d.path("M24 390L696 390", "dashed", False)
    d.box(236, 406, 120, 46, "*a GPU", "none")
    d.text(372, 426, "time, and whatever no gate above can tell")
    d.text(372, 445, "wavlm-fast gpu --out DIR, make test-gpu", "file")
    d.path("M99 352L99 429L236 429", "dashed")


def drawings() -> dict[str, str]:
    """Every drawing by the name of its file."""
    return {f"{name}.svg": made() for name, made in _DRAWINGS.items()}


if __name__ == "__main__":
    for name, text in drawings().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")

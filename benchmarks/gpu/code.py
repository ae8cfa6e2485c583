"""Machine code of GPUs as text: instructions by kind, what they move and multiply, and the loops among them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# In the order of the table. "integer" also holds predicates, moves and whatever fits nowhere else.
KINDS = ("matrix", "exp", "fp32", "fp64", "integer", "load", "store", "shared", "local", "control")
# Machine instruction -> kind, by prefix; the first that fits.
_PREFIXES = (
    ("matrix", ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "v_mfma")),
    ("exp", ("MUFU", "v_exp_f32", "v_log_f32", "v_rcp_f32", "v_rsq_f32", "v_sqrt_f32")),
    ("control", ("BRA", "BAR", "BSSY", "BSYNC", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "SYNCS", "WARPSYNC", "WARPGROUP",
                 "FENCE", "MEMBAR", "CALL", "RET", "BPT", "UTCBAR", "ERRBAR", "CCTL", "NANOSLEEP", "s_")),
    ("load", ("LDG", "global_load", "buffer_load", "flat_load")),  # LDGSTS too: from global to shared memory
    ("store", ("STG", "RED.", "ATOMG", "global_store", "buffer_store", "flat_store", "global_atomic",
               "buffer_atomic")),
    ("shared", ("LDS", "STS", "ATOMS", "SHFL", "LDTM", "STTM", "ds_")),
    ("local", ("LDL", "STL", "scratch_")),
    ("fp64", ("DADD", "DMUL", "DFMA", "DSETP", "v_add_f64", "v_mul_f64", "v_fma_f64", "v_rcp_f64", "v_rsq_f64",
              "v_div_f64", "v_div_scale_f64", "v_div_fmas_f64", "v_div_fixup_f64", "v_max_f64", "v_sqrt_f64")),
    ("fp32", ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "F2F", "FCHK", "HADD2", "HMUL2", "v_add_f32",
              "v_mul_f32", "v_fma", "v_max_f32", "v_min_f32", "v_max3_f32", "v_sub_f32", "v_subrev_f32", "v_pk_",
              "v_cvt", "v_mac_f32", "v_rndne_f32", "v_ldexp_f32", "v_div_f", "v_div_scale_f")),
)  # fmt: skip
# Bytes that a thread moves: by the width in the name, else four.
_WIDTHS = (
    (r"M(?:T)?88\.4|\.128|dwordx4|_b128", 16), (r"M(?:T)?88\.2|\.64|dwordx2|_b64", 8), (r"dwordx3|_b96|\.96", 12),
    (r"\.[US]8|_ubyte|_sbyte|_[ui]8|_b8", 1), (r"\.[US]16|_ushort|_sshort|_short|_[ui]16|_b16|d16", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One machine instruction at a place of the program; `jump` is the place that a branch leads to."""

    place: int
    text: str
    jump: int | None = None
    falls: bool = True  # whether the next instruction may follow
    runs: bool = True  # False where the predicate is never true

    @property
    def name(self) -> str:
        return self.text.split(maxsplit=1)[0].rstrip(";")

    @property
    def kind(self) -> str:
        """The unit that it occupies: one of KINDS."""
        if not self.runs:
            return "integer"
        return next((kind for kind, prefixes in _PREFIXES if self.name.startswith(prefixes)), "integer")

    @property
    def width(self) -> int:
        """Bytes that a thread loads or stores."""
        if self.kind not in ("load", "store", "shared"):
            return 0
        pairs = 2 if re.search(r"(read|write)2", self.name) else 1
        return pairs * next((width for pattern, width in _WIDTHS if re.search(pattern, self.name)), 4)

    def product(self) -> tuple[str, int]:
        """Type of the operands and operations (two per multiply-add) of one warp; ("", 0) if it does not multiply.

        UTCHMMA does not name its shape and is ("half", 0).
        """
        wide = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32(\.TF32)?", self.name)
        if wide:  # of four warps together
            m, n, k = map(int, wide.groups()[:3])
            return "tf32" if wide[4] else "half", 2 * m * n * k // 4
        narrow = re.match(r"HMMA\.16(8)(\d+)\.F32(\.TF32)?", self.name)
        if narrow:
            return "tf32" if narrow[3] else "half", 2 * 16 * 8 * int(narrow[2])
        amd = re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(x?f32|)", self.name)
        if amd:
            m, n, k = map(int, amd.groups()[:3])
            return {"f32": "fp32", "xf32": "tf32"}.get(amd[4], "half"), 2 * m * n * k
        return ("half", 0) if self.kind == "matrix" else ("", 0)

    def operand_bytes(self) -> int:
        """Shared memory that a product of four warps reads, for one of them."""
        found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32(\.TF32)?", self.name)
        if not found:
            return 0
        m, n, k = map(int, found.groups()[:3])
        both = self.text.split(",")[1].lstrip().startswith("gdesc")  # or the rows are in registers
        return (n + m * both) * k * (4 if found[4] else 2) // 4


@dataclass
class Mix:
    """What one warp does in some instructions. Bytes are those of all its threads."""

    counts: Counter[str] = field(default_factory=Counter)  # by kind
    operations: Counter[str] = field(default_factory=Counter)  # of the matrix unit, by type of the operands
    shared_bytes: int = 0
    loaded_bytes: int = 0
    integer_names: Counter[str] = field(default_factory=Counter)
    matrix_names: Counter[str] = field(default_factory=Counter)
    names: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and name

    @property
    def total(self) -> int:
        return self.counts.total()


def mix(code: Iterable[Instruction], lanes: int) -> Mix:
    """Add up instructions of warps of `lanes` threads."""
    found = Mix()
    for instruction in code:
        kind, width = instruction.kind, instruction.width * lanes
        found.counts[kind] += 1
        found.names[kind, instruction.name] += 1
        if kind in ("integer", "matrix"):
            (found.integer_names if kind == "integer" else found.matrix_names)[instruction.name] += 1
        type_, operations = instruction.product()
        found.operations[type_] += operations
        found.shared_bytes += instruction.operand_bytes()
        if kind == "shared" or instruction.name.startswith("LDGSTS"):
            found.shared_bytes += width
        if kind == "load":
            found.loaded_bytes += width
    del found.operations[""]
    return found


def parse_nvidia(sass: str) -> list[Instruction]:
    """The output of `cuobjdump --dump-sass`."""
    code = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass):
        predicate, text = re.fullmatch(r"(@!?U?P\w+)?\s*(.*)", text.strip(), re.S).groups()
        jump = re.search(r"0x([0-9a-f]+)", text) if text.startswith("BRA") else None
        always = not predicate and re.fullmatch(r"(BRA\s+0x[0-9a-f]+|EXIT.*|RET.*)\s*", text) is not None
        code.append(
            Instruction(int(address, 16), text, int(jump[1], 16) if jump else None, not always, predicate != "@!PT")
        )
    return code


def parse_amd(assembly: str) -> list[Instruction]:
    """LLVM's assembly for AMD GPUs; a place is a line."""
    lines = assembly.splitlines()
    labels = {m[1]: place for place, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    code = []
    for place, line in enumerate(lines):
        text = line.split(";")[0].strip()
        if re.match(r"[a-z]+_", text) and not text.endswith(":"):
            label = re.search(r"(\.LBB\w+)", text) if text.startswith(("s_cbranch", "s_branch")) else None
            falls = not text.startswith(("s_branch", "s_endpgm", "s_setpc"))
            code.append(Instruction(place, text, labels.get(label[1]) if label else None, falls))
    return code


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all natural loops, those in others too.

    A jump backwards makes a loop only if whoever gets to it came through its target: code that waits at the program's
    end and jumps back to where it came from is none.
    """
    blocks = _blocks(code)
    start = {block[0].place: index for index, block in enumerate(blocks)}
    after = [_successors(block, index, start, len(blocks)) for index, block in enumerate(blocks)]
    before: list[list[int]] = [[] for _ in blocks]
    for index, targets in enumerate(after):
        for target in targets:
            before[target].append(index)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for index, targets in enumerate(after):
        for head in targets:
            if dominators[index] >> head & 1:
                inside = {i for i in _reaching(index, head, before) if dominators[i] >> head & 1}
                bodies.setdefault(head, {head}).update(inside)
    return [[i for index in sorted(body) for i in blocks[index]] for _, body in sorted(bodies.items())]


def _blocks(code: list[Instruction]) -> list[list[Instruction]]:
    """Pieces that are entered at their first instruction alone and left after their last."""
    places = [i.place for i in code]
    # A label stands in a line of its own: the next instruction is meant.
    targets = {min((p for p in places if p >= i.jump), default=None) for i in code if i.jump is not None}
    blocks: list[list[Instruction]] = []
    begin = True
    for instruction in code:
        if begin or instruction.place in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        begin = instruction.jump is not None or not instruction.falls
    return blocks


def _successors(block: list[Instruction], index: int, start: dict[int, int], count: int) -> list[int]:
    last, found = block[-1], []
    if last.falls and index + 1 < count:
        found.append(index + 1)
    if last.jump is not None:
        place = min((p for p in start if p >= last.jump), default=None)
        if place is not None:
            found.append(start[place])
    return found


def _dominators(after: list[list[int]], before: list[list[int]]) -> list[int]:
    """For each block, the blocks that every way to it leads through, as bits; none for what cannot be reached."""
    reached, stack = {0}, [0]
    while stack:
        for target in after[stack.pop()]:
            if target not in reached:
                reached.add(target)
                stack.append(target)
    everything = (1 << len(after)) - 1
    found = [1] + [everything if index in reached else 0 for index in range(1, len(after))]
    changed = True
    while changed:
        changed = False
        for index in range(1, len(after)):
            if index not in reached:
                continue
            common = everything
            for source in before[index]:
                if source in reached:
                    common &= found[source]
            common |= 1 << index
            changed |= common != found[index]
            found[index] = common
    return found


def _reaching(index: int, head: int, before: list[list[int]]) -> set[int]:
    """The blocks from which `index` is reached without passing `head`."""
    found, stack = {index}, [index]
    while stack:
        block = stack.pop()
        if block != head:
            new = [b for b in before[block] if b not in found]
            found.update(new)
            stack += new
    return found


def innermost(bodies: list[list[Instruction]]) -> list[list[Instruction]]:
    """Of loops, those that do something and hold no other loop that does: a wait for a barrier is a loop as well."""
    working = [b for b in bodies if any(i.kind not in ("control", "integer") for i in b)]
    places = [{i.place for i in b} for b in working]
    return [b for b, own in zip(working, places, strict=True) if not any(other < own for other in places)]

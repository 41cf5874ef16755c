"""SASS (NVIDIA) and GCN (AMD) listings as control-flow graphs, and the instructions of their loops.

Loops are natural loops: a head, and the blocks that it dominates and that lead back to it. Code that the assembler
moved out of line (spinning on a barrier) thus counts to its loop, and a jump back from there is not a loop of its own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

SASS_LABEL = re.compile(r"\s*(\.L_x_\d+):")
SASS_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
SASS_TARGET = re.compile(r"(\.L_x_\d+)")
GCN_LABEL = re.compile(r"(\.?L?BB\d+_\d+):")
GCN_LINE = re.compile(r"\s+([a-z]+_[a-z0-9_]+)\b\s*([^;]*)")
PRODUCTS = ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "v_mfma")
EXPONENTIALS = ("MUFU.EX2", "v_exp_f32")


@dataclass(frozen=True)
class Instruction:
    op: str
    args: str = ""
    predicate: str = ""

    @property
    def is_product(self) -> bool:
        return self.op.startswith(PRODUCTS)

    @property
    def is_exponential(self) -> bool:
        return self.op.startswith(EXPONENTIALS)

    @property
    def is_local(self) -> bool:
        """Reads or writes local memory, where registers are spilled."""
        return self.op.startswith(("LDL", "STL", "scratch_"))

    @property
    def load_bytes(self) -> int:
        """Bytes per lane of a global load; 0 for other instructions, including bulk copies."""
        op = self.op
        if op.startswith(("LDGSTS", "LDG.", "LDG")) and not op.startswith("LDGDEPBAR"):
            if match := re.search(r"\.(128|64)\b", op):
                return int(match[1]) // 8
            return 1 if re.search(r"\.[US]8\b", op) else 2 if re.search(r"\.[US]16\b", op) else 4
        if match := re.match(r"(?:buffer|global|flat)_load_(dwordx?\d*|[us]byte|[us]?short)", op):
            width = match[1]
            if width.startswith("dword"):
                return 4 * int(width[6:] or 1)
            return 1 if "byte" in width else 2
        return 0


@dataclass(frozen=True)
class Loop:
    body: tuple[Instruction, ...]
    innermost: bool

    @cached_property
    def products(self) -> int:
        return sum(x.is_product for x in self.body)

    @cached_property
    def exponentials(self) -> int:
        return sum(x.is_exponential for x in self.body)

    @cached_property
    def ops(self) -> Counter[str]:
        return Counter(x.op.split(".")[0] for x in self.body)

    @property
    def hidden(self) -> float:
        """Share of the exponentials issued while a wgmma is in flight. The body is walked twice, because it repeats."""
        flying, count, hidden = False, 0, 0
        for x in self.body * 2:
            if x.op.startswith(("HGMMA", "QGMMA")):
                flying = True
            elif x.op.startswith("WARPGROUP.DEPBAR"):
                flying = not x.args.endswith(" 0x0")
            elif x.is_exponential:
                count, hidden = count + 1, hidden + flying
        return hidden / count if count else 1.0


class Listing:
    """One kernel's machine code."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]):
        self.instructions = instructions
        self.labels = labels

    @classmethod
    def sass(cls, text: str) -> Listing:
        """The output of `nvdisasm -c`."""
        return cls._parse(text, SASS_LABEL, SASS_LINE, lambda m: Instruction(m[2], m[3], m[1] or ""))

    @classmethod
    def gcn(cls, text: str) -> Listing:
        """The assembly that LLVM prints."""
        return cls._parse(text, GCN_LABEL, GCN_LINE, lambda m: Instruction(m[1], m[2].strip()))

    @classmethod
    def _parse(cls, text: str, label: re.Pattern, line: re.Pattern, make) -> Listing:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for row in text.splitlines():
            if match := label.match(row):
                labels[match[1]] = len(instructions)
            elif match := line.match(row):
                instructions.append(make(match))
        return cls(instructions, labels)

    def _targets(self, i: int) -> tuple[list[int], bool]:
        """Jump targets of instruction i, and True if it may fall through."""
        x = self.instructions[i]
        op = x.op.split(".")[0]
        if op.startswith("s_") and (op.startswith("s_cbranch") or op in ("s_branch", "s_endpgm")):
            found = [self.labels[x.args]] if x.args in self.labels else []
            return found, op.startswith("s_cbranch")
        if op in ("EXIT", "RET", "BPT"):
            return [], bool(x.predicate)
        if op == "BRA":
            match = SASS_TARGET.search(x.args)
            found = [self.labels[match[1]]] if match and match[1] in self.labels else []
            # A uniform predicate may be an argument (BRA.U UP0, label).
            return found, bool(x.predicate) or bool(re.match(r"!?U?P\d", x.args))
        if op == "BSYNC":
            ends = [y for y in self._reconvergence[x.args.split(",")[0]] if y != i + 1]
            return ([], True) if i + 1 in self.labels.values() or not ends else (ends, False)
        return [], True

    @cached_property
    def _reconvergence(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for x in self.instructions:
            if x.op.startswith("BSSY") and (match := SASS_TARGET.search(x.args)) and match[1] in self.labels:
                found[x.args.split(",")[0]].append(self.labels[match[1]])
        return found

    def _blocks(self) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """Basic blocks as (start, stop), and the successors of each."""
        n = len(self.instructions)
        jumps = {}
        starts = {0, *(x for x in self.labels.values() if x < n)}
        for i in range(n):
            targets, falls = self._targets(i)
            if targets or not falls:
                jumps[i] = (targets, falls)
                starts.update(t for t in (*targets, i + 1) if t < n)
        order = sorted(starts)
        blocks = list(zip(order, [*order[1:], n], strict=True))
        where = {start: b for b, (start, _) in enumerate(blocks)}
        successors = []
        for _, stop in blocks:
            targets, falls = jumps.get(stop - 1, ([], True))
            successors.append([where[t] for t in (*targets, *([stop] if falls else [])) if t in where])
        return blocks, successors

    @cached_property
    def loops(self) -> list[Loop]:
        """Every natural loop, in code order."""
        if not self.instructions:
            return []
        blocks, successors = self._blocks()
        graph, tree = nx.DiGraph(dict(enumerate(successors))), nx.DiGraph({0: []})
        tree.add_edges_from((parent, b) for b, parent in nx.immediate_dominators(graph, 0).items() if b)
        members = {}
        for head in tree:
            dominated = graph.subgraph({head} | nx.descendants(tree, head))
            if dominated.in_degree(head):
                members[head] = {head} | nx.ancestors(dominated, head)
        found = []
        for head in sorted(members):
            inside = members[head]
            body = tuple(x for b in sorted(inside) for x in self.instructions[slice(*blocks[b])])
            busy = [h for h in members if h != head and h in inside and self._has_products(blocks, members[h])]
            found.append(Loop(body, innermost=not busy))
        return found

    def _has_products(self, blocks: list[tuple[int, int]], inside: set[int]) -> bool:
        return any(x.is_product for b in inside for x in self.instructions[slice(*blocks[b])])

    @property
    def product_loops(self) -> list[Loop]:
        """The sweeps: innermost loops with matrix products."""
        return [x for x in self.loops if x.innermost and x.products]

    def feature_loops(self, paired: bool) -> list[Loop]:
        """Loops over the features of an additive score, which have no products: the shortest one that sums scores, and
        the shortest one that stores gradients. paired: loops with one reciprocal, and no exponential, for two tanh."""
        found = []
        for loop in self.loops:
            special = Counter(x.op for x in loop.body if x.op.startswith("MUFU"))
            exponentials, reciprocals = special["MUFU.EX2"], special["MUFU.RCP"]
            if not loop.products and reciprocals and exponentials == (0 if paired else reciprocals):
                found.append(loop)
        stores = [x for x in found if x.ops["STG"]]
        return [
            min(group, key=lambda x: len(x.body)) for group in ([x for x in found if x not in stores], stores) if group
        ]

    def full_sweeps(self, count: int = 1) -> list[Loop]:
        """The sweeps over unmasked tiles: the `count` shortest ones, shortest first."""
        return sorted(self.product_loops, key=lambda x: len(x.body))[:count]

    @property
    def local_in_loops(self) -> int:
        """Local memory accesses in loops. Those of an inner loop count again in the loop around it: they run more
        often."""
        return sum(x.is_local for loop in self.loops for x in loop.body)

    @property
    def local(self) -> int:
        return sum(x.is_local for x in self.instructions)

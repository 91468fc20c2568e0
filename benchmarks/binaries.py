"""What a compiled Triton kernel contains, read off its disassembly: resources, accesses, and the loops that load.

A loop is a strongly connected part of the control-flow graph, so that neither the order of blocks nor a copy of the
body outside the loop misleads. Every instruction of a loop is counted once: a branch around masked work is taken to
fall through. What cannot be counted this way (a loop in a loop, a subroutine) raises ValueError.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import triton


@dataclass(frozen=True)
class Assembly:
    """How an instruction set is written."""

    label: str
    instruction: str  # groups: predicate, name, operands
    target: str  # a label among the operands
    jump: str  # names that leave a block for good unless predicated
    untraced: str  # names that jump to an address in a register: returns, tables
    issued: str  # names that take a slot of the vector issue
    special: str  # exp2, log2, reciprocal, square root
    access: str  # global loads and stores; groups: kind, width
    load: str  # the load's kind


SASS = Assembly(
    label=r"^(\.L_\w+):",
    instruction=r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);",
    target=r"`\((\.L_\w+)\)",
    jump=r"(BRA|EXIT)(\.|$)",
    untraced=r"(RET|BRX|JMX|JMP)(\.|$)",
    issued=r"(?!NOP)",
    special=r"MUFU",
    access=r"(LDG|STG)\.E(?:\.\D[A-Z]+\w*)*?(?:\.(256|128|64|U16|S16|U8|S8))?(?:\.|$)",
    load="LDG",
)
GCN = Assembly(
    label=r"^(\.LBB\w+):",
    instruction=r"^\t()([a-z]\w+)([^;]*)",
    target=r"(\.LBB\w+)",
    jump=r"s_(branch|endpgm)$",
    untraced=r"s_(setpc|swappc)",
    issued=r"v_",  # scalar and memory instructions issue beside them
    special=r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    access=r"(?:global|buffer)_(load|store)_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|byte)",
    load="load",
)
WIDTHS = {"256": 32, "128": 16, "64": 8, None: 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1} | {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1
}  # fmt: skip


def accesses(names: list[str], syntax: Assembly) -> tuple[Counter[int], Counter[int]]:
    """Bytes a thread moves with one instruction -> how many such loads, and stores."""
    counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()
    for name in names:
        if match := re.match(syntax.access, name):
            counts[match[1] != syntax.load][WIDTHS[match[2]]] += 1
    return counts


def blocks(assembly: str, syntax: Assembly) -> tuple[nx.DiGraph, list[list[str]]]:
    """The control-flow graph over basic blocks, and the names of the instructions in each."""
    names: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    graph = nx.DiGraph([("caller", 0)])
    for line in assembly.splitlines():
        if label := re.match(syntax.label, line):
            if names[-1]:
                graph.add_edge(len(names) - 1, len(names))
                names.append([])
            starts[label[1]] = len(names) - 1
        elif found := re.match(syntax.instruction, line):
            predicate, name, operands = found.groups()
            names[-1].append(name)
            targets = re.findall(syntax.target, operands)
            jumps += [(len(names) - 1, target) for target in targets]
            # A branch may carry its condition as an operand beside the label.
            bare = not re.sub(syntax.target, "", operands).strip()
            leaves = bool(re.match(syntax.jump, name)) and bare and not predicate
            if targets or leaves:
                if not leaves:
                    graph.add_edge(len(names) - 1, len(names))
                names.append([])
    graph.add_nodes_from(range(len(names)))
    graph.add_edges_from((block, starts[target]) for block, target in jumps)
    return graph, names


def passes(assembly: str, syntax: Assembly) -> list[dict[str, int]]:
    """Of each loop that loads, in program order, what one thread does in an iteration."""
    graph, names = blocks(assembly, syntax)
    if any(re.match(syntax.untraced, name) for block in names for name in block):
        raise ValueError("expected a kernel without subroutines or jump tables: they would not be counted")
    counts = []
    loops = [part for part in nx.strongly_connected_components(graph) if graph.subgraph(part).edges]
    for loop in sorted(loops, key=min):
        body = [name for block in sorted(loop) for name in names[block]]
        loads, stores = accesses(body, syntax)
        if not loads:
            continue
        entries = {b for a, b in graph.edges if b in loop and a not in loop}
        back = [(a, b) for a, b in graph.subgraph(loop).edges if b in entries]
        if len(back) != 1 or not nx.is_directed_acyclic_graph(nx.restricted_view(graph.subgraph(loop), [], back)):
            raise ValueError("expected a loop with one entry, one way back and no loop inside: it cannot be counted")
        counts.append(
            {
                "instructions": sum(bool(re.match(syntax.issued, name)) for name in body),
                "special": sum(bool(re.match(syntax.special, name)) for name in body),
                "barriers": sum(name.startswith(("BAR.SYNC", "s_barrier")) for name in body),
                "loaded_bytes": sum(width * n for width, n in loads.items()),
                "stored_bytes": sum(width * n for width, n in stores.items()),
            }
        )
    return counts


def _nvidia_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _cubin(kernel) -> tuple[str, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        assembly = _nvidia_tool("nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert match, usage
    registers, stack, _, local = map(int, match.groups())
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return assembly, {"registers": registers, "spilled_bytes": stack + local, "spill_instructions": spills}


def _hsaco(kernel) -> tuple[str, dict[str, int]]:
    assembly = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[-1])

    return assembly.split("\n.Lfunc_end")[0], {
        "registers": field("vgpr_count"),
        "spilled_bytes": field("private_segment_fixed_size"),
        "spill_instructions": field("vgpr_spill_count") + field("sgpr_spill_count"),
    }


def read(kernel) -> dict[str, object]:
    """Registers, spills, shared memory, widths of all accesses, and the passes of a compiled kernel."""
    nvidia = "cubin" in kernel.asm
    syntax = SASS if nvidia else GCN
    assembly, resources = _cubin(kernel) if nvidia else _hsaco(kernel)
    _, names = blocks(assembly, syntax)
    loads, stores = accesses([name for block in names for name in block], syntax)
    return {
        **resources,
        "shared_bytes": kernel.metadata.shared,
        "loads": dict(loads),
        "stores": dict(stores),
        "passes": passes(assembly, syntax),
    }

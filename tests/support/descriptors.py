"""Where the shared addresses of a kernel's matrix products come from, read off its SASS.

ptxas 12.8, which is the one in the Triton wheels, loses the registers that some descriptors of wgmma are made of: the product
then reads shared memory at an address made of a kernel's parameter, or of a register that nothing wrote (benchmarks/NOTES.md).
"""

from __future__ import annotations

import re

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)(?!\w)")
_MOVES = ("UMOV", "MOV", "IMAD.U32", "IMAD.MOV", "R2UR", "UIADD3", "USHF", "ULOP3", "ULEA", "USEL")
"""What passes on where an address comes from; anything else makes a new number."""
_UNWRITTEN = "nothing wrote it"
_READS = ("ULDC", "LDC", "UMOV", "MOV")
_PARAMETERS = 0x210  # where sm_90 keeps them in its constant bank


def strayed(sass: str) -> list[str]:
    """The descriptors of wgmma that come from no shared address, as ``"offset UR42: from c[0x0][0x218]"``.

    Instructions are followed in the order of the text, which is that of execution but for what lies behind a loop's end.
    """
    origin: dict[tuple[str, int], str] = {}  # register -> what is wrong with it; registers never written are absent
    found = []
    for line in sass.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        offset, operation, operands = match.groups()
        first, *others = (operand.strip() for operand in operands.split(","))
        if operation.startswith("HGMMA"):
            base = int(re.findall(r"gdesc\[UR(\d+)\]", operands)[0])
            # Two descriptors of two registers each, of which a left side in registers takes none.
            in_registers = re.match(r"R\d+, R\d+, gdesc", operands) is not None
            reads = {
                register: origin.get(("UR", register), _UNWRITTEN)
                for register in range(base + 2 * in_registers, base + 4)
            }
            found += [f"{offset} UR{register}: {wrong}" for register, wrong in reads.items() if wrong]
            continue
        if (written := _REGISTER.fullmatch(first)) is None:
            continue
        kind, number = written.group(1), int(written.group(2))
        constant = re.search(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operands)
        for half in range(4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1):
            wrong = ""
            if constant is not None and operation.startswith(_READS) and int(constant.group(1), 16) >= _PARAMETERS:
                wrong = f"from {constant.group(0)}"
            elif operation.startswith(_MOVES):
                sources = [(k, int(n) + half) for k, n in _REGISTER.findall(" ".join(others))]
                wrong = next(filter(None, (origin.get(source, _UNWRITTEN) for source in sources)), "")
            origin[kind, number + half] = wrong
    return found

"""Count what one warp of a compiled kernel issues, by following its machine code.

No GPU is needed: loops run as often as integers say that are known before the launch (sizes,
strides, counters), so only registers that hold such integers are followed. A branch on anything
else is taken for one around a region that a few lanes skip: it falls through.
"""

import operator
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+ )?(\S+)\s*(.*?)\s*;")
_PARAMETERS = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}  # where a launch's arguments begin
_MOST = 400_000  # instructions, beyond which a loop is taken for endless
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


def issued(cubin: bytes, arguments: tuple[int | None, ...], capability: int) -> Counter:
    """How often warp 0 of program 0 issues each instruction.

    Args:
        cubin: One kernel, compiled.
        arguments: Its arguments in order, None for a pointer.
        capability: 10·major + minor of its GPU.

    Returns:
        Instructions by name, without modifiers.
    """
    code = _disassembled(cubin)
    place = {address: index for index, (address, *_) in enumerate(code)}
    warp = _Warp(_constants(arguments, _PARAMETERS[capability // 10]))
    counts: Counter = Counter()
    at = 0
    while counts.total() < _MOST:
        address, guard, name, operands = code[at]
        counts[name.split(".")[0]] += 1
        at += 1
        runs = warp.guard(guard)
        if name.split(".")[0] == "EXIT" and runs is not False and (runs or not guard):
            return counts
        if name.split(".")[0] in ("BRA", "CALL"):  # ptxas leaves loops by calls without return
            target = int(operands[-1], 16)
            if len(operands) > 1:  # BRA.U
                runs = warp.guard(operands[0])
            if runs is None and target <= address:
                raise ValueError(f"the loop that ends at {address:#x} has no known end")
            if runs:
                at = place[target]
        elif runs is not False:
            warp.execute(name, operands, certain=runs is True)
    raise ValueError(f"more than {_MOST} instructions: a loop has no known end")


def _disassembled(cubin: bytes) -> list[tuple[int, str, str, list[str]]]:
    """Address, guard, name and operands of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [_BIN / "cuobjdump", "-sass", file], capture_output=True, text=True, check=True
        )
    found = []
    for address, guard, name, rest in _LINE.findall(done.stdout):
        operands = [o.strip() for o in rest.split(",")] if rest else []
        found.append((int(address, 16), guard.strip().lstrip("@"), name, operands))
    return found


def _constants(arguments: tuple[int | None, ...], offset: int) -> dict[int, int | None]:
    """Values in constant memory by address: pointers are 8 bytes wide, numbers 4."""
    values = {}
    for value in arguments:
        size = 8 if value is None else 4
        offset = -(-offset // size) * size
        values[offset] = value
        offset += size
    return values


class _Warp:
    """The integers that are known, by register; what is not in there is not known."""

    def __init__(self, constants: dict[int, int | None]):
        self.known: dict[str, int] = {}
        self.constants = constants

    def guard(self, text: str) -> bool | None:
        """Whether a guarded instruction runs, None where that is not known."""
        return self._predicate(text) if text else True

    def _predicate(self, text: str) -> bool | None:
        name = text.lstrip("!")
        value = 1 if name in ("PT", "UPT") else self.known.get(name)
        return None if value is None else bool(value) != text.startswith("!")

    def _value(self, text: str) -> int | None:
        text = text.removesuffix(".reuse")
        if text.startswith("-") and not text[1:2].isdigit():
            value = self._value(text[1:])
            return None if value is None else -value
        if text in ("RZ", "URZ"):
            return 0
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            return _signed(int(text, 0))
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            return self.constants.get(int(found.group(1), 16))
        return self.known.get(text)

    def execute(self, name: str, operands: list[str], certain: bool) -> None:
        """Follow one instruction; a destination whose value is not clear is forgotten."""
        if not operands:
            return
        base, *modifiers = name.split(".")
        if base in ("ISETP", "UISETP", "PLOP3", "UPLOP3"):
            found = self._combined(operands) if "LOP3" in base else None
            if "SETP" in base:
                found = self._compared(modifiers, operands)
            self._set(operands[0], found, certain)
            self._set(operands[1], None, certain)
            return
        if base in ("IADD3", "UIADD3"):
            self._add(operands, certain)
            return
        if base == "P2R" and not modifiers:
            self._set(operands[0], self._kept(int(operands[3], 16)), certain)
            return
        if base == "R2P":
            for number in range(7):
                self._set(f"P{number}", None, certain)
            return
        if base in ("IMAD", "UIMAD") and modifiers == ["X"]:
            terms = [self._value(text) for text in operands[1:4]]
            carried = self._predicate(operands[4])
            known = None not in terms and carried is not None
            self._set(
                operands[0], terms[0] * terms[1] + terms[2] + carried if known else None, certain
            )
            return
        written, *read = [o for o in operands if not re.fullmatch(r"!?U?P(\d|T)", o)] or [""]
        for predicate in operands[: operands.index(written) + 3] if written else operands[:2]:
            if re.fullmatch(r"U?P\d", predicate):
                self._set(predicate, None, certain)  # carries, and what PLOP3 and others find
        if not re.fullmatch(r"U?R\d+", written):
            return
        value = self._result(base.removeprefix("U"), modifiers, read)
        self._set(written, value, certain)
        width = 4 if "128" in modifiers else 2 if {"64", "WIDE"} & set(modifiers) else 1
        if base in ("HMMA", "LDSM"):
            width = 4 if base == "HMMA" or "4" in modifiers else 2 if "2" in modifiers else 1
        self._forget_after(written, width)
        if base == "CS2R" and "32" not in modifiers:
            self._set(_next(written), value, certain)
        if base in ("ULDC", "LDC", "LDCU") and "64" in modifiers:
            self._set(_next(written), self._second(read[0]), certain)

    def _add(self, operands: list[str], certain: bool) -> None:
        """Three terms, with carries out (predicates after the result) and in (at the end)."""
        written, *rest = operands
        out = [rest.pop(0) for _ in range(2) if re.fullmatch(r"U?P(\d|T)", rest[0])]
        terms = [self._value(text) for text in rest[:3]]
        carried = [self._predicate(text) for text in rest[3:]]
        total = None
        if None not in terms and None not in carried:
            total = sum(term % 2**32 for term in terms) + sum(carried)
        self._set(written, total, certain)
        for predicate in out:
            self._set(predicate, None if total is None else total >= 2**32, certain)

    def _kept(self, mask: int) -> int | None:
        """Predicates as the bits of a register."""
        bits = [self._predicate(f"P{i}") for i in range(7) if mask >> i & 1]
        if None in bits:
            return None
        return sum(
            bit << i for bit, i in zip(bits, (i for i in range(7) if mask >> i & 1), strict=True)
        )

    def _second(self, text: str) -> int | None:
        found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text)
        return self.constants.get(int(found.group(1), 16) + 4) if found else None

    def _forget_after(self, register: str, width: int) -> None:
        for _ in range(width - 1):
            register = _next(register)
            self.known.pop(register, None)

    def _set(self, register: str, value: int | None, certain: bool) -> None:
        if value is None or not certain:
            self.known.pop(register, None)
        else:
            self.known[register] = _signed(int(value))

    def _compared(self, modifiers: list[str], operands: list[str]) -> bool | None:
        left, right = self._value(operands[2]), self._value(operands[3])
        other = self._predicate(operands[4])
        if left is None or right is None or other is None:
            return None
        if "U32" in modifiers:
            left, right = left % 2**32, right % 2**32
        found = _COMPARE[modifiers[0]](left, right)
        if "EX" in modifiers and left == right:  # the lower halves have been compared
            found = self._predicate(operands[5])
            if found is None:
                return None
        return found and other if "AND" in modifiers else found or other

    def _combined(self, operands: list[str]) -> bool | None:
        bits = [self._predicate(text) for text in operands[2:5]]
        if None in bits:
            return None
        return bool(int(operands[5], 16) >> (bits[0] * 4 + bits[1] * 2 + bits[2]) & 1)

    def _result(self, base: str, modifiers: list[str], read: list[str]) -> int | None:
        if base in ("S2R", "S2UR", "2UR"):
            return 0 if re.search("TID|CTAID", " ".join(read)) else None
        if base == "HFMA2" or base == "CS2R":
            return 0 if set(read) <= {"-RZ", "RZ", "0", "SRZ"} else None
        values = [self._value(text) for text in read]
        if None in values or not values:
            return None
        if base == "SHF" and modifiers[:1] == ["R"] and "HI" in modifiers:
            return (values[2] if "S32" in modifiers else values[2] % 2**32) >> values[1]
        if base == "LEA" and modifiers == ["HI"] and len(values) == 4:
            high = (values[2] % 2**32 << 32) + values[0] % 2**32
            return (high << values[3] >> 32) + values[1]
        if base == "LOP3":
            return _looked_up(*values[:4])
        if {"X", "HI", "WIDE", "64"} & set(modifiers) and base not in ("LDC", "LDCU"):
            return None
        if base in ("MOV", "LDC", "LDCU", "R2UR"):
            return values[0]
        if base in ("VIADD", "IADD"):
            return sum(values)
        if base == "IMAD":
            if "MOV" in modifiers or "IADD" in modifiers or "SHL" in modifiers or len(values) == 3:
                return values[0] * values[1] + values[2]
        if base == "LEA" and len(values) == 3:
            return (values[0] << values[2]) + values[1]
        if base == "SHF" and len(values) == 3 and "L" in modifiers:
            return values[0] << values[1]
        return None


def _looked_up(a: int, b: int, c: int, table: int) -> int:
    """Bitwise, as the 8 bits of ``table`` say for each combination of three bits."""
    found = 0
    for row in range(8):
        if table >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


def _next(register: str) -> str:
    kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()
    return f"{kind}{int(number) + 1}"


def _signed(value: int) -> int:
    value %= 2**32
    return value - 2**32 if value >= 2**31 else value

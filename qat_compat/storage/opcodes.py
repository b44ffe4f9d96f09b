"""What each opcode of the pickle protocols 0 to 5 does to the machine."""

from __future__ import annotations

import struct
from collections.abc import Callable

from qat_compat.storage.machine import EndOfPickle, Machine
from qat_compat.storage.rebuild import check_key, find_global

__all__ = ["OPERATIONS", "STOP"]

STOP = 0x2E


def _text(data: bytes) -> str:
    # Files written under Python 2 hold byte strings here; Latin-1 takes any of them.
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return _text(line[1:-1].decode("unicode_escape").encode("latin-1"))


def _integer(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    return int(line.removesuffix(b"L"))


_U1, _U2, _U4, _U8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _long(machine: Machine, layout: struct.Struct) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(layout)), "little", signed=True))


def _string(machine: Machine, layout: struct.Struct) -> None:
    machine.push(_text(machine.take(machine.number(layout))))


def _bytes(machine: Machine, layout: struct.Struct) -> None:
    machine.push(bytes(machine.take(machine.number(layout))))


def _tuple(machine: Machine, length: int) -> None:
    stack = machine.stack
    at = len(stack) - length
    if at < (machine.marks[-1] if machine.marks else 0):
        raise IndexError("stack underflow")
    stack[at:] = [tuple(stack[at:])]


def _pop_any(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("a global whose name is no string")
    machine.look_up(module, name)


def _object(machine: Machine) -> None:
    cls, *arguments = machine.pop_mark()
    machine.instance(cls, arguments)


def _dictionary(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.push({})
    machine.set_items(items)


def _protocol(machine: Machine) -> None:
    protocol = machine.number(_U1)
    if protocol > 5:
        raise ValueError(f"pickle protocol {protocol} is unknown")


def _frame(machine: Machine) -> None:
    if machine.number(_U8) > machine.end - machine.position:
        raise EndOfPickle


def _refuse(what: str) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        raise ValueError(f"{what} cannot be in a checkpoint")

    return operation


OPERATIONS: dict[int, Callable[[Machine], None]] = {
    # frames and marks
    0x80: _protocol,
    0x95: _frame,
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): _pop_any,
    ord("1"): lambda m: m.pop_mark().clear(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    # constants
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push(_integer(m.line())),
    ord("L"): lambda m: m.push(int(m.line().removesuffix(b"L"))),
    ord("J"): lambda m: m.push(m.number(_I4)),
    ord("K"): lambda m: m.push(m.byte()),
    ord("M"): lambda m: m.push(m.number(_U2)),
    0x8A: lambda m: _long(m, _U1),
    0x8B: lambda m: _long(m, _I4),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(m.number(_F8)),
    # text and bytes
    ord("S"): lambda m: m.push(_quoted(m.line())),
    ord("T"): lambda m: _string(m, _I4),
    ord("U"): lambda m: _string(m, _U1),
    ord("V"): lambda m: m.push(m.line().decode("raw_unicode_escape")),
    ord("X"): lambda m: _string(m, _U4),
    0x8C: lambda m: _string(m, _U1),
    0x8D: lambda m: _string(m, _U8),
    ord("B"): lambda m: _bytes(m, _U4),
    ord("C"): lambda m: _bytes(m, _U1),
    0x8E: lambda m: _bytes(m, _U8),
    0x96: lambda m: _bytes(m, _U8),
    # collections
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: _tuple(m, 1),
    0x86: lambda m: _tuple(m, 2),
    0x87: lambda m: _tuple(m, 3),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dictionary,
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push(set()),
    0x90: lambda m: m.append(m.pop_mark()),
    0x91: lambda m: m.push(frozenset(check_key(item) for item in m.pop_mark())),
    # the memo
    ord("p"): lambda m: m.put(int(m.line())),
    ord("q"): lambda m: m.put(m.byte()),
    ord("r"): lambda m: m.put(m.number(_U4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("g"): lambda m: m.push(m.memo[int(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.byte()]),
    ord("j"): lambda m: m.push(m.memo[m.number(_U4)]),
    # globals and objects
    ord("c"): lambda m: m.look_up(_text(m.line()), _text(m.line())),
    0x93: _stack_global,
    ord("R"): Machine.reduce,
    ord("b"): Machine.build,
    0x81: Machine.new_object,
    0x92: lambda m: m.new_object(keywords=True),
    ord("i"): lambda m: m.instance(find_global(_text(m.line()), _text(m.line())), m.pop_mark()),
    ord("o"): _object,
    ord("Q"): Machine.persistent,
    ord("P"): _refuse("a textual persistent id"),
    0x82: _refuse("an extension code"),
    0x83: _refuse("an extension code"),
    0x84: _refuse("an extension code"),
    0x97: _refuse("an out-of-band buffer"),
    0x98: _refuse("an out-of-band buffer"),
}

"""What a program does: matrix products by its trace, memory traffic and collectives by its compiled text. A loop counts
as often as it runs; `cost_analysis` of a compiled program counts its body once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import jax
from jax.extend import core

# --- products, from the trace ----------------------------------------------------------------------------------------


def flops(f: Callable, *args: Any) -> int:
    """FLOPs of the matrix products of `f(*args)`, two a multiply-add; nothing runs. What is computed anew in a backward
    pass counts again, of alternatives the dearest does.

    Raises `ValueError` for products in a loop of which the trace does not say how often it runs.
    """
    return _products(jax.make_jaxpr(f)(*args).jaxpr)


def _products(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = (cast(Any, v.aval).shape for v in (eqn.invars[0], eqn.outvars[0]))
            total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
            continue
        inner = [_products(j) for value in eqn.params.values() for j in _programs(value)]
        if name == "while" and any(inner):
            raise ValueError("matrix products in a loop of unknown length")
        total += max(inner, default=0) if name == "cond" else sum(inner) * eqn.params.get("length", 1)
    return total


def _programs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
        yield value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _programs(v)


# --- traffic and collectives, from the compiled text -----------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "while", "call", "conditional",
)  # fmt: skip
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    kind: str
    size: int  # bytes of the whole on one device: what is gathered, reduced, exchanged
    group: int  # devices that take part
    times: int  # a run of the program

    @property
    def received(self) -> float:
        """Bytes a device receives, all times together; on a ring, where an all-reduce goes around twice."""
        around = (self.group - 1) / self.group
        return self.times * self.size * {"all-reduce": 2 * around, "collective-permute": 1.0}.get(self.kind, around)


class Account(NamedTuple):
    traffic: int  # bytes read from and written to a device's memory
    collectives: tuple[Collective, ...]


class _Line(NamedTuple):
    """One instruction: `%name = kind op(args), rest`."""

    name: str
    kind: str
    op: str
    args: tuple[str, ...]
    inside: str  # what stands in the brackets
    rest: str
    root: bool


def read(text: str, devices: int) -> Account:
    """The account of a compiled program (`compiled.as_text()`) for so many devices.

    Traffic is what every instruction reads and writes, of slices the slice; arrays that the compiler keeps in on-chip
    memory are none.
    """
    programs, entry = _parse(text)
    found: dict[tuple, Collective] = {}

    def walk(name: str, times: int, fused: bool = False) -> int:
        lines, total = programs[name], 0
        for line in lines.values():
            kind = line.op.removesuffix("-start")
            if kind in _KINDS:
                one = _collective(kind, line, times, devices, name)
                channel = re.search(r"channel_id=\d+", line.rest)  # one that overlaps others is written several times
                said = re.search(r'op_name="[^"]*"', line.rest)
                key = (channel[0], said and said[0], kind, one.size) if channel else (name, line.name)
                found.setdefault(key, one)
            called = _CALLED.search(line.rest)
            if line.op == "while":
                body, condition = re.search(r"body=%?([\w.\-]+)", line.rest), _name(line.rest, "condition")
                total += walk(body[1], times * _trips(line, programs, lines, condition)) if body else 0
            elif line.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(line.rest)
                total += max((walk(n, times) for n in names), default=0)
            elif line.op in ("call", "async-start") and called:
                total += walk(called[1], times)
            elif line.op == "fusion" and called:
                walk(called[1], times, fused=True)
            if not fused and line.op not in _FREE and not line.op.endswith("-done"):
                inner = programs.get(called[1]) if called and line.op == "fusion" else None
                total += times * _moved(line, lines, inner, programs)
        return total

    traffic = walk(entry, 1)
    return Account(traffic, tuple(c for c in found.values() if c.group > 1))


def _parse(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
    programs: dict[str, dict[str, _Line]] = {}
    entry, current = "", None
    for raw in text.splitlines():
        if raw.endswith("{") and raw.startswith(("%", "ENTRY")):
            name = raw.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            entry = name if raw.startswith("ENTRY") else entry
            current = programs.setdefault(name, {})
        elif raw.startswith("}"):
            current = None
        elif current is not None and " = " in raw:
            line = _line(raw.strip())
            current[line.name] = line
    return programs, entry


def _line(raw: str) -> _Line:
    root, (name, rest) = raw.startswith("ROOT "), raw.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].strip()
    op, behind = rest.split("(", 1)
    stop = _closing("(" + behind) - 1
    inside = behind[:stop]
    return _Line(
        name.lstrip("%"), kind, op, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, behind[stop + 1 :], root
    )


def _closing(text: str) -> int:
    """Where the bracket that `text` begins with closes."""
    depth = 0
    for m in re.finditer(r"[()]", text):
        depth += 1 if m[0] == "(" else -1
        if depth == 0:
            return m.start()
    return len(text) - 1


def _sizes(kind: str, everywhere: bool = False) -> list[int]:
    """Bytes of every array of a type; those in on-chip memory only if `everywhere`."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if everywhere or not re.search(r"S\([1-9]", layout):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
            out.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return out


def _moved(
    line: _Line, lines: dict[str, _Line], inner: dict[str, _Line] | None, programs: dict[str, dict[str, _Line]]
) -> int:
    """Bytes an instruction reads and writes; with `inner`, what it is fused of."""
    if line.op in ("dynamic-slice", "gather"):
        return 2 * sum(_sizes(line.kind))
    if line.op == "dynamic-update-slice":
        return 2 * sum(_sizes(lines[line.args[1]].kind)) if line.args[1] in lines else 0
    args = [sum(_sizes(lines[a].kind)) if a in lines else 0 for a in line.args]
    out = sum(_sizes(line.kind))
    if inner is None:
        return out + sum(args)
    for p in (p for p in inner.values() if p.op == "parameter"):
        if (i := int(p.inside)) < len(args):
            args[i] = int(min(args[i], _read(p.name, inner, programs)))
    for u in (u for u in inner.values() if u.op == "dynamic-update-slice"):  # written in place
        if u.args[1] in inner and sum(_sizes(u.kind)) <= out:
            out += sum(_sizes(inner[u.args[1]].kind)) - sum(_sizes(u.kind))
    return out + sum(args)


def _read(name: str, lines: dict[str, _Line], programs: dict[str, dict[str, _Line]]) -> int | float:
    """Bytes of `name` that what is fused touches: slices, where nothing else is done with it; inf where it is, or where
    nothing is."""
    found = []
    for user in lines.values():
        for at, arg in enumerate(user.args):
            called = _CALLED.search(user.rest)
            if arg != name:
                continue
            if user.op in ("dynamic-slice", "gather") and at == 0:
                found.append(sum(_sizes(user.kind, everywhere=True)))
            elif user.op == "dynamic-update-slice" and at == 0:
                found.append(sum(_sizes(lines[user.args[1]].kind, everywhere=True)))
            elif user.op == "bitcast":
                found.append(_read(user.name, lines, programs))
            elif user.op == "fusion" and called:
                inner = programs[called[1]]
                given = (p.name for p in inner.values() if p.op == "parameter" and int(p.inside) == at)
                found.append(sum(_read(p, inner, programs) for p in given))
            else:
                return math.inf
    return sum(found) if found else math.inf


def _name(rest: str, what: str) -> str:
    found = re.search(what + r"=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _trips(line: _Line, programs: dict[str, dict[str, _Line]], around: dict[str, _Line], condition: str) -> int:
    """How often a loop runs: as it says, or up to the number its condition compares with."""
    said = re.search(r'known_trip_count"?:?\{"n":"(\d+)"', line.rest)
    if said:
        return int(said[1])
    inside = [x for p in _reached(condition, programs) for x in programs[p].values()]
    bounds = [int(x.inside) for x in inside if x.op == "constant" and re.fullmatch(r"\d+", x.inside)]
    if not bounds:  # a constant that was made part of what goes round
        indices = [int(_name(x.rest, "index")) for x in inside if x.op == "get-tuple-element"]
        start = around.get(line.args[0])
        begun = [_origin(start.args[i], around) for i in indices] if start is not None and start.op == "tuple" else []
        bounds = [int(x.inside) for x in begun if x is not None and re.fullmatch(r"\d+", x.inside)]
    return max(bounds, default=1)


def _origin(name: str, lines: dict[str, _Line]) -> _Line | None:
    line = lines.get(name)
    while line is not None and line.op in ("copy", "bitcast") and line.args:
        line = lines.get(line.args[0])
    return line if line is not None and line.op == "constant" else None


def _reached(name: str, programs: dict[str, dict[str, _Line]]) -> Iterable[str]:
    if name in programs:
        yield name
        for line in programs[name].values():
            for called in _CALLED.findall(line.rest):
                yield from _reached(called, programs)


def _collective(kind: str, line: _Line, times: int, devices: int, program: str) -> Collective:
    size = max(_sizes(line.kind, everywhere=True), default=0)
    if kind == "all-reduce" and not line.op.endswith("-start"):
        size = sum(_sizes(line.kind, everywhere=True))  # of several arrays at once
    group = _group(line.rest, devices)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and "all-reduce-scatter" in program:  # the TPU's compiler slices what it has reduced
        kind = "reduce-scatter"
    return Collective(kind, size, group, times)


def _group(rest: str, devices: int) -> int:
    """How many devices take part, in each of the ways groups are written."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if re.search(r"source_target_pairs=\{\{", rest):
        return 2
    return devices

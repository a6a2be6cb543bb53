"""What a compiled program needs: memory, arithmetic, and what it sends between devices."""

import math
import re
from typing import Any

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def facts(compiled: Any) -> dict[str, Any]:
    """What a compiled program needs on each device.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``.

    Returns:
      ``arguments``, ``temp`` and ``peak`` in bytes, ``flops`` (a loop's body counted once), ``sorts``, and
      what :func:`collectives` finds.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    by_kind, pass_bytes = collectives(text)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "peak": live + memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis().get("flops", 0.0),
        "sorts": len(re.findall(r" sort\(", text)),
        "collectives": by_kind,
        "pass_bytes": pass_bytes,
    }


def collectives(text: str) -> tuple[dict[str, tuple[int, int, int]], int]:
    r"""Reads collectives from an optimized program.

    Args:
      text: HLO.

    Returns:
      By kind: calls, bytes of their results in a run of the program, and the bytes of the largest. Loops
      whose length the compiler knows count as often as they run, others once. And the most bytes that a
      turn of a loop of unknown length moves, which in DST's update is a counting pass.

    Example:
      >>> collectives("ENTRY %main (p: f32[4]) -> f32[8] {\n  ROOT %g = f32[8]{0} all-gather(%p)\n}\n")
      ({'all-gather': (1, 32, 32)}, 0)
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.M)
    by_kind: dict[str, tuple[int, int, int]] = {}
    turns: list[int] = []

    def walk(name: str, times: int) -> int:
        moved = 0
        for line in bodies.get(name, "").splitlines():
            if hit := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
                size = _size(hit[1])
                calls, total, largest = by_kind.get(hit[2], (0, 0, 0))
                by_kind[hit[2]] = (calls + times, total + times * size, max(largest, size))
                moved += size
            trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            body = re.search(r"\bbody=%?([\w.\-]+)", line)
            if body:
                inside = walk(body[1], times * int(trip_count[1]) if trip_count else times)
                moved += inside * int(trip_count[1]) if trip_count else 0
                if not trip_count:
                    turns.append(inside)
            for callee in re.findall(r"(?:to_apply|calls|condition)=%?([\w.\-]+)", line):
                moved += walk(callee, times)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                moved += sum(walk(branch.strip().lstrip("%"), times) for branch in branches.split(","))
        return moved

    if entry:
        walk(entry[1], 1)
    return by_kind, max(turns, default=0)


def _size(result: str) -> int:
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    )

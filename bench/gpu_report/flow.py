"""Which instructions a thread executes: the path of a whole, aligned tile through a kernel, with its loops counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpu_report.code import BRANCH, EXIT, JUMP, LOAD, MAY_EXIT, NEXT, STORE, Instruction, Listing

WIDE = 128
# a register that differs between threads, and the guard of those among which it does not
Varying = tuple[str, str]


@dataclass(frozen=True)
class Block:
    """Instructions ``first`` to ``last``, executed together; ``ends`` says that the kernel may end behind them."""

    first: int
    last: int
    following: tuple[int, ...]
    ends: bool


@dataclass(frozen=True)
class Body:
    """What one pass through some blocks executes: its 128-bit accesses, its instructions' numbers, and its bytes."""

    wide: int
    instructions: tuple[int, ...]
    loaded: int
    stored: int

    @property
    def worth(self) -> tuple[int, int, int]:
        """Greater for what a whole, aligned tile takes: no access left out, no way round that it has no need of."""
        return self.wide, self.loaded + self.stored, -len(self.instructions)


@dataclass(frozen=True)
class Path:
    """Blocks in order: their instructions, their 128-bit accesses, the bytes that they load and store, their loops.

    ``loops`` are those among them that repeat, which count for nothing else.
    """

    wide: int = 0
    instructions: tuple[int, ...] = ()
    loaded: int = 0
    stored: int = 0
    loops: tuple[Body, ...] = ()

    def trips(self, loaded_bytes: int) -> tuple[int, ...] | None:
        """Trips through each loop, at least one, as many as possible through the first; None where they do not fit."""
        remaining, trips = loaded_bytes - self.loaded, []
        for body in self.loops:
            trips.append(remaining // body.loaded if body.loaded else 0)
            remaining -= trips[-1] * body.loaded
        return tuple(trips) if remaining == 0 and all(number > 0 for number in trips) else None

    def extended(self, body: Body, repeats: bool) -> Path:
        """The path that goes on through ``body``."""
        if repeats:
            return replace(self, wide=self.wide + body.wide, loops=(*self.loops, body))
        instructions = (*self.instructions, *body.instructions)
        loaded, stored = self.loaded + body.loaded, self.stored + body.stored
        return Path(self.wide + body.wide, instructions, loaded, stored, self.loops)

    @property
    def worth(self) -> tuple[int, int, int]:
        """As `Body.worth`."""
        return self.wide, self.stored, -len(self.instructions)


def executed(listing: Listing, loaded_bytes: int, stored_bytes: int) -> list[tuple[Instruction, int]]:
    """Instructions of the path of a whole tile, each with the number of times that a thread executes it.

    Of the ways through the kernel that load and store so many bytes per thread, the one with the most 128-bit accesses
    is taken, and of those the shortest: rare cases, such as the slow path of a division, lie beside it. Loops make as
    many trips as the loads that are left ask for. Where no way fits, the bytes stored may differ, then those loaded.
    Raises ValueError where a loop's trips do not come out, or where loops are nested.
    """
    blocks = blocks_of(listing.instructions)
    body_of = _Bodies(listing.instructions, blocks, varying_accesses(listing, blocks))
    counted = [(path, path.trips(loaded_bytes)) for path in _paths(body_of, blocks)]
    starts = sorted({body.instructions[0] for path, _ in counted for body in path.loops})

    def rank(path: Path, trips: tuple[int, ...] | None) -> tuple[object, ...]:
        loops = zip(path.loops, trips or (), strict=True)
        loaded = {body.instructions[0]: number * body.loaded for body, number in loops}
        # of several loops those that come first take what they can
        return trips is not None, path.stored == stored_bytes, [loaded.get(start, 0) for start in starts], path.worth

    possible = [(path, trips) for path, trips in counted if trips is not None or not path.loops]
    if not possible:
        raise ValueError(f"loaded_bytes: no path loads {loaded_bytes} bytes per thread")
    path, trips = max(possible, key=lambda each: rank(*each))
    times = dict.fromkeys(path.instructions, 1)
    for number, body in zip(trips or (), path.loops, strict=True):
        times |= dict.fromkeys(body.instructions, number)
    return [(listing.instructions[i], number) for i, number in sorted(times.items())]


def varying_accesses(listing: Listing, blocks: Sequence[Block]) -> set[int]:
    """Numbers of the accesses to global memory whose addresses differ between threads."""
    guards = {instruction.guard for instruction in listing.instructions if instruction.guard}
    known: list[frozenset[Varying] | None] = [None] * len(blocks)
    start = frozenset((register, "") for register in listing.varying)
    known[0], waiting, found = start, [0], set()
    while waiting:
        b = waiting.pop()
        registers = set(known[b] or ())
        for i in range(blocks[b].first, blocks[b].last + 1):
            instruction = listing.instructions[i]
            names = {register for register, except_ in registers if not except_ or except_ != instruction.guard}
            if instruction.access and names.intersection(instruction.address):
                found.add(i)
            for register in instruction.writes:
                if names.intersection(instruction.reads):
                    registers.add((register, ""))
                elif not instruction.guard:
                    registers.difference_update([(register, guard) for guard in ("", *guards)])
                elif (register, "") in registers:
                    # the threads that the guard lets through have the same value now
                    registers.remove((register, ""))
                    registers.add((register, instruction.guard))
            # where a thread starts from never changes
            registers |= {each for each in start if each[0] == "tid"}
        for follower in blocks[b].following:
            before = known[follower]
            after = frozenset(registers) | (before or frozenset())
            if after != before:
                known[follower] = after
                waiting.append(follower)
    return found


def blocks_of(instructions: Sequence[Instruction]) -> list[Block]:
    """The blocks, in the order of their instructions."""
    starts = {0} | {instruction.target for instruction in instructions if instruction.flow in (JUMP, BRANCH)}
    starts |= {i + 1 for i, instruction in enumerate(instructions) if instruction.flow != NEXT}
    ordered = sorted(start for start in starts if start < len(instructions))
    number = {start: b for b, start in enumerate(ordered)}
    blocks = []
    for first, after in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        last = instructions[after - 1]
        following = [last.target] if last.flow in (JUMP, BRANCH) else []
        following += [after] if last.flow in (NEXT, BRANCH, MAY_EXIT) and after < len(instructions) else []
        ends = last.flow in (EXIT, MAY_EXIT)
        blocks.append(Block(first, after - 1, tuple(dict.fromkeys(number[i] for i in following)), ends))
    return blocks


def _paths(body_of: _Bodies, blocks: list[Block]) -> Iterator[Path]:
    """The best path to each end of the kernel, for each choice of loops and each number of bytes."""
    groups = _strongly_connected(blocks)
    group_of = {b: g for g, members in enumerate(groups) for b in members}
    best: list[dict[tuple[object, ...], Path]] = [{} for _ in groups]
    best[group_of[0]] = {(): Path()}
    # groups come in the order in which they can be reached
    for g, members in enumerate(groups):
        repeats = any(follower in members for b in members for follower in blocks[b].following)
        body = body_of.loop(members) if repeats else body_of.way(members)
        reached = [path.extended(body, repeats) for path in best[g].values()]
        if any(blocks[b].ends for b in members):
            yield from reached
        for follower in {f for b in members for f in blocks[b].following if f not in members}:
            others = best[group_of[follower]]
            for path in reached:
                key = (path.loaded, path.stored, path.loops)
                if key not in others or path.worth > others[key].worth:
                    others[key] = path


class _Bodies:
    """What one pass through blocks executes."""

    def __init__(self, instructions: Sequence[Instruction], blocks: list[Block], varying: set[int]) -> None:
        self._instructions, self._blocks, self._varying = instructions, blocks, varying

    def way(self, members: Sequence[int]) -> Body:
        """One block after the other."""
        numbers = tuple(i for b in members for i in range(self._blocks[b].first, self._blocks[b].last + 1))
        accesses = [self._instructions[i] for i in numbers if i in self._varying]
        n_bytes = {kind: sum(a.bits for a in accesses if a.access == kind) // 8 for kind in (LOAD, STORE)}
        return Body(sum(a.bits >= WIDE for a in accesses), numbers, n_bytes[LOAD], n_bytes[STORE])

    def loop(self, members: list[int]) -> Body:
        """The best way once around a loop. Raises ValueError where it has another loop in it, or two entries."""
        blocks = self._blocks
        entries = {f for b in range(len(blocks)) if b not in members for f in blocks[b].following if f in members}
        # the kernel itself begins in its first block
        entries |= {0} & set(members)
        if len(entries) != 1:
            raise ValueError(f"instructions: expected loops with one entry, got {len(entries)}")
        header = entries.pop()
        inner = [
            replace(block, following=tuple(f for f in block.following if f in members and f != header))
            for block in blocks
        ]
        ways = {header: [header]}
        for group in _strongly_connected(inner, header):
            if len(group) > 1:
                raise ValueError("instructions: expected loops that are not nested")
            for follower in inner[group[0]].following:
                longer = [*ways[group[0]], follower]
                if follower not in ways or self.way(longer).worth > self.way(ways[follower]).worth:
                    ways[follower] = longer
        around = [self.way(ways[b]) for b in members if header in blocks[b].following and b in ways]
        return max(around, key=lambda body: body.worth)


def _strongly_connected(blocks: Sequence[Block], start: int = 0) -> list[list[int]]:
    """Tarjan's components that can be reached from ``start``, in topological order."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(b: int) -> None:
        index[b] = low[b] = len(index)
        stack.append(b)
        for follower in blocks[b].following:
            if follower not in index:
                visit(follower)
                low[b] = min(low[b], low[follower])
            elif follower in stack:
                low[b] = min(low[b], index[follower])
        if low[b] == index[b]:
            place = stack.index(b)
            found.append(sorted(stack[place:]))
            del stack[place:]

    visit(start)
    return found[::-1]

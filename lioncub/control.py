"""The control message of a step, and the decision that every rank derives from everyone's.

Votes carry no headers. Once per step each rank sends one message of 8-byte little-endian words: wire version, step,
hash of the bucket layout and five hyperparameters (float64) per param group, which must be equal; then flags, overflow
of a GradScaler, microseconds of the last step, 1 + the index of the first parameter that is not finite, and a bitmap
of those that have a gradient.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters
from lioncub.collectives.agreement import WIRE_VERSION, WorkersDisagreeError, by_value
from lioncub.collectives.algorithms import Done, Exchange, Phases
from lioncub.collectives.transport import PAYLOADS, Transport
from lioncub.kernels.scalars import Scalar

T = TypeVar("T")

# flags of a rank
FAILED, STALE, UNVERIFIED = 1, 2, 4
# reasons not to take a step, the most important is the greatest
COMMIT, NONFINITE, OVERFLOW, R_UNVERIFIED, DISAGREE, R_STALE, R_FAILED = range(7)
# one bit of a word is its sign
_BITS = 63
_HEAD = ("the wire version", "the step", "the bucket layout")
_LAYOUT = 2
_RATES = ("lr", "betas[0]", "betas[1]", "weight_decay", "maximize")
_TAIL = ("flags", "overflow", "microseconds", "nonfinite")
_TAG = PAYLOADS - 1


class Attempt:
    """Keeps the first error of this rank's part of a step.

    The other ranks wait for this one's messages, so it is raised only when they have been informed.
    """

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def run(self, part: Callable[..., T], *arguments: Any) -> T | None:
        """Return what ``part`` returns, or None where it or an earlier one raised."""
        if torch.compiler.is_compiling():
            return part(*arguments)
        if self.failure is None:
            try:
                return part(*arguments)
            except Exception as error:
                self.failure = error
        return None


class NonFiniteError(ArithmeticError):
    """A gradient, momentum or update of some rank is not finite; no rank changed anything."""


@dataclass(frozen=True)
class Report:
    """The decision as the host reads it: a reason, the step, 1 + the index of a parameter, a rank, active parameters.

    ``microseconds`` is the slowest rank's time of the last step.
    """

    reason: int
    step: int
    param: int
    rank: int
    n_active: int
    microseconds: int


@dataclass(frozen=True)
class Decision:
    """int32[T] ``active``, 1 for parameters that move; int64[6] ``report``; everyone's words int64[N, W]."""

    active: Tensor
    report: Tensor | None
    everyone: Tensor
    known: Report | None = None

    def read(self) -> Report:
        """Read the report; waits for the device."""
        return self.known if self.known is not None else Report(*self.words.tolist())

    @property
    def words(self) -> Tensor:
        """The report on the device."""
        assert self.report is not None
        return self.report


class Control:
    """The control messages of one layout: ``names`` of the parameters, param groups in use, rank and device.

    ``transport`` is that of the ranks that decide, None for one alone. Where ``capturable``, nothing is copied between
    host and device. Where parameters are sharded, ``order`` has the place in this rank's buckets of each parameter in
    the order that ranks have in common, and ``layouts`` for each rank one that has its bucket layout; else they are
    None.
    """

    def __init__(
        self,
        names: Sequence[str],
        groups: Sequence[int],
        transport: Transport | None,
        device: torch.device,
        *,
        capturable: bool,
        order: Sequence[int] | None = None,
        layouts: Sequence[int] | None = None,
    ) -> None:
        self._names = names if order is None else [names[i] for i in order]
        self._groups, self._capturable = groups, capturable
        self._transport, self._device, self._layouts, self._order = transport, device, layouts, order
        if order is not None:
            self._from_buckets = torch.tensor(order, dtype=torch.int64, device=device)
            self._to_buckets = self._from_buckets.argsort()
        if layouts is not None:
            self._peers = torch.tensor(layouts, dtype=torch.int64, device=device)
        self._n_tensors = len(names)
        self._agreed = len(_HEAD) + len(_RATES) * len(groups)
        self._bitmap = self._agreed + len(_TAIL)
        self._n_words = self._bitmap + -(-len(names) // _BITS)
        indices = torch.arange(len(names), dtype=torch.int64, device=device)
        self._words, self._shifts = self._bitmap + indices // _BITS, indices % _BITS
        self._first_counts = len(names) - indices
        workers = 1 if transport is None else transport.size
        self._first_ranks = workers - torch.arange(workers, dtype=torch.int64, device=device)
        self._weights = torch.arange(1, 7, dtype=torch.int64, device=device)
        self._full = _bitmap([True] * len(names))
        self._all_active = torch.ones(len(names), dtype=torch.int32, device=device)
        self._expected: Exchange[Tensor] | None = None

    @property
    def is_sent(self) -> bool:
        """Whether other ranks take part in the decision."""
        return self._transport is not None

    @property
    def bytes_sent(self) -> int:
        """Bytes of control messages that each rank sends per step."""
        return 0 if self._transport is None else (self._transport.size - 1) * 8 * self._n_words

    def expect(self) -> None:
        """Post the receives of the next messages."""
        if self._expected is None and self._transport is not None:
            self._expected = Exchange(_gather(self._transport, 8 * self._n_words), 1)

    def prepare(self) -> Exchange[Tensor]:
        """Return the exchange that is sent a message and gives everyone's, int64[N, W]."""
        self.expect()
        exchange, self._expected = self._expected, None
        assert exchange is not None
        return exchange

    def message(
        self,
        step: int | Tensor,
        rates: Sequence[Hyperparameters],
        *,
        flags: int,
        overflow: Tensor | int | None,
        nonfinite: Tensor,
        present: Sequence[bool],
        layout: int,
        microseconds: int,
    ) -> Tensor:
        """Write this rank's words, int64[W], without waiting for the device.

        ``nonfinite`` is int32[T], 1 where a parameter's update is not finite; ``present`` tells who has a gradient:
        both in the order of the buckets.
        """
        if self._order is not None:
            nonfinite, present = nonfinite[self._from_buckets], [present[i] for i in self._order]
        words = [WIRE_VERSION, step, layout, *(_bits_of(rate) for i in self._groups for rate in rates[i].words())]
        words += [flags, 0 if overflow is None else overflow, microseconds, self._first(nonfinite), *_bitmap(present)]
        return self._filled(words)

    def blank(self, flags: int, step: int | Tensor) -> Tensor:
        """Write the words of a rank that takes no step, int64[W]."""
        words: list[int | Tensor] = [0] * self._n_words
        words[1], words[self._agreed] = step, flags
        return self._filled(words)

    @property
    def _is_read(self) -> bool:
        """Whether the host may read what it computes."""
        return self._device.type == "cpu" and not self._capturable

    def _first(self, nonfinite: Tensor) -> Tensor | int:
        """Return 1 + the index of the first parameter that is not finite, 0 where all are."""
        if self._is_read:
            return next((i for i, bad in enumerate(nonfinite.tolist(), start=1) if bad), 0)
        is_bad = nonfinite != 0
        return torch.where(is_bad.any(), self._n_tensors + 1 - (is_bad * self._first_counts).amax(), 0)

    def _filled(self, words: Sequence[int | Tensor]) -> Tensor:
        """Return int64[W] of numbers and 0-dim tensors on the device."""
        if self._capturable:
            # numbers are arguments of the kernels that write them, and not copied
            made = [torch.empty((), dtype=torch.int64, device=self._device) for _ in words]
            return torch.stack([room.fill_(_scalar_of(word)) for room, word in zip(made, words, strict=True)])
        known = [0 if isinstance(word, Tensor) and not self._is_read else int(word) for word in words]
        found = torch.tensor(known, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
        if self._is_read:
            return found
        found = found.to(self._device, non_blocking=True)
        for i, word in enumerate(words):
            if isinstance(word, Tensor):
                found[i] = _scalar_of(word)
        return found

    def decide(self, everyone: Tensor) -> Decision:
        """Decide from everyone's words int64[N, W], on the device: the same on every rank."""
        if self._is_read and (found := self._decide_at_once(everyone)) is not None:
            return found
        n = self._agreed
        flags, overflow, first = everyone[:, n], everyone[:, n + 1] != 0, everyone[:, n + 3]
        is_bad = first != 0
        failed, unverified = (flags & FAILED) != 0, (flags & UNVERIFIED) != 0
        reasons = torch.stack(
            [
                is_bad.any(),
                overflow.any(),
                unverified.any(),
                self._differences(everyone).any(),
                ((flags & STALE) != 0).any(),
                failed.any(),
            ]
        )
        reason = (reasons * self._weights).amax()
        least = torch.where(is_bad, first, self._n_tensors + 1).amin()
        who = torch.where(reason == R_FAILED, failed, torch.where(reason == R_UNVERIFIED, unverified, first == least))
        rank = len(self._first_ranks) - (who * self._first_ranks).amax()
        present = ((everyone[:, self._words] >> self._shifts) & 1).amax(0)
        active = (present * (reason == COMMIT)).to(torch.int32)
        if self._order is not None:
            active = active[self._to_buckets]
        report = torch.stack([reason, everyone[0, 1], least, rank, active.sum(), everyone[:, n + 2].amax()])
        return Decision(active, report, everyone)

    def _decide_at_once(self, everyone: Tensor) -> Decision | None:
        """`decide` by the host where all ranks agree that all parameters move, else None: a tenth of the time."""
        n, rows = self._agreed, everyone.tolist()
        heads = [row[:n] for row in rows]
        if self._layouts is not None:
            for head, peer in zip(heads, self._layouts, strict=True):
                head[_LAYOUT] -= rows[peer][_LAYOUT]
        fine = all(
            head == heads[0] and not any(row[n : n + 2]) and not row[n + 3]
            for head, row in zip(heads, rows, strict=True)
        )
        columns = zip(*(row[self._bitmap :] for row in rows), strict=True)
        if not fine or [functools.reduce(operator.or_, column) for column in columns] != self._full:
            return None
        report = Report(COMMIT, rows[0][1], 0, 0, self._n_tensors, max(row[n + 2] for row in rows))
        return Decision(self._all_active, None, everyone, report)

    def _differences(self, everyone: Tensor) -> Tensor:
        """Return for each word that must be equal on all ranks whether it is not, bool[N, agreed]."""
        head = everyone[:, : self._agreed]
        expected = head[:1]
        if self._layouts is not None:
            expected = expected.repeat(len(head), 1)
            expected[:, _LAYOUT] = head[self._peers, _LAYOUT]
        return head != expected

    def have_flag(self, everyone: Tensor, flag: int) -> Tensor:
        """Return whether all ranks have set a flag, as a tensor."""
        return ((everyone[:, self._agreed] & flag) != 0).all()

    def nonfinite_error(self, report: Report, everyone: Tensor | None = None) -> NonFiniteError:
        """Return the error of a step that is not finite; everyone's words tell all ranks that saw it."""
        ranks = [report.rank]
        if everyone is not None:
            firsts = everyone[:, self._agreed + 3].tolist()
            ranks = [rank for rank, first in enumerate(firsts) if first == report.param]
        return NonFiniteError(
            f"step {report.step}: a gradient, momentum or update is not finite, first in parameter "
            f"{self._names[report.param - 1]} on rank {', '.join(map(str, ranks))}; no worker changed anything"
        )

    def disagreement(self, report: Report, everyone: Tensor | None = None) -> WorkersDisagreeError:
        """Return the error that all ranks raise; everyone's words tell which values differ."""
        if report.reason == R_FAILED:
            return WorkersDisagreeError(
                f"step {report.step} was taken by no worker, because of an error on rank {report.rank} (reported there)"
            )
        if report.reason == R_UNVERIFIED:
            return WorkersDisagreeError(
                f"workers disagree on whether state or param groups are new or loaded at step {report.step}: "
                f"rank {report.rank} has such, not all others; no worker changed anything"
            )
        if everyone is None:
            return WorkersDisagreeError(
                "workers disagree on the step, the bucket layout or the hyperparameters (lr, betas, weight_decay, "
                f"maximize) at step {report.step}; no worker changed anything"
            )
        head, differs = everyone[:, : self._agreed].cpu(), self._differences(everyone).any(0)
        i = int(differs.to(torch.int64).argmax())
        if i < len(_HEAD):
            values = head[:, i].tolist()
            shown = values if i < 2 else [f"hash {value & (2**64 - 1):016x}" for value in values]
            return WorkersDisagreeError(f"workers disagree on {_HEAD[i]} at step {report.step}: {by_value(shown)}")
        place, rate = divmod(i - len(_HEAD), len(_RATES))
        name = f"{_RATES[rate]} of param group {self._groups[place]}"
        values = head[:, i].contiguous().view(torch.float64).tolist()
        return WorkersDisagreeError(
            f"workers disagree on the hyperparameters ({name}) at step {report.step}: {by_value(values)}"
        )


def _gather(transport: Transport, n_bytes: int) -> Phases[Tensor]:
    """Gather everyone's message."""
    channel = transport.channel(n_bytes, _TAG, eager=True)
    message = yield None
    everyone = yield channel.send(message.view(torch.uint8))
    yield Done(everyone.view(torch.int64))


def _bits_of(rate: Scalar) -> int | Tensor:
    """Return the bits of a number as float64."""
    if isinstance(rate, Tensor):
        return rate.double().view(torch.int64)
    bits: int = struct.unpack("<q", struct.pack("<d", rate))[0]
    return bits


def _scalar_of(word: int | Tensor) -> int | Tensor:
    """Return a word as a number or a 0-dim int64 tensor."""
    return word.view(()).to(torch.int64) if isinstance(word, Tensor) else word


def _bitmap(present: Sequence[bool]) -> list[int]:
    return [
        sum(1 << i for i, has in enumerate(present[start : start + _BITS]) if has)
        for start in range(0, len(present), _BITS)
    ]


class LateReport:
    """The report of capturable steps, which the host reads at the next step, or on demand.

    An error that was not raised yet is kept. Where ``raises`` is false, a step that is not finite is only counted.
    """

    def __init__(self, device: torch.device, *, raises: bool) -> None:
        self._report = torch.zeros(6, dtype=torch.int64, device=device)
        self._raises = raises
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        # the last step's report on the host, and when it is there
        self._last = torch.zeros(6, dtype=torch.int64, device="cpu").pin_memory() if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def note(self, decision: Decision, clock: Tensor) -> None:
        """Take the report of a step, without waiting for the device."""
        reason = decision.words[0]
        is_passed_over = (reason == OVERFLOW) | (reason == NONFINITE)
        # an overflow that a GradScaler found is no error
        is_error = reason >= R_UNVERIFIED
        if self._raises:
            is_error = is_error | (reason == NONFINITE)
        news = torch.where(is_error, decision.words, 0)
        news[1] = torch.where(is_error, clock, 0)
        self._report.copy_(torch.where(self._report[0] == COMMIT, news, self._report))
        self.skipped.add_(is_passed_over.to(torch.int64))

    def keep(self) -> None:
        """Copy the report to the host, without waiting."""
        if self._last is not None:
            self._last.copy_(self._report, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def raise_last(self, control: Control) -> None:
        """Raise what the last step reported, and no more: what has been launched since is not waited for."""
        if self._last is None:
            self._raise(self._report, control)
        elif self._copied is not None:
            self._copied.synchronize()
            self._raise(self._last, control)

    def raise_all(self, control: Control) -> None:
        """Raise what any step has reported; waits for the device."""
        self._raise(self._report, control)

    def _raise(self, report: Tensor, control: Control) -> None:
        found = Report(*report.tolist())
        if found.reason == COMMIT:
            return
        self._report.zero_()
        if self._last is not None:
            if self._copied is not None:
                # a copy of it that is in progress would bring it back
                self._copied.synchronize()
            self._last.zero_()
        raise control.nonfinite_error(found) if found.reason == NONFINITE else control.disagreement(found)

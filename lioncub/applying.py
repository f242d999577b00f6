"""The second half of a step: all parameters and their momentum move by the votes, after everything is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lioncub.buckets import Bucket
from lioncub.kernels import Rounding, foreach_apply_codes_, foreach_apply_votes_, foreach_lion_step_
from lioncub.masters import Masters
from lioncub.synchronizing import Means
from lioncub.voting import BucketVote, Draft


def plan_bucket(
    bucket: Bucket,
    vote: BucketVote,
    means: Means | None,
    taking_part: Sequence[bool],
    draft: Draft,
    masters: Masters,
    rounding: Rounding | None,
) -> Callable[[], None]:
    """The move of the parameters that take part, of their momentum: by the votes, or alone by plain Lion.

    ``means`` take the place of the momentum that was averaged. Parameters that have masters are these, rounded to
    nearest; others are rounded as ``rounding`` says. Everything that can be refused is done here; the call that is
    returned only computes and writes.
    """
    chosen = [i for i, takes_part in enumerate(taking_part) if takes_part]
    slots = [bucket.slots[i] for i in chosen]
    params = [masters.of(slot.name, slot.param) for slot in slots]
    how: dict[str, Any] = {"rounding": rounding, "tensors": [slot.number for slot in slots], "impl": draft.impl}
    write_back = partial(masters.write_back, [slot.param for slot in slots])
    grads = [vote.ballot.grads[i] for i in chosen]
    momenta = [bucket.momenta[i] for i in chosen]
    now, grad_scale = draft.now[bucket.group_index], draft.grad_scale_of(bucket)
    if vote.voted is None:
        alone = partial(
            foreach_lion_step_,
            params,
            grads,
            momenta,
            lr=now.lr,
            beta1=now.beta1,
            beta2=now.beta2,
            weight_decay=now.weight_decay,
            grad_scale=grad_scale,
            **how,
        )
        return partial(_move, bucket, alone, write_back, None)
    codes, workers = bucket.compression.codes, len(vote.headers)
    bits = codes.result_bits(workers)
    packed = bucket.split(vote.voted, bits)
    by_result: Callable[..., None] = foreach_apply_votes_
    if codes.result == "ternary":
        by_result = partial(foreach_apply_codes_, bits=bits, step=1, offset=1)
    elif codes.result == "sum":
        step, offset = codes.value(workers)
        by_result = partial(foreach_apply_codes_, bits=bits, step=step, offset=offset, divisor=workers)
    apply = partial(
        by_result,
        params,
        [packed[i] for i in chosen],
        lr=now.lr,
        weight_decay=now.weight_decay,
        grad=grads,
        exp_avg=momenta,
        beta2=now.beta2,
        grad_scale=grad_scale,
        **how,
    )
    return partial(_move, bucket, apply, write_back, means)


def _move(
    bucket: Bucket,
    apply: Callable[[], None],
    write_back: Callable[[], None],
    means: Means | None,
) -> None:
    apply()
    write_back()
    if means is not None:
        means.write(bucket)

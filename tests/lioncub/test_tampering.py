"""Parameters, state and gradients exchanged behind an optimizer's back are noticed, and a step changes nothing."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import Undo, move, put, put_data
from gloo_workers import said_by
from nets import all_bits, give_gradients, randn, two_groups
from optimizers import Lion, LionCub
from torch import Tensor

from lioncub import Quantized
from lioncub.simulate import Workers


def clear_state(opt: Any) -> Undo:
    kept = dict(opt.state)
    opt.state.clear()
    return lambda: opt.state.update(kept)


def grow_parameter(opt: Any) -> Undo:
    param = opt.param_groups[0]["params"][0]
    grad, param.grad = param.grad, None
    undo_data = put_data(param, torch.ones(64, 64))
    param.grad = torch.ones(64, 64)

    def undo() -> None:
        param.grad = None
        undo_data()
        param.grad = grad

    return undo


def first_state(opt: Any, name: str) -> dict[str, Any]:
    return next(opt.state[p] for group in opt.param_groups for p in group["params"] if name in opt.state[p])


def replaced(name: str, param: str) -> tuple[Callable[[Any], Undo], str]:
    def change(opt: Any) -> Undo:
        return put(first_state(opt, name), name, first_state(opt, name)[name].clone())

    return change, f"state of parameter {param}: expected the {name} .*, got another object"


def moved(name: str, param: str) -> tuple[Callable[[Any], Undo], str]:
    def change(opt: Any) -> Undo:
        return move(first_state(opt, name)[name])

    return change, f"state of parameter {param}: expected the {name} .*, got one in other memory"


def params_of(opt: Any) -> list[Tensor]:
    return opt.param_groups[0]["params"]  # type: ignore[no-any-return]


TAMPERING: dict[str, tuple[Callable[[Any], Undo], str]] = {
    "replaced": (
        lambda opt: put(params_of(opt), 1, params_of(opt)[1].detach().clone().requires_grad_()),
        r"param_groups\[0\]\['params'\]\[1\]: expected parameter b, .*, got another tensor",
    ),
    "swapped": (
        lambda opt: put(params_of(opt), slice(None), params_of(opt)[::-1]),
        r"param_groups\[0\]\['params'\]\[0\]: expected parameter a, .*, got b; add",
    ),
    "reordered": (
        lambda opt: put(opt.param_groups, slice(None), opt.param_groups[::-1]),
        r"param_groups\[0\]\['params'\]: expected 2 parameters, .*, got 1; add",
    ),
    "popped": (
        lambda opt: put(opt.param_groups, slice(None), opt.param_groups[:1]),
        "param_groups: expected 2 groups, .*, got 1; add parameters by add_param_group",
    ),
    "emptied": (
        lambda opt: put(opt.param_groups[1]["params"], slice(None), []),
        r"param_groups\[1\]\['params'\]: expected 1 parameters, .*, got 0",
    ),
    "appended": (
        lambda opt: put(params_of(opt), slice(None), [*params_of(opt), torch.zeros(3).requires_grad_()]),
        r"param_groups\[0\]\['params'\]: expected 2 parameters, .*, got 3",
    ),
    "state replaced": (
        lambda opt: put(vars(opt), "state", defaultdict(dict, {p: dict(s) for p, s in opt.state.items()})),
        "state: expected the dictionary made at construction, .*, got another one",
    ),
    "state cleared": (clear_state, "state of parameter a: expected .*exp_avg .*, got"),
    "exp_avg": replaced("exp_avg", "a"),
    "exp_avg moved": moved("exp_avg", "a"),
    "master": replaced("master", "c"),
    "master moved": moved("master", "c"),
    "grown": (grow_parameter, r"parameter a: expected .* as when the optimizer was built, got .*\(64, 64\)"),
    "channels_last": (
        lambda opt: put_data(params_of(opt)[0], params_of(opt)[0].data.to(memory_format=torch.channels_last)),
        "parameter a: expected .* as when the optimizer was built, got",
    ),
    "gradient": (
        lambda opt: put_data(params_of(opt)[1].grad, torch.ones(400)),  # type: ignore[arg-type]
        r"gradient of b: expected the parameter's shape \(300,\) on cpu, got \(400,\) on cpu",
    ),
    # what only votes keep
    "scale": replaced("scale", "a"),
    "drift": moved("drift", "a"),
}
# `Lion` has no buckets that its state must stay in
TAKEN_BY_LION = ("state replaced", "exp_avg", "exp_avg moved", "master", "master moved")
OF_VOTES = ("scale", "drift")


def assert_noticed(opt: Any, how: str, step: Callable[[], Any]) -> None:
    tamper, message = TAMPERING[how]
    before = all_bits(opt)
    undo = tamper(opt)
    for _ in range(2):
        # simulated workers note who raised what
        with pytest.raises((RuntimeError, ValueError), match=message):
            step()
    undo()
    assert all_bits(opt) == before
    step()
    assert all_bits(opt)[0] != before[0], "usable again"


@pytest.mark.parametrize("how", [how for how in TAMPERING if how not in OF_VOTES])
@pytest.mark.parametrize("kind", ["Lion", "LionCub", "capturable"])
def test_one_worker_notices(kind: str, how: str) -> None:
    if kind == "Lion" and how in TAKEN_BY_LION:
        assert_lion_goes_on(how)
        return
    params, groups = two_groups()
    options: dict[str, Any] = {"lr": 0.1, "master_weights": True}
    opt = Lion(groups, **options) if kind == "Lion" else LionCub(groups, capturable=kind == "capturable", **options)
    give_gradients(params)
    assert_noticed(opt, how, opt.step)


def assert_lion_goes_on(how: str) -> None:
    """What fits is stepped on, as if nothing had been exchanged."""
    made = [two_groups() for _ in range(2)]
    opts = [Lion(groups, lr=0.1, master_weights=True) for _, groups in made]
    for step in range(3):
        for (params, _), opt in zip(made, opts, strict=True):
            give_gradients(params, seed=step)
            if step and opt is opts[1]:
                TAMPERING[how][0](opt)
            opt.step()
    assert all_bits(opts[0]) == all_bits(opts[1])


@pytest.mark.parametrize("how", TAMPERING)
def test_simulated_workers_notice(how: str) -> None:
    options: dict[str, Any] = {
        "compression": Quantized(share_scales_every=1),
        "master_weights": True,
        "drift_every": 1,
    }
    with Workers(2) as workers:
        made = [two_groups() for _ in range(2)]
        opts = workers.run(lambda rank, group: LionCub(made[rank][1], lr=0.1, process_group=group, **options))
        for params, _ in made:
            give_gradients(params)

        def step() -> None:
            workers.run(lambda rank, _: opts[rank].step())

        step()
        other = made[0][0][0].detach().clone()
        assert_noticed(opts[1], how, step)
        assert not torch.equal(other, made[0][0][0])
        workers.run(lambda rank, _: opts[rank].check_replicas())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.to(torch.bfloat16),
        lambda t: t[:1].clone(),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.to("meta"),
        lambda t: None,
    ],
)
def test_lion_refuses_a_momentum_that_does_not_fit(wrong: Callable[[Tensor], Any]) -> None:
    params, groups = two_groups()
    opt = Lion(groups, lr=0.1)
    give_gradients(params)
    opt.step()
    before, state = all_bits(opt), opt.state[params[0]]
    undo = put(state, "exp_avg", wrong(state["exp_avg"]))
    message = r"state of parameter a: expected exp_avg of \(dtype, shape, strides, device\)"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    undo()
    assert all_bits(opt) == before
    opt.step()
    assert all_bits(opt)[0] != before[0]


@pytest.mark.parametrize("optimizer", [Lion, LionCub])
def test_what_was_exchanged_cannot_be_loaded_into_or_added_to(optimizer: Any) -> None:
    opt = optimizer(two_groups()[1])
    saved = copy.deepcopy(opt.state_dict())
    undo = TAMPERING["popped"][0](opt)
    for call in (lambda: opt.load_state_dict(saved), lambda: opt.add_param_group({"params": [randn(2)]})):
        assert said_by(call).startswith("RuntimeError: param_groups: expected 2 groups")
    undo()
    opt.load_state_dict(saved)


def test_a_copied_lion_holds_its_own() -> None:
    p = randn(5).requires_grad_()
    twin = copy.deepcopy(Lion([p], lr=0.5))
    (q,) = params_of(twin)
    undo = TAMPERING["appended"][0](twin)
    assert said_by(twin.step).startswith("RuntimeError: param_groups[0]['params']: expected 1 parameters, ")
    undo()
    q.grad = torch.ones(5)
    twin.step()
    assert torch.equal(q, p - 0.5)

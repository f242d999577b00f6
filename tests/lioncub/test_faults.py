"""What goes wrong in one process, or in simulated ones, is said and changes nothing: parameters, state, arguments."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import Lion, LionCub
from torch import Tensor, nn

from lioncub import BySize, MomentumSync, Quantized, SignVote, TernaryVote
from lioncub.precision import Precision
from lioncub.simulate import Workers

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
    return [p.to(dtype).requires_grad_() for p in made]


def give_gradients(params: list[Tensor], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p.dtype)


# tensors that lioncub makes have the dtype and device that they need, whatever torch's defaults are

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "quantized": {
        "compression": Quantized(bits=4, block=64, stochastic=True, share_scales_every=1),
        "momentum_sync": MomentumSync(every=2, dtype="int8"),
        "drift_every": 1,
    },
    "auto": {"momentum_sync": MomentumSync(select="auto", budget=8.0), "drift_every": 1, "algorithm": "all_reduce"},
    "masters": {"master_weights": True, "compression": TernaryVote(), "algorithm": "reduce_scatter"},
    "stochastic": {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "compression": SignVote()},
}


def train_simulated(options: dict[str, Any]) -> list[Tensor]:
    with Workers(2) as workers:
        params = [[*params_of((7, 5), (300,)), *params_of((65,), dtype=torch.bfloat16)] for _ in range(2)]
        opts = workers.run(lambda rank, group: LionCub(params[rank], lr=0.1, process_group=group, **options))
        for step in range(3):
            for rank in range(2):
                give_gradients(params[rank], seed=10 * step + rank)
            workers.run(lambda rank, _: opts[rank].step())
        return [*params[0], *(t for p in params[0] for t in opts[0].state[p].values())]


def train_alone(optimizer: Any, **options: Any) -> list[Tensor]:
    params = [*params_of((7, 5), (300,)), *params_of((65,), dtype=torch.bfloat16)]
    opt = optimizer(params, lr=0.1, **options)
    for step in range(3):
        give_gradients(params, seed=step)
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return [*params, *(t for p in params for t in opt.state[p].values())]


RUNS: dict[str, Callable[[], list[Tensor]]] = {
    **{name: (lambda options=options: train_simulated(options)) for name, options in CONFIGURATIONS.items()},
    "Lion": lambda: train_alone(Lion, param_rounding="stochastic"),
    "capturable": lambda: train_alone(LionCub, capturable=True, master_weights=True),
}


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("run", RUNS)
def test_the_default_dtype_and_device_change_nothing(run: str) -> None:
    expected = RUNS[run]()
    for dtype, device in ((torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (None, "meta")):
        torch.set_default_dtype(dtype or torch.float32)
        torch.set_default_device(device)
        for i, (got, want) in enumerate(zip(RUNS[run](), expected, strict=True)):
            assert got.dtype == want.dtype
            assert torch.equal(got.nan_to_num(), want.nan_to_num()), f"tensor {i} under {dtype}, {device}"
        torch.set_default_device(None)


# what a step moves is what the groups hold


def replace_parameter(opt: Any) -> Callable[[], None]:
    params = opt.param_groups[0]["params"]
    kept, params[1] = params[1], params[1].detach().clone().requires_grad_()
    return lambda: params.__setitem__(1, kept)


def swap_parameters(opt: Any) -> Callable[[], None]:
    opt.param_groups[0]["params"].reverse()
    return opt.param_groups[0]["params"].reverse


def reorder_groups(opt: Any) -> Callable[[], None]:
    opt.param_groups.reverse()
    return opt.param_groups.reverse


def pop_group(opt: Any) -> Callable[[], None]:
    group = opt.param_groups.pop()
    return lambda: opt.param_groups.append(group)


def empty_group(opt: Any) -> Callable[[], None]:
    params = opt.param_groups[1]["params"]
    kept = list(params)
    params.clear()
    return lambda: params.extend(kept)


def append_parameter(opt: Any) -> Callable[[], None]:
    opt.param_groups[0]["params"].append(torch.zeros(3).requires_grad_())
    return lambda: opt.param_groups[0]["params"].pop()


def replace_state(opt: Any) -> Callable[[], None]:
    kept, opt.state = opt.state, defaultdict(dict, {p: dict(state) for p, state in opt.state.items()})
    return lambda: setattr(opt, "state", kept)


def clear_state(opt: Any) -> Callable[[], None]:
    kept = dict(opt.state)
    opt.state.clear()
    return lambda: opt.state.update(kept)


def _entry(opt: Any, name: str) -> tuple[dict[str, Any], Tensor]:
    state = next(opt.state[p] for group in opt.param_groups for p in group["params"] if name in opt.state[p])
    return state, state[name]


def replace_entry(name: str) -> Callable[[Any], Callable[[], None]]:
    def replace(opt: Any) -> Callable[[], None]:
        state, kept = _entry(opt, name)
        state[name] = kept.clone()
        return lambda: state.__setitem__(name, kept)

    return replace


def move_entry(name: str) -> Callable[[Any], Callable[[], None]]:
    def move(opt: Any) -> Callable[[], None]:
        tensor = _entry(opt, name)[1]
        kept, tensor.data = tensor.data, tensor.data.clone()
        return lambda: setattr(tensor, "data", kept)

    return move


def grow_parameter(opt: Any) -> Callable[[], None]:
    param = opt.param_groups[0]["params"][0]
    kept, grad, param.grad = param.data, param.grad, None
    param.data = torch.ones(64, 64)
    param.grad = torch.ones(64, 64)

    def undo() -> None:
        param.grad = None
        param.data = kept
        param.grad = grad

    return undo


def turn_parameter(opt: Any) -> Callable[[], None]:
    param = opt.param_groups[0]["params"][0]
    kept, param.data = param.data, param.data.to(memory_format=torch.channels_last)
    return lambda: setattr(param, "data", kept)


def grow_gradient(opt: Any) -> Callable[[], None]:
    grad = opt.param_groups[0]["params"][1].grad
    kept, grad.data = grad.data, torch.ones(400)
    return lambda: setattr(grad, "data", kept)


TAMPERING = {
    "replaced": (
        replace_parameter,
        r"param_groups\[0\]\['params'\]\[1\]: expected parameter b, .*, got another tensor",
    ),
    "swapped": (swap_parameters, r"param_groups\[0\]\['params'\]\[0\]: expected parameter a, .*, got b; add"),
    "reordered": (reorder_groups, r"param_groups\[0\]\['params'\]: expected 2 parameters, .*, got 1; add"),
    "popped": (pop_group, "param_groups: expected 2 groups, .*, got 1; add parameters by add_param_group"),
    "emptied": (empty_group, r"param_groups\[1\]\['params'\]: expected 1 parameters, .*, got 0"),
    "appended": (append_parameter, r"param_groups\[0\]\['params'\]: expected 2 parameters, .*, got 3"),
    "state replaced": (replace_state, "state: expected the dictionary made at construction, .*, got another one"),
    "state cleared": (clear_state, "state of parameter a: expected .*exp_avg .*, got"),
    "exp_avg": (replace_entry("exp_avg"), "state of parameter a: expected the exp_avg .*, got another object"),
    "exp_avg moved": (move_entry("exp_avg"), "state of parameter a: expected the exp_avg .*, got one in other memory"),
    "master": (replace_entry("master"), "state of parameter c: expected the master .*, got another object"),
    "master moved": (move_entry("master"), "state of parameter c: expected the master .*, got one in other memory"),
    "grown": (grow_parameter, r"parameter a: expected .* as when the optimizer was built, got .*\(64, 64\)"),
    "channels_last": (turn_parameter, "parameter a: expected .* as when the optimizer was built, got"),
    "gradient": (grow_gradient, r"gradient of b: expected the parameter's shape \(300,\) on cpu, got \(400,\) on cpu"),
}
# what only votes keep
TAMPERING_OF_VOTES = {
    "scale": (replace_entry("scale"), "state of parameter a: expected the scale .*, got another object"),
    "drift": (move_entry("drift"), "state of parameter a: expected the drift .*, got one in other memory"),
}


def two_groups() -> tuple[list[Tensor], list[dict[str, Any]]]:
    params = [*params_of((4, 3, 2, 2), (300,)), *params_of((9,), dtype=torch.bfloat16)]
    named = list(zip("abc", params, strict=True))
    return params, [{"params": named[:2]}, {"params": named[2:], "lr": 0.5}]


def bits(opt: Any, params: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for p in params for t in (p, *opt.state[p].values())]


def assert_tampering_is_noticed(opt: Any, params: list[Tensor], how: str, step: Callable[[], Any]) -> None:
    tamper, message = {**TAMPERING, **TAMPERING_OF_VOTES}[how]
    before = bits(opt, params)
    undo = tamper(opt)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            step()
    undo()
    for one, other in zip(bits(opt, params), before, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    step()
    assert not torch.equal(params[0], before[0]), "usable again"


# `Lion` has no buckets that its state must stay in
TAKEN_BY_LION = ("state replaced", "exp_avg", "exp_avg moved", "master", "master moved")


@pytest.mark.parametrize("how", TAMPERING)
@pytest.mark.parametrize("kind", ["Lion", "LionCub", "capturable"])
def test_other_parameters_or_state_are_noticed(kind: str, how: str) -> None:
    if kind == "Lion" and how in TAKEN_BY_LION:
        assert_lion_takes(how)
        return
    params, groups = two_groups()
    made: Any = Lion if kind == "Lion" else LionCub
    opt = made(groups, lr=0.1, master_weights=True, **({"capturable": True} if kind == "capturable" else {}))
    give_gradients(params)
    assert_tampering_is_noticed(opt, params, how, opt.step)


def assert_lion_takes(how: str) -> None:
    """What fits is stepped on, as if nothing had been exchanged."""
    made = [two_groups() for _ in range(2)]
    one, other = (Lion(groups, lr=0.1, master_weights=True) for _, groups in made)
    for step in range(3):
        for (params, _), opt in zip(made, (one, other), strict=True):
            give_gradients(params, seed=step)
            if step and opt is other:
                TAMPERING[how][0](opt)
            opt.step()
    for p, q in zip(made[0][0], made[1][0], strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, other.state[q][name]) for name, t in one.state[p].items())


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
    before = bits(opt, params)
    state = opt.state[params[0]]
    kept, state["exp_avg"] = state["exp_avg"], wrong(state["exp_avg"])
    with pytest.raises(
        RuntimeError, match=r"state of parameter a: expected exp_avg of \(dtype, shape, strides, device\)"
    ):
        opt.step()
    state["exp_avg"] = kept
    assert all(torch.equal(t, u) for t, u in zip(bits(opt, params), before, strict=True))
    opt.step()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("how", {**TAMPERING, **TAMPERING_OF_VOTES})
def test_other_parameters_or_state_are_noticed_among_simulated_workers(how: str) -> None:
    with Workers(2) as workers:
        made = [two_groups() for _ in range(2)]
        options: dict[str, Any] = {
            "compression": Quantized(share_scales_every=1),
            "master_weights": True,
            "drift_every": 1,
        }
        opts = workers.run(lambda rank, group: LionCub(made[rank][1], lr=0.1, process_group=group, **options))
        for params, _ in made:
            give_gradients(params)
        workers.run(lambda rank, _: opts[rank].step())
        both = lambda: workers.run(lambda rank, _: opts[rank].step())  # noqa: E731
        other = bits(opts[0], made[0][0])
        assert_tampering_is_noticed(opts[1], made[1][0], how, both)
        assert not torch.equal(other[0], made[0][0][0])
        workers.run(lambda rank, _: opts[rank].check_replicas())


@BOTH
def test_what_was_exchanged_cannot_be_loaded_into_or_added_to(optimizer: Any) -> None:
    opt = optimizer(two_groups()[1])
    saved = copy.deepcopy(opt.state_dict())
    undo = pop_group(opt)
    for call in (lambda: opt.load_state_dict(saved), lambda: opt.add_param_group({"params": params_of((2,))})):
        with pytest.raises(RuntimeError, match="param_groups: expected 2 groups"):
            call()
    undo()
    opt.load_state_dict(saved)


def test_a_copied_lion_holds_its_own() -> None:
    (p,) = params_of((5,))
    twin = copy.deepcopy(Lion([p], lr=0.5))
    (q,) = twin.param_groups[0]["params"]
    twin.param_groups[0]["params"].append(torch.zeros(3).requires_grad_())
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]: expected 1 parameters, .*, got 2"):
        twin.step()
    twin.param_groups[0]["params"].pop()
    q.grad = torch.ones(5)
    twin.step()
    assert torch.equal(q, p - 0.5)


# arguments


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e39}, r"lr: expected a finite number >= 0, got 1e\+39, which float32 cannot hold"),
        ({"lr": 10**400}, "lr: expected a number that float64 holds"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr: expected a number or a 0-dim tensor"),
        ({"lr": True}, "lr: expected a number or a 0-dim tensor, got True"),
        ({"weight_decay": 1e39}, "weight_decay: expected a finite number >= 0"),
        ({"lr": 1e30, "weight_decay": 1e30}, r"weight_decay: expected lr \* weight_decay finite in float32"),
        ({"betas": (math.nan, 0.9)}, r"betas\[0\]: expected a number in \[0, 1\)"),
        ({"maximize": "false"}, "maximize: expected True or False, got 'false'"),
        ({"master_weights": "no"}, "master_weights: expected True or False, got 'no'"),
    ],
)
def test_arguments_of_both(optimizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer(params_of((3,)), **options)


@BOTH
@pytest.mark.parametrize(("name", "value"), [("lr", 1e39), ("maximize", "false"), ("maximize", 1), ("betas", (0.9, 1))])
def test_arguments_are_checked_when_they_are_set_later(optimizer: Any, name: str, value: Any) -> None:
    (p,) = params = params_of((3,))
    opt = optimizer(params)
    give_gradients(params)
    before, opt.param_groups[0][name] = p.detach().clone(), value
    with pytest.raises((ValueError, TypeError), match=f"{name}.*: expected"):
        opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: "no"}, f"{name}: expected True or False, got 'no'")
            for name in ("capturable", "overlap", "broadcast")
        ],
        ({"drift_every": 1.5}, "drift_every: expected a number of steps >= 1, got 1.5"),
        ({"drift_every": True}, "drift_every: expected a number of steps >= 1, got True"),
        ({"process_group": "gloo"}, "process_group: expected a ProcessGroup or None, got str 'gloo'"),
        ({"profile": 3}, "profile: expected a path or a Profile, got int 3"),
    ],
)
def test_arguments_of_lioncub(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LionCub(params_of((3,)), **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Quantized, {"bits": 2.0}, "bits: expected an integer, got 2.0"),
        (Quantized, {"stochastic": "no"}, "stochastic: expected True or False, got 'no'"),
        (Quantized, {"seed": 1.5}, "seed: expected an integer, got 1.5"),
        (Quantized, {"block": True}, "block: expected an integer, got True"),
        (Quantized, {"share_scales_every": 1.5}, "share_scales_every: expected None or a number of steps >= 1"),
        (Quantized, {"stochastic": 1}, "stochastic: expected True or False, got 1"),
        (BySize, {"max_numel": 2.5}, "max_numel: expected a number of elements >= 1, got 2.5"),
        (MomentumSync, {"every": 1.5}, "every: expected a number of steps >= 1, got 1.5"),
        (MomentumSync, {"select": [3]}, r"select: expected patterns, which are strings, got \[3\]"),
        (MomentumSync, {"select": 3}, "select: expected 'auto', a list of patterns or a function, got 3"),
        (MomentumSync, {"select": "auto", "budget": True}, "budget: expected a fraction > 0 or None, got True"),
        (Precision, {"rounding_seed": 0.5}, "rounding_seed: expected an integer, got 0.5"),
    ],
)
def test_arguments_of_configurations(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**options)


@pytest.mark.parametrize("sizes", [{"size": 2.0}, {"size": True}, {"size": 2, "local_size": 1.0}])
def test_numbers_of_simulated_workers(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="size: expected a number of workers >= 1"):
        Workers(**sizes)


@BOTH
@pytest.mark.parametrize(
    ("param", "message"),
    [
        (
            lambda: torch.zeros(3, device="meta"),
            "parameter w: expected a tensor with data, got one on the meta device",
        ),
        (lambda: torch.zeros(3).to_sparse(), "parameter w: expected a dense tensor, got layout torch.sparse_coo"),
        (lambda: torch.zeros(3, dtype=torch.complex64), "parameter w: expected dtype float32, .* got torch.complex64"),
        (lambda: torch.zeros(3, dtype=torch.int64), "parameter w: expected dtype float32, .* got torch.int64"),
        (nn.UninitializedParameter, "parameter w: expected an initialized tensor, got a lazy one"),
    ],
)
def test_parameters_that_cannot_be_trained(optimizer: Any, param: Callable[[], Tensor], message: str) -> None:
    made = param()
    if not nn.parameter.is_lazy(made) and (made.is_floating_point() or made.is_complex()):
        made.requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer([("v", torch.zeros(3).requires_grad_()), ("w", made)])


@BOTH
def test_two_meta_parameters_are_not_called_overlapping(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter .* on the meta device"):
        optimizer(nn.Linear(3, 3, device="meta").parameters())


@BOTH
def test_parameters_without_elements_are_taken_in_any_shape(optimizer: Any) -> None:
    params = [torch.zeros(shape).requires_grad_() for shape in ((5, 0), (0, 5), (0,), (2, 0, 3), (4,))]
    opt = optimizer(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert params[-1].tolist() == [-0.5] * 4


def test_an_ordinary_step_is_not_compiled() -> None:
    params = params_of((3,))
    opt = LionCub(params)
    give_gradients(params)
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match=r"capturable: expected LionCub\(capturable=True\) for a step that torch.com"
    ):
        torch.compile(opt.step, backend="eager")()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"expected LionCub\(capturable=True\)"):
        torch.compile(opt.step, backend="eager", fullgraph=True)()


def test_a_scaler_that_saw_no_gradient_says_so() -> None:
    for capturable in (False, True):
        (p,) = params_of((3,))
        opt, scaler = LionCub([p], capturable=capturable), torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        with pytest.raises(RuntimeError, match="GradScaler: expected a gradient on every worker, got none on this one"):
            scaler.step(opt)
        assert opt.stats().steps == 0
        assert not hasattr(opt, "found_inf")


# checkpoints


def spoiled(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def spoil(saved: dict[str, Any]) -> dict[str, Any]:
        change(saved)
        return saved

    return spoil


def of_adamw(saved: dict[str, Any]) -> dict[str, Any]:
    params, groups = two_groups()
    other = torch.optim.AdamW(groups)
    give_gradients(params)
    other.step()
    return other.state_dict()


NOT_OURS = {
    **{
        f"step {step}": (
            spoiled(lambda saved, step=step: [group.update(step=step) for group in saved["param_groups"]]),
            "step: expected an integer",
        )
        for step in (None, math.nan, -5, 2**63, 1.0, True)
    },
    "tensor step": (
        spoiled(lambda saved: [group.update(step=torch.tensor(2.0)) for group in saved["param_groups"]]),
        "step: expected an integer",
    ),
    "two steps": (
        spoiled(lambda saved: saved["param_groups"][1].update(step=3)),
        r"expected one step counter in all param groups, got \[0, 3\]",
    ),
    "no step": (spoiled(lambda saved: saved["param_groups"][1].pop("step")), "that of Lion or LionCub, with a step"),
    "adamw": (of_adamw, "state_dict: expected that of Lion or LionCub, with a step counter in every param group"),
    "adamw's state": (
        spoiled(lambda saved: saved["state"][2].update(exp_avg_sq=torch.zeros(9))),
        "state_dict: expected that of Lion or LionCub, .* got exp_avg_sq of parameter c",
    ),
    "no state": (spoiled(lambda saved: saved.pop("state")), "expected keys 'state' and 'param_groups', got"),
    "state of None": (spoiled(lambda saved: saved["state"].update({1: None})), "state of parameter b as a dictionary"),
    "maximize": (spoiled(lambda saved: saved["param_groups"][1].update(maximize="no")), "maximize: expected True or F"),
    **{
        f"{entry} {kind}": (
            spoiled(
                lambda saved, entry=entry, make=make: saved["state"][2].update({entry: make(saved["state"][2][entry])})
            ),
            f"state_dict: expected {entry} of parameter c as a dense tensor with memory, got {kind}",
        )
        for entry in ("exp_avg", "master")
        for kind, make in (
            ("meta", lambda t: t.to("meta")),
            ("torch.sparse_coo", lambda t: t.to_sparse()),
            ("list", lambda t: t.tolist()),
        )
    },
}


@pytest.mark.parametrize("what", NOT_OURS)
@pytest.mark.parametrize("kind", ["Lion", "LionCub", "capturable"])
def test_a_checkpoint_that_is_not_its_own_changes_nothing(kind: str, what: str) -> None:
    params, groups = two_groups()
    made: Any = Lion if kind == "Lion" else LionCub
    opt = made(groups, lr=0.1, master_weights=True, **({"capturable": True} if kind == "capturable" else {}))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] += 1
    saved["param_groups"][0]["lr"] = 0.7
    spoil, message = NOT_OURS[what]
    before = bits(opt, params)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(spoil(saved))
    for one, other in zip(bits(opt, params), before, strict=True):
        assert torch.equal(one, other)
    assert opt.param_groups[0]["lr"] == 0.1
    assert opt._step_count == 0
    give_gradients(params)
    opt.step()
    assert opt._step_count == 1


@pytest.mark.parametrize("entry", ["scale", "drift"])
def test_what_votes_keep_is_checked_before_anything_is_loaded(entry: str) -> None:
    with Workers(2) as workers:
        made = [two_groups() for _ in range(2)]
        compression = Quantized(share_scales_every=1)
        opts = workers.run(
            lambda rank, group: LionCub(made[rank][1], process_group=group, compression=compression, drift_every=1)
        )
        saved = copy.deepcopy(opts[0].state_dict())
        saved["state"][0]["exp_avg"] += 1
        saved["state"][2][entry] = saved["state"][2][entry].to("meta")
        with pytest.raises(TypeError, match=f"expected {entry} of parameter c as a dense tensor with memory, got meta"):
            opts[0].load_state_dict(saved)
        assert not opts[0].state[made[0][0][0]]["exp_avg"].any()


def test_a_capturable_checkpoint_loads_into_an_ordinary_one_and_back() -> None:
    params, groups = two_groups()
    opt = LionCub(groups, capturable=True)
    give_gradients(params)
    opt.step()
    clock = opt.param_groups[0]["step"]
    other = LionCub(two_groups()[1])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.stats().steps == 1
    other.step()
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    assert opt.param_groups[0]["step"] is clock
    assert clock.item() == 2


# ends


def test_one_worker_can_be_closed() -> None:
    params = params_of((3,))
    opt = LionCub(params, overlap=True)
    give_gradients(params)
    opt.step()
    opt.close()
    opt.close()
    assert opt.state_dict()["param_groups"][0]["step"] == 1
    opt.zero_grad()
    calls: list[Callable[[], Any]] = [
        opt.step,
        opt.stats,
        opt.explain,
        opt.verify,
        opt.sync_momentum,
        opt.check_replicas,
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.add_param_group({"params": params_of((2,))}),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"expected an open optimizer, got one after close\(\)"):
            call()


def test_nothing_keeps_an_optimizer_alive() -> None:
    gc.collect()
    gc.disable()
    threads = threading.active_count()
    try:
        with Workers(2) as workers:
            opts = workers.run(
                lambda rank, group: LionCub(
                    params_of((3,), (2000,)), process_group=group, momentum_sync=MomentumSync(), drift_every=2
                )
            )
            give_gradients([p for opt in opts for p in opt.param_groups[0]["params"]])
            workers.run(lambda rank, _, opts=opts: opts[rank].step())  # type: ignore[misc]
            seen = weakref.ref(opts[0])
            del opts
        alone = weakref.ref(LionCub(params_of((3,))))
        assert seen() is None
        assert alone() is None
    finally:
        gc.enable()
    assert threading.active_count() == threads

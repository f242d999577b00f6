"""Lion and LionCub in one process: arithmetic and torch.optim's protocol."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lion_pytorch import Lion as LionPytorch
from nets import Net, batch_of, bits_of, groups_of, momentum_of
from optimizers import Lion, LionCub
from torch import Tensor

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])


def test_one_worker_is_plain_lion_bit_for_bit() -> None:
    nets = Net(seed=0), Net(seed=0)
    opts = Lion(groups_of(nets[0]), lr=1e-2), LionCub(groups_of(nets[1]), lr=1e-2)
    for net, opt in zip(nets, opts, strict=True):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        for step in range(10):
            opt.zero_grad()
            net(*batch_of(step), use_all=step % 3 == 0).backward()
            opt.step()
            schedule.step()
    assert (bits_of(nets[0]), momentum_of(opts[0])) == (bits_of(nets[1]), momentum_of(opts[1]))
    assert opts[1].stats().bytes_sent_per_step == 0
    assert opts[1].stats().steps == 10


@BOTH
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_against_lion_pytorch(optimizer: type, impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(1009, generator=generator).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ours, peer = (
        optimizer([mine], lr=1e-2, weight_decay=0.1, impl=impl),
        LionPytorch([theirs], lr=1e-2, weight_decay=0.1),
    )
    for _ in range(20):
        mine.grad = torch.randn(1009, generator=generator)
        theirs.grad = mine.grad.clone()
        ours.step()
        peer.step()
    # 20 steps of at most 3 roundings of numbers below 8
    torch.testing.assert_close(mine, theirs, rtol=0, atol=60 * 2.0**-22)


@BOTH
def test_options_of_groups_are_read_at_every_step(optimizer: type) -> None:
    p, q = (torch.zeros(3).requires_grad_() for _ in range(2))
    opt = optimizer([{"params": [p]}, {"params": [q], "lr": 0.25, "weight_decay": 0.5}], lr=1.0)
    p.grad = q.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-1.0] * 3
    assert q.tolist() == [-0.25] * 3
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    opt.param_groups[1]["betas"] = (0.0, 0.0)
    opt.step()
    assert p.tolist() == [-1.5] * 3
    assert q.tolist() == [-0.25 * 0.875 - 0.25] * 3
    assert opt.state[q]["exp_avg"].tolist() == [1.0] * 3


@BOTH
def test_maximize_is_descent_on_negated_gradients(optimizer: type) -> None:
    p, q = (torch.linspace(-1, 1, 70).requires_grad_() for _ in range(2))
    up, down = optimizer([p], lr=0.1, maximize=True), optimizer([q], lr=0.1)
    for step in range(5):
        p.grad = torch.randn(70, generator=torch.Generator().manual_seed(step))
        q.grad = -p.grad
        up.step()
        down.step()
    assert torch.equal(p, q)
    assert torch.equal(up.state[p]["exp_avg"], down.state[q]["exp_avg"])


@BOTH
def test_closures_run_with_gradients(optimizer: type) -> None:
    p = torch.ones(3).requires_grad_()
    opt = optimizer([p], lr=0.5)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure) == 3.0
    assert p.tolist() == [0.5] * 3


@BOTH
def test_step_hooks_run(optimizer: type) -> None:
    p = torch.ones(3).requires_grad_()
    opt = optimizer([p])
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    p.grad = torch.ones(3)
    opt.step()
    assert seen == ["pre", "post"]


@BOTH
def test_parameters_without_gradient_are_left_alone(optimizer: type) -> None:
    p, q = (torch.ones(3).requires_grad_() for _ in range(2))
    opt = optimizer([p, q], lr=0.5, weight_decay=0.5)
    p.grad = torch.ones(3)
    opt.step()
    assert q.tolist() == [1.0] * 3
    assert not opt.state[q]["exp_avg"].any()


@BOTH
def test_gradients_in_another_storage_order_are_read_right(optimizer: type) -> None:
    p, q = (
        torch.zeros(2, 3, 4, 4).to(memory_format=f).requires_grad_()
        for f in (torch.channels_last, torch.contiguous_format)
    )
    opt = optimizer([p, q], lr=1.0)
    grad = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    p.grad, q.grad = grad.clone(), grad.clone()
    opt.step()
    assert torch.equal(p, q)
    assert torch.equal(p, -grad.sign())
    assert torch.equal(opt.state[p]["exp_avg"], opt.state[q]["exp_avg"])


@BOTH
def test_gradients_are_read_in_place(optimizer: type) -> None:
    p = torch.zeros(100).requires_grad_()
    opt = optimizer([p])
    p.grad = torch.ones(100)
    grad, bits = p.grad, p.grad.clone()
    opt.step()
    assert p.grad is grad
    assert torch.equal(grad, bits)


def test_one_cycle_moves_the_betas() -> None:
    p = torch.ones(3).requires_grad_()
    opt = LionCub([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    seen = []
    for _ in range(4):
        p.grad = torch.ones(3)
        opt.step()
        schedule.step()
        seen.append(opt.param_groups[0]["betas"][0])
    assert len(set(seen)) > 1
    assert opt.stats().steps == 4


def test_a_scaler_unscales_within_the_step() -> None:
    p = torch.ones(100).requires_grad_()
    opt = LionCub([p], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    weights = torch.linspace(-1, 1, 100)
    for step in range(3):
        opt.zero_grad()
        scaler.scale((p * weights).sum()).backward()
        if step == 1:
            scaler.unscale_(opt)
        if step == 2:
            p.grad[0] = math.inf
        scaler.step(opt)
        scaler.update()
    expected = torch.zeros(100)
    for _ in range(2):
        expected = torch.tensor(0.99) * expected + torch.tensor(1 - 0.99) * weights
    assert torch.equal(opt.state[p]["exp_avg"], expected)
    assert opt.stats().skipped_steps == 1
    assert opt.stats().steps == 3


@BOTH
def test_an_lr_too_small_for_bf16_warns_once(optimizer: type) -> None:
    params = [torch.ones(100, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    cures = r"Precision\(param_rounding='stochastic'\) or Precision\(master_weights=True\), fp32 parameters or"
    for options in ({"momentum_dtype": torch.bfloat16}, {}):
        with pytest.warns(UserWarning, match=rf"lr 1e-05 is .* of torch.bfloat16: 100%.*{cures}") as caught:
            opt = optimizer(params, lr=1e-5, **options)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        optimizer([torch.ones(100, dtype=torch.bfloat16).requires_grad_()], lr=1e-1)
        optimizer([torch.ones(100).requires_grad_()], lr=1e-5)
        optimizer([torch.zeros(100, dtype=torch.bfloat16).requires_grad_()], lr=1e-5)


def test_mixed_dtypes_share_a_bucket() -> None:
    params = [
        torch.ones(n, dtype=d).requires_grad_()
        for n, d in ((65, torch.float32), (7, torch.bfloat16), (0, torch.float16))
    ]
    opt = LionCub(params, lr=0.5)
    assert len(opt.stats().buckets) == 1
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert [p.dtype for p in params] == [torch.float32, torch.bfloat16, torch.float16]
    assert all((p == 0.5).all() for p in params)


def test_missing_gradients_share_one_buffer_of_zeros() -> None:
    params = [torch.ones(n).requires_grad_() for n in (1000, 10, 5)]
    opt = LionCub(params, lr=0.5)
    params[1].grad = torch.ones(10)
    opt.step()
    (bucket,) = opt._buckets.all
    first, _, last = bucket.gradients()[0]
    assert first.data_ptr() == last.data_ptr()
    assert [float(p.detach().mean()) for p in params] == [1.0, 0.5, 1.0]

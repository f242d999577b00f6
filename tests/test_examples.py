"""The examples of the pages against the same in plain torch, and as programs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import on_ranks, same_on_all
from programs import printed_by
from stacks import EXAMPLES, load_example
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh

from lioncub.kernels import pack_signs, packed_bytes, quantize, unpack_signs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_use_public_names_alone(path: Path) -> None:
    code = path.read_text()
    # some are whole programs to copy, the others show one thing each
    assert len(code.splitlines()) < {"train_gpt": 130, "train_hsdp": 150}.get(path.stem, 60)
    modules = set(re.findall(r"^(?:from|import) (lioncub[\w.]*)", code, re.MULTILINE))
    assert modules
    stacks = {f"lioncub.integrations.{name}" for name in ("accelerate", "lightning", "torchft", "transformers")}
    assert modules <= {"lioncub", "lioncub.collectives", "lioncub.kernels", *stacks}


@pytest.mark.parametrize("name", ["signum", "ddp_hook"])
def test_the_training_examples_learn(name: str, tmp_path: Path) -> None:
    printed = printed_by(EXAMPLES / f"{name}.py", 2, tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", printed, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]


def test_the_two_level_vote_runs_as_a_program(tmp_path: Path) -> None:
    printed = printed_by(EXAMPLES / "two_level_vote.py", 4, tmp_path)
    assert printed.splitlines() == [f"12504 bytes of votes, parity {parity}: the same result" for parity in range(2)]


def test_a_killed_run_resumes_with_the_losses_of_one_that_goes_on(tmp_path: Path) -> None:
    flags = ["--out=run", "--steps=60", "--save-every=20", "--print-every=1", "--batch=2", "--width=16", "--lr=0.003"]
    command = [*TORCHRUN, "--nproc-per-node", "2", str(EXAMPLES / "train_gpt.py"), *flags]
    losses: list[dict[int, str]] = []
    for kill_at in (35, None):
        losses.append({})
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for line in process.stdout:
                found = re.fullmatch(r"step (\d+): loss ([\d.]+)\n", line)
                assert found is not None
                losses[-1][int(found[1])] = found[2]
                if int(found[1]) == kill_at:
                    workers = [int(pid) for pid in children.read_text().split()]
                    os.kill(workers[-1], signal.SIGKILL)
            errors = process.stderr.read()
        assert process.returncode == (0 if kill_at is None else 1), errors
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    killed, resumed = losses
    # it may go on a little before it is killed, but not to the next checkpoint
    assert list(killed) == list(range(1, len(killed) + 1))
    assert 35 <= len(killed) < 40
    assert list(resumed) == list(range(21, 61))
    assert {step: loss for step, loss in killed.items() if step > 20} == {
        step: resumed[step] for step in killed if step > 20
    }
    assert float(resumed[60]) < 0.9 * float(killed[1])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-000060"]
    assert sorted(path.name for path in (tmp_path / "run" / "step-000060").iterdir()) == ["rank-0.pt", "rank-1.pt"]
    # and with more workers, one of whom starts with the momentum of another
    more = [*TORCHRUN, "--nproc-per-node", "3", *command[len(TORCHRUN) + 2 :], "--steps=63"]
    done = subprocess.run(more, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d+): ", done.stdout, re.MULTILINE) == ["61", "62", "63"]
    assert "got the momentum of rank 0 of 2" in done.stderr


def test_a_sharded_run_resumes_on_its_mesh_and_on_others(tmp_path: Path) -> None:
    def losses_on(nodes: int, shards: int, *, last: int = 20) -> dict[int, str]:
        flags = ["--out=run", f"--steps={last}", "--save-every=10", "--print-every=1", "--batch=2", "--width=16"]
        arguments = [*flags, "--lr=0.003", f"--nodes={nodes}"]
        printed = printed_by(EXAMPLES / "train_hsdp.py", nodes * shards, tmp_path, arguments=arguments)
        return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss ([\d.]+)$", printed, re.MULTILINE)}

    def metadata() -> list[Path]:
        return sorted((tmp_path / "run").glob("*/.metadata"))

    first = losses_on(2, 2)
    assert list(first) == list(range(1, 21))
    assert float(first[20]) < 0.9 * float(first[1])
    assert [path.parent.name for path in metadata()] == ["step-000010", "step-000020"]
    last_ten = {step: loss for step, loss in first.items() if step > 10}
    # as where a rank died while it saved: the checkpoint before it is taken
    metadata()[-1].unlink()
    assert losses_on(2, 2) == last_ten, "a run that resumed must have the losses of one that never stopped"
    metadata()[-1].unlink()
    other = losses_on(4, 1)
    assert list(other) == list(last_ten)
    # the same weights see the same data, then four ranks vote instead of two nodes
    assert other[11] == first[11]
    assert other[20] != first[20]
    alone = losses_on(1, 2, last=30)
    assert list(alone) == list(range(21, 31))
    assert float(alone[30]) < 0.9 * float(first[1])
    assert [path.parent.name for path in metadata()] == ["step-000020", "step-000030"]
    _assert_saved_parameters_moved(tmp_path / "run", 0.003)


def _assert_saved_parameters_moved(folder: Path, lr: float) -> None:
    """Compare two checkpoints of whole tensors, ten steps of at most lr and decay apart."""
    before, after = (_whole_checkpoint(folder / name, folder / f"{name}.pt") for name in ("step-000020", "step-000030"))
    assert (before["step"], after["step"]) == (20, 30)
    assert after["optimizer"]["param_groups"][0]["momentum_state"] == "averaged"
    assert before["model"].keys() == after["model"].keys()
    for name, mine in after["model"].items():
        distance = (mine - before["model"][name]).abs().max()
        # a step adds at most lr to what decays by lr/10 of it
        bound = 10 * lr * (1 + 0.1 * float(before["model"][name].abs().max() + 10 * lr))
        assert 0 < distance <= bound, name
        assert after["optimizer"]["state"][name]["exp_avg"].shape == mine.shape


def _whole_checkpoint(folder: Path, path: Path) -> dict[str, Any]:
    dcp_to_torch_save(folder, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


@on_ranks(2, 3)
def test_the_signum_example_is_signum(rank: int, world_size: int) -> None:
    """The example against all workers' steps in plain torch: zeros, ties, a parameter without gradient, odd sizes."""
    signum = load_example("signum").Signum
    shapes = [(7, 19), (64,), (5,)]
    params = [torch.ones(shape).requires_grad_() for shape in shapes]
    opt = signum(params, lr=0.5, beta=0.8, weight_decay=0.1)
    expected = [torch.ones(shape) for shape in shapes]
    momenta = [torch.zeros(world_size, *shape) for shape in shapes]
    for t in range(6):
        for i, shape in enumerate(shapes):
            generators = [torch.Generator().manual_seed(100 * t + 10 * i + r) for r in range(world_size)]
            grads = torch.stack([torch.randint(-1, 2, shape, generator=g).float() for g in generators])
            # the last parameter has no gradient on the last worker
            if i == 2:
                grads[-1] = 0
            params[i].grad = None if i == 2 and rank == world_size - 1 else grads[rank].clone()
            momenta[i] = torch.tensor(0.8) * momenta[i] + torch.tensor(1 - 0.8) * grads
            j = torch.arange(expected[i].numel()).view(shape)
            abstain = torch.stack([2 * ((j + t + (r + t // 4) % world_size) % 2) - 1 for r in range(world_size)])
            total = torch.where(momenta[i] == 0, abstain, momenta[i].sign()).sum(dim=0)
            direction = torch.where(total == 0, 2 * ((j + t // 2) % 2) - 1, total.sign())
            expected[i] = torch.tensor(1 - 0.5 * 0.1) * expected[i] - 0.5 * direction
        opt.step()
        for p, x, m in zip(params, expected, momenta, strict=True):
            assert torch.equal(p, x), f"step {t}"
            assert torch.equal(opt.state[p]["exp_avg"], m[rank]), f"step {t}"
    assert same_on_all([p.tolist() for p in params])


@on_ranks(4)
def test_the_two_level_vote_is_the_majority(rank: int, world_size: int) -> None:
    example = load_example("two_level_vote")
    for nodes in (1, 2, 4):
        mesh = init_device_mesh("cpu", (nodes, world_size // nodes), mesh_dim_names=("node", "place"))
        for n, parity in ((1, 0), (64, 1), (1000, 0), (1000, 1)):
            signs = torch.randint(2, (world_size, n), generator=torch.Generator().manual_seed(n)).mul(2).sub(1)
            total = signs.sum(dim=0)
            majority = torch.where(total == 0, 2 * ((torch.arange(n) + parity) % 2) - 1, total.sign())
            voted = example.two_level_vote(pack_signs(signs[rank].float()), mesh, parity)
            assert torch.equal(unpack_signs(voted, n), majority.float()), f"{nodes} nodes, {n} codes, parity {parity}"
            assert torch.equal(pack_signs(majority.float()), voted), "pad codes must be 0"


class Sum(nn.Module):
    """Its gradient is what it is called with."""

    def __init__(self, parameters: nn.ParameterList) -> None:
        super().__init__()
        self.weights = parameters

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights[0] * x).sum()


@on_ranks(3)
def test_the_hook_sends_what_it_says_and_is_unbiased(rank: int, world_size: int) -> None:
    """Every step against levels drawn by the reference."""
    example, n, steps = load_example("ddp_hook"), 700, 50
    torch.manual_seed(0)
    grads = torch.randn(world_size, n) * torch.rand(n).square()
    parameter = nn.ParameterList([torch.zeros(n)])
    ddp = nn.parallel.DistributedDataParallel(Sum(parameter))
    state = example.HookState(seed=5)
    ddp.register_comm_hook(state, example.two_bit_hook)
    sizes = torch.stack([torch.cat([b.abs().max().expand(len(b)) for b in grad.split(256)]) for grad in grads])
    total = torch.zeros(n)
    for step in range(steps):
        parameter[0].grad = None
        ddp(grads[rank]).backward()
        grad = parameter[0].grad
        expected = torch.zeros(n)
        for r in range(world_size):
            stream = {"seed": 5, "worker": r, "step": step, "param_id": 0, "stochastic": True, "impl": "reference"}
            codes, scale = quantize(grads[r], bits=2, norm="linf", block=256, **stream)
            assert torch.equal(scale.repeat_interleave(256)[:n], sizes[r])
            levels = (codes[:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).bitwise_and(3).flatten()[:n]
            expected += (levels.float() - 1) * sizes[r]
        assert torch.equal(grad, expected / world_size), f"step {step}"
        total += grad
    assert state.step == steps
    assert state.bytes_sent == steps * (world_size - 1) * (packed_bytes(n, bits=2) + 4 * 3)
    # what one worker sends of an element has the variance s*|g| - g^2
    deviation = ((sizes * grads.abs() - grads.square()).sum(dim=0) / world_size**2 / steps).sqrt()
    distance = ((total / steps - grads.mean(dim=0)) / deviation.clamp(min=1e-6)).abs().max()
    # the largest of 700 normal variables is above 5 once in 2,500 runs; the draws are the same in each
    assert distance < 5
    assert same_on_all(float(distance)), "all workers must have the same gradients"


def test_the_torchft_example_goes_on_without_a_lost_replica(tmp_path: Path) -> None:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=2000, heartbeat_timeout_ms=1000)
    command = [*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", "2", str(EXAMPLES / "train_torchft.py")]
    where = ENVIRONMENT | {"TORCHFT_LIGHTHOUSE": lighthouse.address()}
    outputs = [tmp_path / f"replica{i}.txt" for i in range(3)]
    runs = []
    try:
        for i, path in enumerate(outputs):
            with path.open("w") as output:
                environment = where | {"REPLICA": str(i)}
                runs.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        deadline = time.monotonic() + 100
        while "step 20: " not in outputs[2].read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{runs[2].pid}/task/{runs[2].pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        # the third may come back when they have ended
        returned = [run.wait(timeout=100) for run in runs[:2]]
        printed = [path.read_text() for path in outputs[:2]]
        assert returned == [0, 0], printed
        losses = [re.findall(r"^step (\d+): loss ([\d.]+), (\d) voters$", text, re.MULTILINE) for text in printed]
        assert [step for step, *_ in losses[0]] == ["20", "40", "60", "80", "100"], printed
        assert float(losses[0][-1][1]) < 0.8 * float(losses[0][0][1])
    finally:
        for run in runs:
            # torchrun ends its processes too
            run.terminate()
            run.wait()
        lighthouse.shutdown()

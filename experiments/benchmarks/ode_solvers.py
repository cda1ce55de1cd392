"""What solving an ODE costs, beside bare evaluations of its field and beside the peers.

    python experiments/benchmarks/ode_solvers.py                 all measurements
    python experiments/benchmarks/ode_solvers.py small stiff     some of them: see ROWS

CPU time of one thread, in turns (ours, floor, peer, ours, …). A ratio is the median over the turns of the ratio
within a turn. One JSON line per target: ratio, target, milliseconds (medians) and field calls of each side. The floor
is as many bare field calls as ours makes, and their backward pass if the row trains. dopri5 is Dopri5(shampine=True),
whose error estimate is that of torchdiffeq, torchode and diffrax.

torchode and diffrax come with `pip install ndeflow[bench]`; without them their rows say so and are left out.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from ode_peers import Side, Solve, diffrax_network, diffrax_stiff, torchode_solve

from ndeflow.diffeq import ODE, PID, RK38, Adjoint, Backprop, Checkpointed, Constant, Dopri5, Integrator

BATCH, TOLERANCE = 128, 1e-5
DOPRI5, CONTROL = Dopri5(shampine=True), PID(TOLERANCE, TOLERANCE)
PEERS = ("torchode", "diffrax")


@dataclass(frozen=True)
class Target:
    """A ratio of two sides' times, and what it shall be at most, or at least if `faster`; None: no target."""

    over: str
    under: str
    bound: float | None = None
    faster: bool = False


def measure(row: str, sides: dict[str, Side | None], targets: list[Target], turns: int = 15) -> None:
    """Time sides in turns and print one line per target.

    Args:
        row: what is measured.
        sides: functions that do the same work and return their number of field calls; None is not installed.
        targets: the ratios to print.
        turns: how often each side runs, after once for warmth.
    """
    here = {name: side for name, side in sides.items() if side is not None}
    calls = {name: side() for name, side in here.items()}
    seconds: dict[str, list[float]] = {name: [] for name in here}
    for _ in range(turns):
        for name, side in here.items():
            gc.collect()
            began = time.process_time()
            side()
            seconds[name].append(time.process_time() - began)
    for target in targets:
        pair, title = (target.over, target.under), f"{row}: {target.over} / {target.under}"
        if not here.keys() >= set(pair):
            print(json.dumps({"row": title, "skipped": "not installed: pip install 'ndeflow[bench]'"}))
            continue
        ratio = statistics.median(a / b for a, b in zip(*(seconds[name] for name in pair), strict=True))
        times = {name: round(statistics.median(seconds[name]) * 1e3, 2) for name in pair}
        report(title, target, ratio, cpu_ms=times, nfe={name: calls[name] for name in pair})


def report(title: str, target: Target, ratio: float, **facts: object) -> None:
    """Print one line."""
    line: dict[str, object] = {"row": title, "ratio": round(ratio, 4)}
    if target.bound is not None:
        line["target"] = f"{'≥' if target.faster else '≤'} {target.bound}"
        line["met"] = ratio >= target.bound if target.faster else ratio <= target.bound
    print(json.dumps(line | facts, ensure_ascii=False), flush=True)


class Field(nn.Module):
    """y' = a · MLP(y), with as many weights as the widths say; a is 1 or one number per sample."""

    def __init__(self, widths: tuple[int, ...], activation: type[nn.Module], gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        self.net = nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.mul_(gain)

    def forward(self, t: Tensor, y: Tensor, speed: Tensor | None = None) -> Tensor:
        return self.net(y) if speed is None else speed * self.net(y)


def start(width: int) -> Tensor:
    """States of a batch."""
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(1))


def counted(solve: Callable[[Callable], Tensor], f: Callable) -> Solve:
    """A solve by a peer that does not count, its calls counted once, outside of the measurement."""
    calls = 0

    def counting(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(*args)

    with torch.no_grad():
        solve(counting)
    return lambda: (solve(f), calls)


def ours(integrator: Integrator, eq: ODE, y0: Tensor, ts: Tensor) -> Solve:
    """Our solve; the largest number of field calls of a sample."""

    def solve() -> tuple[Tensor, int]:
        solution = integrator(eq, y0, ts)
        return solution.ys[:, -1], int(solution.stats.nfe.max())

    return solve


def forward(solve: Solve) -> Side:
    """A solve without gradients."""
    return torch.no_grad()(lambda: solve()[1])


def training(solve: Solve, parameters: list[nn.Parameter]) -> Side:
    """A solve and the gradients of the mean square of its end."""

    def step() -> int:
        y, calls = solve()
        torch.autograd.grad(y.square().mean(), parameters)
        return calls

    return step


def floor(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, calls: int) -> Solve:
    """Bare calls, each of the one before."""

    def solve() -> tuple[Tensor, int]:
        t, y = torch.zeros(()), y0
        for _ in range(calls):
            y = f(t, y)
        return y, calls

    return solve


def network(name: str, f: Field, end: float, bounds: dict[str, tuple[Target, ...]]) -> None:
    """One network beside the floor and the peers, forward, and forward and backward."""
    y0, ts, parameters = start(f.net[0].in_features), torch.tensor([0.0, end]), list(f.parameters())
    mine = ours(Integrator(DOPRI5, CONTROL), ODE(f), y0, ts)
    its = counted(lambda g: torchdiffeq.odeint(g, y0, ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1], f)
    torchodes = torchode_solve(f, y0, end, TOLERANCE)
    bare = floor(f, y0, forward(mine)())
    for what, targets in bounds.items():
        wrap = forward if what == "forward" else lambda solve: training(solve, parameters)
        sides = {
            "ndeflow": wrap(mine),
            "floor": wrap(bare),
            "torchdiffeq": wrap(its),
            "torchode": torchodes and wrap(torchodes),
            "diffrax": diffrax_network(f.net, y0, end, TOLERANCE, train=what != "forward"),
        }
        measure(f"{name}, {what}", sides, [*targets, *(Target(peer, "ndeflow", faster=True) for peer in PEERS)])


def small() -> None:
    """A small network with tanh."""
    network(
        "small",
        Field((2, 64, 64, 2), nn.Tanh, 4.6),
        1.0,
        {
            "forward": (Target("ndeflow", "floor", 1.5), Target("torchdiffeq", "ndeflow", 1.8, faster=True)),
            "training": (Target("ndeflow", "floor", 1.35), Target("torchdiffeq", "ndeflow", 1.5, faster=True)),
        },
    )


def silu() -> None:
    """The same with SiLU, where the field is cheaper."""
    silent = (Target("ndeflow", "floor"), Target("torchdiffeq", "ndeflow", faster=True))
    network("silu", Field((2, 64, 64, 2), nn.SiLU, 4.4), 1.0, {"forward": silent, "training": silent})


def wide() -> None:
    """A wide network, where the field is nearly all."""
    peer = Target("torchdiffeq", "ndeflow", faster=True)
    network(
        "wide",
        Field((64, 256, 256, 64), nn.Tanh, 2.0),
        1.0,
        {
            "forward": (Target("ndeflow", "floor", 1.25), peer),
            "training": (Target("ndeflow", "floor", 1.1), peer, Target("ndeflow", "diffrax", 0.65)),
        },
    )


def stiff() -> None:
    """One stiff sample in a batch and a field that costs nothing: the loop itself."""
    rate = torch.ones(BATCH, 1)
    rate[0] = 1000.0
    y0, ts = torch.zeros(BATCH, 1), torch.tensor([0.0, 1.0])

    def g(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * (y - torch.cos(t if t.ndim == 0 else t[:, None]))

    def f(t: Tensor, y: Tensor) -> Tensor:
        return g(t, y, rate)

    mine = ours(Integrator(DOPRI5, CONTROL), ODE(g, rate), y0, ts)
    its = counted(lambda g: torchdiffeq.odeint(g, y0, ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1], f)
    torchodes = torchode_solve(f, y0, 1.0, TOLERANCE)
    own = ours(Integrator(DOPRI5, CONTROL, stepping="per_sample"), ODE(g, rate), y0, ts)
    sides = {
        "ndeflow": forward(mine),
        "ndeflow per sample": forward(own),
        "floor": forward(floor(f, y0, forward(mine)())),
        "torchdiffeq": forward(its),
        "torchode": torchodes and forward(torchodes),
        "diffrax": diffrax_stiff(rate, y0, 1.0, TOLERANCE),
    }
    targets = [
        Target("torchdiffeq", "ndeflow", 4.0, faster=True),
        Target("torchode", "ndeflow per sample", faster=True),
        Target("ndeflow per sample", "ndeflow"),
        Target("diffrax", "ndeflow", faster=True),
    ]
    measure("stiff, trivial field", sides, targets, turns=7)


def per_sample() -> None:
    """Steps of its own for each sample, where one sample is 30 times faster, and where none is."""
    f, y0, ts = Field((64, 256, 256, 64), nn.Tanh, 2.0), start(64), torch.tensor([0.0, 1.0])
    speed = torch.ones(BATCH, 1)
    speed[0] = 30.0
    compare("one of 128 samples 30 times faster (wide)", f, y0, ts, speed, 0.5)
    f, y0 = Field((2, 64, 64, 2), nn.Tanh, 4.6), start(2)
    compare("all samples alike (small)", f, y0, ts, torch.ones(BATCH, 1), 2.0)


def compare(name: str, f: Field, y0: Tensor, ts: Tensor, speed: Tensor, bound: float) -> None:
    """Per-sample beside shared stepping."""
    eq, parameters = ODE(f, speed), list(f.parameters())
    solves = {
        stepping: ours(Integrator(DOPRI5, CONTROL, stepping=stepping), eq, y0, ts)
        for stepping in ("per_sample", "shared")
    }
    for what, limit in (("forward", bound), ("training", None)):
        sides = {
            stepping: forward(solve) if what == "forward" else training(solve, parameters)
            for stepping, solve in solves.items()
        }
        measure(f"{name}, {what}", sides, [Target("per_sample", "shared", limit)], turns=7)


def rk4() -> None:
    """40 steps of the 3/8 rule, which is what torchdiffeq calls rk4."""
    f, y0, ts = Field((16, 64, 64, 16), nn.Tanh, 1.0), start(16), torch.tensor([0.0, 1.0])
    mine = ours(Integrator(RK38(), Constant(1 / 40)), ODE(f), y0, ts)
    its = counted(lambda g: torchdiffeq.odeint(g, y0, ts, method="rk4", options={"step_size": 1 / 40})[-1], f)
    bare = floor(f, y0, forward(mine)())
    for what in ("forward", "training"):
        wrap = forward if what == "forward" else lambda solve: training(solve, list(f.parameters()))
        sides = {"ndeflow": wrap(mine), "floor": wrap(bare), "torchdiffeq": wrap(its)}
        measure(
            f"rk4, 40 steps, {what}", sides, [Target("ndeflow", "floor"), Target("torchdiffeq", "ndeflow", None, True)]
        )


def checkpointed() -> None:
    """Time and memory of the gradient of 1000 steps, the states being recomputed."""
    f, y0, ts = Field((16, 64, 64, 16), nn.Tanh, 1.0), start(16), torch.tensor([0.0, 1.0])
    parameters, steps = list(f.parameters()), Constant(1 / 1000)
    its = counted(lambda g: torchdiffeq.odeint(g, y0, ts, method="rk4", options={"step_size": 1 / 1000})[-1], f)
    sides = {
        "checkpointed": training(ours(Integrator(RK38(), steps, Checkpointed()), ODE(f), y0, ts), parameters),
        "plain": training(ours(Integrator(RK38(), steps, Backprop()), ODE(f), y0, ts), parameters),
        "torchdiffeq": training(its, parameters),
    }
    targets = [Target("checkpointed", "plain", 1.5), Target("checkpointed", "torchdiffeq", 1.5)]
    measure("checkpointed, 1000 rk4 steps, training", sides, targets, turns=5)
    peaks = {name: peak(side) for name, side in sides.items()}
    megabytes = {name: round(x / 1e6, 2) for name, x in peaks.items()}
    ratio = peaks["checkpointed"] / peaks["plain"]
    report("checkpointed, peak memory: checkpointed / plain", Target("", "", 0.02), ratio, peak_mb=megabytes)


def peak(side: Side) -> int:
    """The most bytes that torch had allocated during a call, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side()
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


def adjoint() -> None:
    """A training step by the adjoint equation beside one by backpropagation of the same solve."""
    f, y0, ts = Field((16, 128, 128, 16), nn.Tanh, 2.0), start(16), torch.tensor([0.0, 1.0])
    options = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": "dopri5"}
    its = {
        "torchdiffeq": counted(lambda g: torchdiffeq.odeint(g, y0, ts, **options)[-1], f),
        "torchdiffeq adjoint": counted(
            lambda g: torchdiffeq.odeint_adjoint(g, y0, ts, adjoint_params=tuple(f.parameters()), **options)[-1], f
        ),
    }
    own = {
        "adjoint": ours(Integrator(DOPRI5, CONTROL, Adjoint()), ODE(f), y0, ts),
        "backprop": ours(Integrator(DOPRI5, CONTROL, Backprop()), ODE(f), y0, ts),
    }
    sides = {name: training(solve, list(f.parameters())) for name, solve in (own | its).items()}
    targets = [
        Target("adjoint", "backprop", 1.3),
        Target("torchdiffeq adjoint", "torchdiffeq"),
        Target("torchdiffeq adjoint", "adjoint", faster=True),
    ]
    measure("adjoint, training", sides, targets)


ROWS = {row.__name__: row for row in (small, silu, wide, stiff, per_sample, rk4, checkpointed, adjoint)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or ROWS:
        ROWS[chosen]()

"""What a solve promises where other libraries return a wrong number in silence."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from ndeflow.diffeq import ODE, PID, RK4, Bosh3, Constant, Dopri5, Integrator, SolverError, Tsit5
from ndeflow.tensors import expand_time

stepped = pytest.mark.parametrize("stepping", ["shared", "per_sample"])
RATES = torch.tensor([[0.1], [0.1], [1.0], [0.1]], dtype=torch.float64)
ONES = torch.ones(4, 1, dtype=torch.float64)
EXPLOSIVE = ODE(lambda t, y, a: a * y**2, RATES)  # y = 1 / (1 − a t): sample 2 blows up at t = 1


def stiff(t, y, rate):
    return -rate * (y - torch.cos(expand_time(t, y)))


def solve(eq, y0=ONES, ts=(0.0, 0.5, 2.0), tolerance=1e-6, solver=None, **options):
    options = {"stepping": "shared"} | options
    call = {name: options.pop(name) for name in ("dense", "record") if name in options}
    return Integrator(solver or Tsit5(), PID(tolerance, tolerance), **options)(eq, y0, ts, **call)


def message(*args, **options):
    with pytest.raises(SolverError) as caught:
        solve(*args, **options)
    return str(caught.value)


# Failures explain themselves.


@stepped
def test_a_blow_up_names_time_sample_cost_and_what_to_do(stepping):
    calls = []
    eq = ODE(lambda t, y, a: calls.append(len(y)) or a * y**2, RATES)
    text = message(eq, stepping=stepping)
    sample, t, accepted, rejected, nfe = re.findall(
        r"sample (\d) of 4 .* t=(\S+) of \[0, 2\] \((\d+) accepted, (\d+) rejected, NFE (\d+)", text
    )[0]
    assert int(sample) == 2
    assert float(t) == pytest.approx(1.0, abs=1e-3)
    assert int(nfe) == 6 * (int(accepted) + int(rejected)) + 2  # the start, and the first step
    assert 0 <= len(calls) - int(nfe) <= 1  # the probe of the field
    assert re.search(r"last dt \S+, scaled error \S+, \|y\| \S+, \|f\| ", text)
    assert "the solution itself blows up there; end the solve before, or bound the field" in text


@stepped
def test_a_stiff_field_is_called_stiff_and_the_cure_named(stepping):
    rates = torch.tensor([[1.0], [1e5]], dtype=torch.float64)
    text = message(ODE(stiff, rates), ONES[:2], max_steps=50, stepping=stepping)
    assert "sample 1 of 2 reached max_steps=50" in text
    assert "the field is stiff" in text
    assert "loosen rtol and atol, raise max_steps" in text


@stepped
def test_a_field_that_is_nan_from_some_time_on_is_named_with_the_time(stepping):
    eq = ODE(lambda t, y, a: -y * torch.where((expand_time(t, y) > 0.7) & (a == 1), math.nan, 1.0), RATES)
    text = message(eq, stepping=stepping)
    assert "sample 2 of 4" in text
    assert "t=0.7 of [0, 2]" in text
    assert "the field is not finite at a state of ordinary size; look for a division, log, sqrt or exp in it" in text


@pytest.mark.parametrize(
    "stepping",
    [
        "shared",
        "per_sample",
    ],
)
def test_a_field_that_is_nan_at_the_start_fails_after_a_few_steps(stepping):
    text = message(ODE(lambda t, y: y * math.nan), stepping=stepping)
    assert "the field is not finite" in text
    assert int(re.search(r"(\d+) rejected", text)[1]) < 50


@stepped
def test_a_nan_in_the_start_is_refused_with_the_sample(stepping):
    y0 = ONES.clone()
    y0[1] = math.nan
    with pytest.raises(ValueError, match="y0 is not finite in 1 of 4 samples, first in sample 1"):
        solve(EXPLOSIVE, y0, stepping=stepping)


def test_the_default_budget_ends_a_solve_that_stiffens():
    text = message(ODE(lambda t, y: -torch.exp(50 * t) * y), ONES[:1], solver=Bosh3())
    assert "reached max_steps=4096 at t=0." in text
    accepted, rejected = re.findall(r"\((\d+) accepted, (\d+) rejected", text)[0]
    assert int(accepted) + int(rejected) == 4096


# No silent wrong number.


@stepped
@pytest.mark.parametrize("on_failure", ["raise", "nan"])
def test_no_step_is_forced_past_the_tolerance_at_dt_min(stepping, on_failure):
    """torchdiffeq accepts steps of min_step whatever their error, and returns NaN here without a word."""
    controller = PID(1e-6, 1e-6, dt_min=0.01)
    integrator = Integrator(Dopri5(), controller, stepping=stepping, on_failure=on_failure)
    eq = ODE(stiff, torch.full((1, 1), 1000.0, dtype=torch.float64))
    if on_failure == "nan":
        assert integrator(eq, ONES[:1], [0.0, 1.0]).ys[:, 1].isnan().all()
        return
    with pytest.raises(SolverError, match="needs steps too small to go on at t=0 of"):
        integrator(eq, ONES[:1], [0.0, 1.0])


@stepped
def test_a_dt_min_that_does_not_bind_changes_nothing(stepping):
    eq = ODE(stiff, torch.ones_like(ONES))
    free, bound = (
        Integrator(Dopri5(), PID(1e-6, 1e-6, dt_min=least), stepping=stepping)(eq, ONES, [0.0, 1.0])
        for least in (None, 1e-7)
    )
    assert torch.equal(free.ys, bound.ys)


@stepped
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_of_low_precision_is_refused(stepping, dtype):
    with pytest.raises(TypeError, match=f"{dtype}.* keep the state in float32 and run the field under torch.autocast"):
        solve(ODE(lambda t, y: -y), ONES.to(dtype), stepping=stepping)


@stepped
def test_a_field_in_low_precision_is_integrated_in_float32(stepping):
    """The field is off by up to 2⁻⁹ of itself, and so may the answer be, but no increments are lost."""
    eq = ODE(lambda t, y: -y.bfloat16())
    ys = solve(eq, torch.ones(2, 1), [0.0, 1.0], tolerance=1e-2, stepping=stepping).ys
    assert ys.dtype == torch.float32
    assert (ys[:, 1] / math.exp(-1) - 1).abs().max() < 2e-2


@stepped
def test_one_output_time_is_refused(stepping):
    with pytest.raises(ValueError, match=r"a start and at least one later output, got \(1,\)"):
        solve(EXPLOSIVE, ts=[0.0], stepping=stepping)


@stepped
@pytest.mark.parametrize("ts", [[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0]])
def test_times_that_are_not_monotone_are_refused(stepping, ts):
    with pytest.raises(ValueError, match="strictly increasing or strictly decreasing, got ts"):
        solve(EXPLOSIVE, ts=ts, stepping=stepping)


def test_the_row_of_times_that_is_not_monotone_is_named():
    ts = torch.tensor([[0.0, 1.0, 2.0]]).repeat(4, 1)
    ts[3, 1] = 3.0
    with pytest.raises(ValueError, match=r"got ts\[3\]\[1\] = 3, ts\[3\]\[2\] = 2"):
        solve(EXPLOSIVE, ts=ts, stepping="per_sample")


@stepped
def test_tolerances_for_a_solver_without_an_error_estimate_are_refused(stepping):
    with pytest.raises(ValueError, match=r"RK4 has no error estimate for the tolerances of PID: use Constant\(dt\)"):
        solve(EXPLOSIVE, solver=RK4(), stepping=stepping)


def test_constant_steps_take_no_tolerance():
    with pytest.raises(TypeError, match="rtol"):
        Constant(rtol=1e-9)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
def test_a_tolerance_is_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=f"PID takes {name} > 0, got {value}"):
        PID(**({"rtol": 1e-3, "atol": 1e-3} | {name: value}))


def test_a_tolerance_that_is_text_is_refused_in_our_words():
    """YAML 1.1 reads 1e-3 as text."""
    with pytest.raises(TypeError, match="PID takes rtol as a number"):
        PID(rtol="1e-3", atol=1e-3)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-8, 1e-8), (1e-4, 1e-45)])
def test_a_tolerance_below_the_resolution_of_the_dtype_is_refused(rtol, atol):
    integrator = Integrator(Tsit5(), PID(rtol, atol))
    with pytest.raises(ValueError, match=r"below what torch.float32 resolves .* loosen them, or give y0.double\(\)"):
        integrator(ODE(lambda t, y: -y), torch.ones(1, 1), [0.0, 1.0])
    assert integrator(ODE(lambda t, y: -y), torch.ones(1, 1).double(), [0.0, 1.0]).ys.isfinite().all()


@stepped
def test_a_field_of_another_shape_is_refused_with_both_shapes(stepping):
    with pytest.raises(ValueError, match=r"returned shape \(4, 1\) for a state of shape \(4, 3\)"):
        solve(ODE(lambda t, y: y[:, :1]), ONES.expand(4, 3), stepping=stepping)


# Times per sample reach fields that were written for one time.


@pytest.mark.parametrize("shape", [(4, 1), (4, 3), (4, 4), (4, 2, 4), (2, 2)])
@pytest.mark.parametrize(
    "factor",
    [
        lambda t: t,
        lambda t: 1 + torch.sin(7 * t),
        lambda t: torch.where(t > 0.9, 2.0, 1.0),
        pytest.param(lambda t: 1 + torch.sin(2 * math.pi * t), id="one period"),
    ],
)
def test_a_field_that_takes_one_time_only_is_refused_per_sample(shape, factor):
    """The dangerous shapes are those whose last axis is as long as the batch: broadcasting succeeds there."""
    eq = ODE(lambda t, y: -factor(t) * y)
    with pytest.raises(ValueError, match=r"write expand_time\(t, y\) for t in the field .* or use stepping='shared'"):
        solve(eq, torch.ones(shape, dtype=torch.float64), [0.0, 1.0], stepping="per_sample")


def test_a_field_that_spreads_times_along_an_inner_axis_is_refused():
    eq = ODE(lambda t, y: -t.unsqueeze(-1) * y if t.ndim else -t * y)
    ts = torch.tensor([[0.0, 1.0], [0.0, 1.1], [0.0, 1.2]])
    with pytest.raises(ValueError, match="write expand_time"):
        solve(eq, torch.ones(3, 3, 2, dtype=torch.float64), ts, stepping="per_sample")


def test_a_field_that_takes_a_time_per_sample_is_taken_at_its_word():
    eq = ODE(lambda t, y: -expand_time(t, y) * y)
    ts = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    ys = solve(eq, ONES[:2].expand(2, 2), ts, stepping="per_sample").ys[:, 1]
    torch.testing.assert_close(ys, torch.exp(-(ts[:, 1:] ** 2) / 2).expand(2, 2), rtol=1e-5, atol=1e-5)


# One hard sample changes neither the answer nor the cost of the others.

PAIR = torch.tensor([[1.0], [500.0]], dtype=torch.float64)


@pytest.mark.parametrize("ts", [[0.0, 1.0], [0.0, 0.3, 1.0], [1.0, 0.2, 0.0]], ids=["end", "outputs", "backward"])
def test_a_stiff_neighbor_leaves_answer_and_cost_bit_for_bit(ts):
    sign = 1.0 if ts[-1] > ts[0] else -1.0
    eq = ODE(lambda t, y, rate: sign * stiff(t, y, rate), PAIR)
    both = solve(eq, ONES[:2], ts, stepping="per_sample")
    easy = solve(eq.take(torch.tensor([0])), ONES[:1], ts, stepping="per_sample")
    assert torch.equal(both.ys[0], easy.ys[0])
    assert [int(n[0]) for n in both.stats] == [int(n[0]) for n in easy.stats]
    assert both.stats.nfe[1] > 10 * both.stats.nfe[0]
    shared = solve(eq, ONES[:2], ts)
    assert not torch.equal(shared.ys[0], easy.ys[0])
    assert shared.stats.nfe[0] > 10 * easy.stats.nfe[0]


def test_a_hard_neighbor_leaves_the_answer_of_a_network_in_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    speed = torch.ones(8, 1)
    speed[5] = 100.0
    eq, y0 = ODE(lambda t, y, a: a * net(y), speed), torch.randn(8, 2)
    together = solve(eq, y0, [0.0, 0.5, 1.0], stepping="per_sample", tolerance=1e-5)
    for i in range(8):
        one = torch.tensor([i])
        single = solve(eq.take(one), y0[one], [0.0, 0.5, 1.0], stepping="per_sample", tolerance=1e-5)
        torch.testing.assert_close(together.ys[one], single.ys, rtol=1e-6 if i != 5 else 1e-4, atol=1e-6)
        assert i == 5 or together.stats.nfe[i] == single.stats.nfe[0]
    assert together.stats.nfe[5] > 4 * together.stats.nfe[0]


# What was not reached is NaN, what was reached is right.


@stepped
def test_outputs_that_were_not_reached_are_nan_and_the_others_right(stepping):
    ts = torch.tensor([0.0, 0.5, 0.9, 1.5, 2.0], dtype=torch.float64)
    solution = solve(EXPLOSIVE, ts=ts, on_failure="nan", stepping=stepping, dense=True, record=True)
    right = (1 / (1 - RATES * ts)).unsqueeze(-1)
    reached = torch.ones(4, 5, dtype=torch.bool)
    reached[slice(None) if stepping == "shared" else 2, 3:] = False
    assert torch.equal(~solution.ys.isnan().squeeze(-1), reached)
    torch.testing.assert_close(solution.ys[reached], right[reached], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(solution.at(ts), solution.ys, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert all(x.isfinite().all() for x in solution.steps)


@stepped
@pytest.mark.parametrize(
    "controller",
    [
        PID(1e-6, 1e-6),
        Constant(0.02),
    ],
    ids=["adaptive", "planned"],
)
def test_gradients_of_what_was_reached_are_those_without_the_failed_sample(controller, stepping):
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    steeper = torch.tensor([[0.1], [30.0], [0.2]], dtype=torch.float64)
    solver = Dopri5() if isinstance(controller, PID) else RK4()
    integrator = Integrator(solver, controller, stepping=stepping, on_failure="nan")
    eq, ts = ODE(lambda t, y, a: theta * a * y**2, steeper), [0.0, 0.01, 1.0]
    ys = integrator(eq, ONES[:3], ts).ys[[0, 2]]
    reached = ~ys.isnan()
    gradient = torch.autograd.grad(ys[reached].sum(), theta)[0]
    alone = integrator(eq.take(torch.tensor([0, 2])), ONES[:2], ts).ys
    torch.testing.assert_close(gradient, torch.autograd.grad(alone[reached].sum(), theta)[0], rtol=1e-5, atol=1e-8)


# Layers that make the field random.


@stepped
@pytest.mark.parametrize(("layer", "argument"), [(nn.Dropout, 0.5), (nn.BatchNorm1d, 3)])
def test_dropout_or_batch_norm_inside_an_adaptive_field_warns_once(layer, argument, stepping):
    kind = type(f"{layer.__name__}In{stepping}", (layer,), {})  # a warning is given once per kind and process

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), kind(argument))

        def forward(self, t, y):
            return -0.1 * self.inner(y)

    def go(field):
        solve(ODE(field), torch.randn(4, 3), [0.0, 0.1], tolerance=1.0, stepping=stepping, on_failure="nan")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(Field().eval())
        Integrator(RK4(), Constant(0.1))(ODE(Field()), torch.randn(4, 3), [0.0, 0.1])
    with pytest.warns(UserWarning, match=rf"{kind.__name__} \(f.inner.1\) is active inside a field .* adaptively"):
        go(Field())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(Field())

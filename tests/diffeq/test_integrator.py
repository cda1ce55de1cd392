"""The public door: what it takes and what it refuses, with which words."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from ndeflow.diffeq import ODE, Backprop, Constant, Euler, Heun, Integrator

DECAY = ODE(lambda t, y: -y)
ONES = torch.ones(3, 2)


@pytest.fixture
def integrator():
    return Integrator(Heun(), Constant(0.1))


def test_an_integrator_is_a_frozen_value_with_defaults(integrator):
    assert integrator == Integrator(Heun(), Constant(0.1), Backprop(), max_steps=4096, on_failure="raise")
    with pytest.raises(dataclasses.FrozenInstanceError):
        integrator.max_steps = 1


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((Heun, Constant(0.1)), "Integrator's solver must be a Solver, got the class Heun: write Heun()"),
        (("heun", Constant(0.1)), "Integrator's solver must be a Solver, got str"),
        ((Heun(), 0.1), "Integrator's controller must be a Controller, got float"),
        ((Heun(), Constant), "Integrator's controller must be a Controller, got the class Constant: write Constant"),
        ((Heun(), Constant(0.1), "backprop"), "Integrator's gradient must be a Gradient, got str"),
    ],
)
def test_parts_of_another_kind_are_refused(parts, words):
    with pytest.raises(TypeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        Integrator(*parts)


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_the_budget_is_a_positive_integer(budget):
    with pytest.raises(ValueError, match="max_steps must be an integer ≥ 1"):
        Integrator(Heun(), Constant(0.1), max_steps=budget)


def test_the_failure_policy_is_one_of_two():
    with pytest.raises(ValueError, match="on_failure must be 'raise' or 'nan', got 'skip'"):
        Integrator(Heun(), Constant(0.1), on_failure="skip")


@pytest.mark.parametrize("field", [lambda t, y: -y, nn.Linear(2, 2)])
def test_a_bare_field_is_refused_with_the_line_to_write(integrator, field):
    with pytest.raises(
        TypeError, match=r"the equation must be an Equation, got .*: wrap a field f\(t, y\) as ODE\(f\)"
    ):
        integrator(field, ONES, [0, 1])


@pytest.mark.parametrize(
    ("y0", "error", "words"),
    [
        ([1.0], TypeError, r"leaf '0' of the state must be a tensor of shape \(B, \*\), got float"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, r"got torch.int64: write y0.float\(\)"),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, r"got torch.bool: write y0.float\(\)"),
        (ONES.half(), TypeError, "torch.float16: increments below 5e-04 .* rounded away; .* torch.autocast"),
        (ONES.bfloat16(), TypeError, "torch.bfloat16: increments below 4e-03"),
        (ONES[0], ValueError, r"a batch axis .* got \(2,\): write y0\[None\] for one sample, y0\[:, None\]"),
        (torch.tensor(1.0), ValueError, r"a batch axis .* got \(\)"),
        (ONES.clone().index_fill_(0, torch.tensor([1]), torch.nan), ValueError, "1 of 3 samples, first in sample 1"),
        (ONES * torch.inf, ValueError, "y0 is not finite in 3 of 3 samples"),
    ],
)
def test_a_start_that_cannot_be_solved_from_is_refused(integrator, y0, error, words):
    with pytest.raises(error, match=words):
        integrator(DECAY, y0, [0.0, 1.0])


@pytest.mark.parametrize(
    ("ts", "error", "words"),
    [
        ([1.0], ValueError, r"shape \(T,\) or \(B, T\) with T ≥ 2, a start and at least one later output, got \(1,\)"),
        (1.0, ValueError, r"T ≥ 2, .* got \(\)"),
        (torch.zeros(3, 2), ValueError, r"ts of shape \(3, 2\) gives each sample its own times: set stepping="),
        ([0.0, 1.0, 0.5], ValueError, r"strictly increasing or .* ts\[1\] = 1, ts\[2\] = 0.5 .* drop repeated"),
        ([1.0, 0.5, 0.7, 0.0], ValueError, r"ts\[1\] = 0.5, ts\[2\] = 0.7"),
        ([0.0, 0.0, 1.0], ValueError, r"ts\[0\] = 0, ts\[1\] = 0"),
        ([1.0, 1.0], ValueError, r"ts\[0\] = 1, ts\[1\] = 1"),
        ([0.0, float("nan")], ValueError, r"finite, got ts\[1\] = nan"),
        ([0.0, float("inf")], ValueError, r"finite, got ts\[1\] = inf"),
        (torch.tensor([0.0, 1.0], dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
        (torch.tensor([False, True]), TypeError, "real numbers, got torch.bool"),
        ("01", TypeError, "tensor or a sequence of numbers, got str '01'"),
        (None, TypeError, "tensor or a sequence of numbers, got NoneType"),
    ],
)
def test_output_times_that_make_no_sense_are_refused(integrator, ts, error, words):
    with pytest.raises(error, match=words):
        integrator(DECAY, ONES, ts)


@pytest.mark.parametrize(
    "ts",
    [[0, 2], (0.0, 2.0), np.array([0, 2]), np.array([0, 2], dtype=np.float32), torch.tensor([0, 2]), range(0, 3, 2)],
    ids=["ints", "tuple", "numpy", "float32", "int tensor", "range"],
)
def test_times_of_every_real_kind_become_float64(integrator, ts):
    solution = integrator(DECAY, ONES, ts)
    assert solution.ts.dtype == torch.float64
    assert torch.equal(solution.ys, integrator(DECAY, ONES, torch.tensor([0.0, 2.0], dtype=torch.float64)).ys)


def test_a_list_of_decimals_is_read_as_float64():
    times = []
    Integrator(Euler(), Constant())(ODE(lambda t, y: times.append(t.item()) or y), ONES.double(), [0.1, 0.7, 0.8])
    assert times == [0.1, 0.7]


def test_args_of_another_batch_are_refused(integrator):
    with pytest.raises(ValueError, match=r"args has shape \(1, 2\), y0 \(3, 2\)"):
        integrator(ODE(lambda t, y, a: a * y, torch.ones(1, 2)), ONES, [0.0, 1.0])


def test_a_field_of_the_wrong_shape_is_refused_in_the_first_call(integrator):
    calls = []
    with pytest.raises(ValueError, match=r"shape \(3, 1\) for a state of shape \(3, 2\)"):
        integrator(ODE(lambda t, y: calls.append(t) or y[:, :1]), ONES, [0.0, 1.0])
    assert len(calls) == 1


def test_the_solve_is_watched_by_autograd_only_if_something_needs_it(integrator):
    assert not integrator(DECAY, ONES, [0.0, 1.0]).ys.requires_grad
    assert integrator(DECAY, ONES.clone().requires_grad_(), [0.0, 1.0]).ys.requires_grad
    with torch.inference_mode():
        assert integrator(DECAY, ONES, [0.0, 1.0]).ys.is_inference()

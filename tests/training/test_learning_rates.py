import itertools
import math

import pytest
import torch

from ndeflow.training.schedules import warmup_constant, warmup_cosine


def rates(build, steps, lr=2.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warmup_cosine_rises_linearly_then_falls_to_the_final_factor():
    seen = rates(lambda o: warmup_cosine(o, steps=110, warmup=10, final=0.1), 130)
    assert seen[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert seen[10] == pytest.approx(2.0)
    assert seen[60] == pytest.approx(2.0 * (0.1 + 0.45))  # half way
    assert seen[110:] == pytest.approx([0.2] * 20)
    assert all(a >= b for a, b in itertools.pairwise(seen[10:]))
    assert sum(seen[10:110]) / 100 == pytest.approx(2.0 * 0.55, rel=0.01)


def test_warmup_constant_stays():
    assert rates(lambda o: warmup_constant(o, 4), 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 5, "warmup": 5}, {"steps": 5, "warmup": -1}])
def test_lengths_are_checked(bad):
    with pytest.raises(ValueError, match="must lie in"):
        rates(lambda o: warmup_cosine(o, **bad), 1)


def test_final_is_a_factor_and_constant_needs_a_warmup():
    with pytest.raises(ValueError, match="factor in"):
        rates(lambda o: warmup_cosine(o, 5, final=1e3), 1)
    with pytest.raises(ValueError, match="at least 1 step"):
        rates(lambda o: warmup_constant(o, 0), 1)


def test_its_state_continues():
    parameter = torch.nn.Parameter(torch.zeros(1))
    first = torch.optim.SGD([parameter], lr=1.0)
    schedule = warmup_cosine(first, 20, 5)
    for _ in range(7):
        first.step()
        schedule.step()
    again = torch.optim.SGD([parameter], lr=1.0)
    resumed = warmup_cosine(again, 20, 5)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(first.state_dict())
    first.step(), schedule.step(), again.step(), resumed.step()
    assert math.isclose(first.param_groups[0]["lr"], again.param_groups[0]["lr"])

import math

import pytest
import torch

from ndeflow.flows import Linear, Schedule


def test_derivatives_are_those_of_autograd(schedule, inside):
    t = inside(schedule)
    c = schedule.coefficients(t)
    for value, derivative in ((0, c.d_alpha), (1, c.d_sigma)):
        expected = torch.autograd.functional.jvp(lambda t, i=value: schedule.coefficients(t)[i], t, torch.ones_like(t))[
            1
        ]
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-10)


def test_time_of_inverts_half_log_snr(schedule, inside):
    t = inside(schedule)
    torch.testing.assert_close(schedule.time_of(schedule.half_log_snr(t)), t, rtol=1e-12, atol=1e-12)


def test_half_log_snr_rises_from_source_to_data(schedule, inside):
    levels = schedule.half_log_snr(inside(schedule))
    assert (levels.diff() > 0).all()


def test_half_log_snr_is_half(schedule):
    """An absolute value: twice as much would pass the round trip."""
    t = schedule.time_of(torch.tensor(math.log(3), dtype=torch.float64))
    alpha, sigma, _, _ = schedule.coefficients(t)
    assert (alpha / sigma).item() == pytest.approx(3, rel=1e-12)
    assert Linear().half_log_snr(torch.tensor(0.75)).item() == pytest.approx(math.log(3), rel=1e-15)


def test_linear_ends_are_exact():
    ends = torch.tensor(Linear().interval)
    c = Linear().coefficients(ends)
    assert c.alpha.tolist() == [0, 1]
    assert c.sigma.tolist() == [1, 0]
    assert Linear().half_log_snr(ends).tolist() == [-math.inf, math.inf]
    assert Linear().time_of(torch.tensor([-math.inf, math.inf])).tolist() == [0, 1]


def test_direction_of_time_is_the_schedules_own(schedule):
    """α falls and σ rises from the data's end to the source's, whichever is at the larger time."""
    source, data = (schedule.coefficients(torch.tensor(t)) for t in schedule.interval)
    assert data.sigma < 1e-12
    assert data.alpha == pytest.approx(1)
    assert source.alpha / source.sigma < 0.02


def test_clip_lies_within_the_interval(schedule):
    low, high = sorted(schedule.interval)
    near_source, near_data = schedule.clip
    assert low <= min(schedule.clip) < max(schedule.clip) <= high
    assert schedule.half_log_snr(torch.tensor(near_source)) < schedule.half_log_snr(torch.tensor(near_data))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_coefficients_are_float64_of_the_shape_of_t(dtype, shape):
    for c in Linear().coefficients(torch.ones(shape, dtype=dtype)):
        assert c.dtype == torch.float64
        assert c.shape == shape


def test_determinant_keeps_its_sign(schedule, inside):
    """ασ̇ − α̇σ never vanishes inside; its sign is the direction of time: the 2×2 solve always has a solution."""
    alpha, sigma, d_alpha, d_sigma = schedule.coefficients(inside(schedule))
    determinant = alpha * d_sigma - d_alpha * sigma
    source, data = schedule.interval
    assert (determinant * (source - data) > 0).all()


def test_schedules_are_values():
    assert Linear() == Linear()
    assert repr(Linear()) == "Linear()"
    with pytest.raises(TypeError, match="abstract"):
        Schedule()

import pytest
import torch

from ndeflow.flows import Affine, Linear
from ndeflow.randomness import fold, normal

KEYS = fold("paths", torch.arange(20_000))


def ends(n=6, shape=(3,), dtype=torch.float64):
    keys = KEYS[:n]
    return normal(fold(keys, 0), shape, dtype), normal(fold(keys, 1), shape, dtype)


def test_velocity_is_the_derivative_of_the_curve(schedule, inside):
    path = Affine(schedule)
    t = inside(schedule, n=6)
    x0, x1 = ends()
    _, expected = torch.autograd.functional.jvp(lambda t: path.sample(x0, x1, t).x_t, t, torch.ones_like(t))
    torch.testing.assert_close(path.sample(x0, x1, t).velocity, expected, rtol=1e-10, atol=1e-10)


def test_linear_path_is_a_straight_line():
    x0, x1 = ends()
    path = Affine(Linear())
    quarter = path.sample(x0, x1, torch.tensor(0.25))
    torch.testing.assert_close(quarter.x_t, torch.lerp(x0, x1, 0.25))
    torch.testing.assert_close(quarter.velocity, x1 - x0)
    assert torch.equal(path.sample(x0, x1, torch.tensor(0.0)).x_t, x0)
    assert torch.equal(path.sample(x0, x1, torch.tensor(1.0)).x_t, x1)


def test_sample_carries_what_it_was_made_of():
    x0, x1 = ends(dtype=torch.float32)
    t = torch.rand(6)
    sample = Affine(Linear()).sample(x0, x1, t)
    assert sample.x0 is x0
    assert sample.x1 is x1
    assert sample.latent is None
    assert sample.t.dtype == torch.float64
    assert torch.equal(sample.coefficients.alpha, t.double())
    assert sample.x_t.dtype == sample.velocity.dtype == torch.float32


@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.999, 1 - 1e-5])
def test_float32_states_keep_the_small_coefficient(schedule, t):
    """The coefficient of the minor end, read off the state, is right to float32 accuracy near both ends."""
    path = Affine(schedule)
    source, data = path.interval
    time = torch.tensor(source + (data - source) * t, dtype=torch.float64)
    for end, expected in enumerate(path.coefficients(time)[:2]):
        x1, x0 = torch.full((1, 1), float(end == 0)), torch.full((1, 1), float(end == 1))
        state = path.sample(x0, x1, time).x_t
        assert state.dtype == torch.float32
        assert state.item() == pytest.approx(expected.item(), rel=1e-6)


def test_images_as_wide_as_the_batch_get_one_time_per_sample(schedule, inside):
    """With B = width, a time of shape (B,) would broadcast along the width without an error."""
    path = Affine(schedule)
    x0, x1 = ends(8, (1, 8, 8))
    t = inside(schedule, n=8)
    batch = path.sample(x0, x1, t)
    for i in range(8):
        single = path.sample(x0[i : i + 1], x1[i : i + 1], t[i])
        assert torch.equal(batch.x_t[i], single.x_t[0])
        assert torch.equal(batch.velocity[i], single.velocity[0])


def test_marginal_moments_of_a_gaussian(schedule):
    path = Affine(schedule)
    x1 = 1.5 + 0.5 * normal(fold(KEYS, "data"), (1,), torch.float64)
    x0 = normal(fold(KEYS, "noise"), (1,), torch.float64)
    t = path.time_of(torch.tensor(0.0))
    c = path.coefficients(t)
    x = path.sample(x0, x1, t).x_t
    std = (0.25 * c.alpha**2 + c.sigma**2).sqrt()
    error = 5 * std / len(KEYS) ** 0.5
    assert abs(x.mean() - 1.5 * c.alpha) < error
    assert abs(x.std() - std) < error
    assert abs(x.mean() - 1.4 * c.alpha) > error  # the test can tell means apart


def test_prior_is_the_state_at_the_source(schedule):
    path = Affine(schedule)
    x = path.prior(KEYS, (2,), torch.float64)
    sigma = path.coefficients(torch.tensor(path.interval[0])).sigma
    assert x.shape == (len(KEYS), 2)
    assert x.std().item() == pytest.approx(sigma.item(), rel=0.02)
    assert abs(x.mean()) < 5 * sigma / x.numel() ** 0.5


def test_prior_of_a_sample_depends_on_its_key_alone():
    path = Affine(Linear())
    whole = path.prior(KEYS[:10], (3,))
    assert whole.dtype == torch.float32
    order = torch.tensor([7, 2, 9])
    assert torch.equal(path.prior(KEYS[order], (3,)), whole[order])
    assert not torch.equal(whole[0], whole[1])


def test_prior_of_an_unknown_source_is_refused():
    path = Affine(Linear(), gaussian_source=False)
    with pytest.raises(ValueError, match=r"gaussian_source=False.*hand the source samples"):
        path.prior(KEYS[:2], (3,))


def test_path_forwards_its_schedule(schedule):
    path = Affine(schedule)
    level = torch.tensor([-1.0, 0.5])
    assert path.interval == schedule.interval
    assert path.clip == schedule.clip
    assert torch.equal(path.time_of(level), schedule.time_of(level))
    assert torch.equal(path.half_log_snr(path.time_of(level)), schedule.half_log_snr(schedule.time_of(level)))


@pytest.mark.parametrize(
    ("x0", "x1", "t", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.rand(2), ValueError, r"x0 \(2, 3\) and x1 \(2, 4\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3).double(),
            torch.rand(2),
            TypeError,
            "x0 torch.float32 and x1 torch.float64",
        ),
        (torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), torch.rand(2), TypeError, "float16.*autocast"),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16(), torch.rand(2), TypeError, "bfloat16"),
        (torch.zeros(2), torch.zeros(2), torch.rand(2), ValueError, r"\(B, \*\).*got \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.rand(3), ValueError, r"\(\) or \(B,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.rand(2, 1), ValueError, r"\(\) or \(B,\)"),
    ],
)
def test_what_does_not_fit_is_refused(x0, x1, t, error, message):
    with pytest.raises(error, match=message):
        Affine(Linear()).sample(x0, x1, t)

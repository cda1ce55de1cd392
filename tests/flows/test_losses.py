import math

import pytest
import torch

from ndeflow.flows import Affine, FlowLoss, FlowModel, Independent, Linear, NotAScore, PseudoHuber, Squared, Uniform
from ndeflow.flows.losses import Premetric, target
from ndeflow.flows.prediction import READINGS, Provenance
from ndeflow.randomness import fold, normal

N = 40_000
KEYS = fold("losses", torch.arange(N))


def gaussian_sample(schedule, mean=1.5, std=0.5, n=N, shape=(1,), margin=0.02):
    """Points of the path between noise and N(mean, std²), away from the ends, where some readings diverge."""
    keys = KEYS[:n]
    x1 = mean + std * normal(fold(keys, "x1"), shape, torch.float64)
    source, data = schedule.interval
    reach = (data - source) * margin
    t = Uniform()(keys, torch.arange(n), n, (source + reach, data - reach))
    return Affine(schedule).sample(Independent()(x1, None, keys).x0, x1, t)


def test_squared_is_the_mean_over_dimensions():
    residual = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    assert Squared()(residual, None, None).tolist() == [2.5, 4.5]


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    direction = torch.nn.functional.normalize(torch.randn(1, 2, 8, dtype=torch.float64), dim=(1, 2))
    c, d = 0.3, 16
    small, large = 1e-4, 1e4
    near = PseudoHuber(c)(small * direction, None, None).item()
    far = PseudoHuber(c)(large * direction, None, None).item()
    assert near == pytest.approx(small**2 / (2 * c) / d, rel=1e-4)
    assert far == pytest.approx(large / d, rel=1e-4)


def test_pseudo_huber_turns_at_c_whatever_the_dimension():
    """c refers to the norm of the whole residual: its loss there is (√2 − 1)c/d."""
    for d in (1, 64):
        residual = torch.full((1, d), 0.3 / math.sqrt(d), dtype=torch.float64)
        assert PseudoHuber(0.3)(residual, None, None).item() * d == pytest.approx((math.sqrt(2) - 1) * 0.3)


@pytest.mark.parametrize("premetric", [Squared(), PseudoHuber(0.1)])
def test_gradient_is_finite_where_the_residual_vanishes(premetric):
    residual = torch.zeros(2, 3, requires_grad=True)
    loss = premetric(residual, None, None)
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert torch.equal(residual.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("reading", READINGS)
def test_target_has_the_reading_as_conditional_mean(schedule, gaussian_model, reading):
    """Least squares: the residual of the exact model correlates neither with x_t nor with a constant."""
    sample = gaussian_sample(schedule)
    model = gaussian_model(schedule)
    exact = model.net.readings(sample.t, sample.x_t)

    def is_unbiased(residual):
        x = sample.x_t / sample.x_t.std()
        scores = torch.cat((residual, residual * x), dim=1)
        return bool((scores.mean(0).abs() < 4 * scores.std(0) / math.sqrt(N)).all())

    assert is_unbiased(exact[reading] - target(reading, sample))
    assert not is_unbiased(exact[reading] * 1.3 - target(reading, sample))


def test_loss_of_the_exact_velocity_is_the_closed_form(gaussian_model):
    """E‖x1 − x0 − u‖² = ∫ std²/(std²t² + (1 − t)²) dt = π·std/2 for one Gaussian dimension: no loss can be lower."""
    for std in (0.5, 1.0):
        sample = gaussian_sample(Linear(), std=std, margin=0.0)
        losses = FlowLoss()(gaussian_model(std=std), sample)
        assert losses.shape == (N,)
        error = losses.std().item() / math.sqrt(N)
        assert losses.mean().item() == pytest.approx(math.pi * std / 2, abs=4 * error)
        assert FlowLoss()(gaussian_model(std=1.2 * std), sample).mean() > losses.mean()


WEIGHTS = {  # ‖δu‖² in units of the squared error of another reading, at fixed x_t
    "data": lambda c: (c.d_alpha - c.d_sigma * c.alpha / c.sigma) ** 2,
    "noise": lambda c: (c.d_alpha * c.sigma / c.alpha - c.d_sigma) ** 2,
    "v": lambda c: ((c.alpha * c.d_sigma - c.d_alpha * c.sigma) / (c.alpha**2 + c.sigma**2)) ** 2,
    "score": lambda c: (c.d_alpha * c.sigma**2 / c.alpha - c.d_sigma * c.sigma) ** 2,
}


@pytest.mark.parametrize("reading", WEIGHTS)
def test_weighted_losses_of_other_readings_are_velocity_losses(schedule, gaussian_model, reading):
    sample = gaussian_sample(schedule, n=200, shape=(1, 2, 2))
    for predicts in READINGS:
        model = gaussian_model(schedule, predicts, mean=1.0)
        velocity = FlowLoss()(model, sample)
        weighted = FlowLoss(reading, WEIGHTS[reading])(model, sample)
        torch.testing.assert_close(weighted, velocity, rtol=1e-7, atol=1e-7 * velocity.max().item())
    unweighted = FlowLoss(reading)(model, sample)
    units = WEIGHTS[reading](sample.coefficients)
    assert torch.allclose(unweighted, velocity, rtol=0.01, atol=0) == torch.allclose(units, torch.ones_like(units))


def test_premetric_sees_sample_and_prediction(gaussian_model):
    class Probe(Premetric):
        def __call__(self, residual, sample, prediction):
            torch.testing.assert_close(residual, prediction.data - sample.x1)
            return residual.new_ones(len(residual))

    sample = gaussian_sample(Linear(), n=5)
    losses = FlowLoss("data", lambda c: c.sigma, Probe())(gaussian_model(), sample)
    torch.testing.assert_close(losses, sample.coefficients.sigma)


def test_loss_keeps_the_dtype_of_the_states(gaussian_model):
    sample = Affine(Linear()).sample(torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, dtype=torch.float64))
    assert FlowLoss(weight=lambda c: c.alpha)(gaussian_model(), sample).dtype == torch.float32


def test_conditions_reach_the_net():
    class Label(torch.nn.Module):
        def forward(self, t, x, cond):
            return cond[:, None].to(x.dtype).expand_as(x)

    path = Affine(Linear())
    x1 = torch.tensor([[2.0], [5.0]])
    sample = path.sample(torch.zeros(2, 1), x1, torch.tensor(0.5))
    losses = FlowLoss()(FlowModel(Label(), path), sample, torch.tensor([2, 7]))
    assert losses.tolist() == [0, 4]


def test_score_of_a_coupled_flow_is_refused():
    path = Affine(Linear())
    model = FlowModel(torch.nn.Bilinear(1, 1, 1), path, provenance=Provenance(independent=False))
    model.net.forward = lambda t, x, cond: x
    with pytest.raises(NotAScore):
        FlowLoss("score")(model, gaussian_sample(Linear(), n=4))


def test_what_is_no_reading_or_no_scale_is_refused():
    with pytest.raises(ValueError, match="one of data, noise, velocity, v, score, got 'x1'"):
        FlowLoss("x1")
    with pytest.raises(ValueError, match="c > 0, got 0"):
        PseudoHuber(0.0)

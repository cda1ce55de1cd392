import itertools
import math

import pytest
import torch

from ndeflow.flows import Affine, FlowModel, Linear, NotAScore, Prediction, Provenance, UndefinedReading
from ndeflow.flows.prediction import READINGS, conversion, require_reading

PAIRS = list(itertools.product(READINGS, READINGS))


@pytest.mark.parametrize(("predicts", "reading"), PAIRS)
def test_every_reading_follows_from_every_prediction(schedule, inside, gaussian_model, predicts, reading):
    """Against the exact posterior means of a Gaussian, a different formula for each reading."""
    model = gaussian_model(schedule, predicts)
    t = inside(schedule)
    alpha, sigma, _, _ = schedule.coefficients(t)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None] * (alpha**2 + sigma**2).sqrt()[:, None]
    error = (model(t, x).read(reading) - model.net.readings(t, x)[reading]).abs()
    scale = model.net.readings(t, x)[reading].abs().clamp(min=1)
    allowed = 1e-10 * torch.maximum(1 / alpha, 1 / sigma).clamp(min=1)[:, None] * scale
    assert (error <= allowed).all()


def test_readings_are_properties(gaussian_model):
    prediction = gaussian_model()(torch.tensor(0.3), torch.randn(4, 2))
    for reading in READINGS:
        assert torch.equal(getattr(prediction, reading), prediction.read(reading))


@pytest.mark.parametrize("predicts", READINGS)
def test_what_is_predicted_is_returned_untouched(gaussian_model, predicts):
    value = torch.randn(3, 2)
    model = gaussian_model(predicts=predicts)
    prediction = Prediction(torch.tensor(0.0), torch.randn(3, 2), value, predicts, model.path, model.provenance)
    assert prediction.read(predicts) is value


def test_state_is_the_mix_of_data_and_noise(schedule, inside):
    """For any output of a net, trained or not: x = αD + σE and u = α̇D + σ̇E."""
    t = inside(schedule)
    x, value = torch.randn(2, 41, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = [c[:, None] for c in schedule.coefficients(t)]
    for predicts in READINGS:
        p = Prediction(t, x, value, predicts, Affine(schedule), Provenance())
        torch.testing.assert_close(c[0] * p.data + c[1] * p.noise, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c[2] * p.data + c[3] * p.noise, p.velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("predicts", "reading"), PAIRS)
def test_float32_loses_only_what_the_end_amplifies(gaussian_model, predicts, reading):
    """At 1e-3 from an end a rounding error grows by 1/α or 1/σ, for the score by 1/σ², and no further."""
    model = gaussian_model(predicts=predicts)
    t = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)
    x = torch.linspace(-2, 2, 3)[:, None]
    exact = model.net.readings(t, x.double())[reading]
    error = (model(t, x).read(reading) - exact).abs().flatten()
    assert (error[[0, 1]] < torch.tensor([2e-3, 3e-6])).all()
    assert error[2] < (2e-3 if reading != "score" else 2)


UNDEFINED = {  # on the linear path: (prediction, reading) at t = 0, where α = 0, and at t = 1, where σ = 0
    0.0: {(p, r) for p in ("noise", "score") for r in ("data", "velocity", "v")},
    1.0: {("data", r) for r in ("noise", "velocity", "v", "score")}
    | {(p, "score") for p in ("noise", "velocity", "v")},
}


@pytest.mark.parametrize(("predicts", "reading"), PAIRS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_at_an_exact_end_a_reading_is_its_limit_or_refused(gaussian_model, predicts, reading, t):
    model = gaussian_model(predicts=predicts)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    at_end = model(torch.tensor(t), x).read(reading)
    if (predicts, reading) in UNDEFINED[t]:
        assert not at_end.isfinite().any()
        with pytest.raises(UndefinedReading, match=f"{reading} does not follow.*predicts {predicts} at t={t:g}"):
            require_reading(model.path, predicts, reading, t)
    else:
        require_reading(model.path, predicts, reading, t)
        near = model.net.readings(torch.tensor(abs(t - 1e-9), dtype=torch.float64), x)[reading]
        torch.testing.assert_close(at_end, near, rtol=1e-6, atol=1e-6)


def test_refusal_says_what_would_do():
    with pytest.raises(UndefinedReading, match=r"alpha=0 and sigma=1: .*one of data, velocity, v$"):
        require_reading(Affine(Linear()), "noise", "velocity", 0.0)
    with pytest.raises(UndefinedReading, match=r"alpha=1 and sigma=0: .*one of noise, velocity, v, score$"):
        require_reading(Affine(Linear()), "data", "noise", 1.0)


def test_conversion_of_a_reading_to_itself_exists_everywhere():
    for t, reading in itertools.product((0.0, 1.0), READINGS):
        a, b = conversion(reading, reading, Linear().coefficients(torch.tensor(t)))
        assert (a, b) == (0, 1)


def test_images_as_wide_as_the_batch_are_converted_sample_by_sample(gaussian_model):
    model = gaussian_model(predicts="data")
    x, t = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    batch = model(t, x)
    for reading, i in itertools.product(READINGS, range(8)):
        single = model(t[i], x[i : i + 1]).read(reading)
        torch.testing.assert_close(batch.read(reading)[i], single[0])


def test_readings_are_lazy_and_of_one_call(gaussian_model):
    calls = []
    model = gaussian_model()
    model.net.register_forward_hook(lambda *_: calls.append(1))
    prediction = model(torch.tensor(0.5), torch.randn(2, 3))
    for reading in READINGS:
        prediction.read(reading)
    assert len(calls) == 1


def test_data_prediction_of_a_coupled_flow_is_no_score():
    """Data x1 = x0/2: −E/σ has slope −2.083 at t = 0.4, the true score −1.563. So it is refused, not returned."""
    path, t = Affine(Linear()), torch.tensor(0.4)
    x0 = torch.tensor([[1.0]])
    sample = path.sample(x0, x0 / 2, t)
    wrong = Prediction(t, sample.x_t, sample.velocity, "velocity", path, Provenance())
    assert (wrong.score / sample.x_t).item() == pytest.approx(-2.0833, abs=1e-3)
    assert (-1 / path.sample(torch.ones(1, 1), torch.ones(1, 1) / 2, t).x_t ** 2).item() == pytest.approx(-1.5625)
    honest = Prediction(t, sample.x_t, sample.velocity, "velocity", path, Provenance(independent=False))
    with pytest.raises(NotAScore, match="dependent source and data"):
        _ = honest.score
    assert honest.data.item() == pytest.approx(0.5)


@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "v"])
def test_score_of_a_source_that_is_not_gaussian_is_refused(predicts):
    path = Affine(Linear(), gaussian_source=False)
    model = FlowModel(torch.nn.Identity(), path, predicts=predicts)
    prediction = Prediction(torch.tensor(0.5), torch.ones(1, 2), torch.ones(1, 2), predicts, path, model.provenance)
    with pytest.raises(NotAScore, match="not Gaussian"):
        _ = prediction.score
    for reading in ("data", "noise", "velocity", "v"):
        assert prediction.read(reading).isfinite().all()


def test_score_of_a_gaussian_is_the_gradient_of_its_log_density(gaussian_model):
    model = gaussian_model(mean=-0.5, std=2.0)
    t, x = 0.3, torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].requires_grad_()
    law = torch.distributions.Normal(t * -0.5, math.hypot(t * 2.0, 1 - t))
    (expected,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    torch.testing.assert_close(model(torch.tensor(t, dtype=torch.float64), x).score, expected)

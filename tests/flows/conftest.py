"""Schedules of other papers and a Gaussian whose exact flow is known, to test what holds on every path."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ndeflow.flows import Affine, Coefficients, FlowModel, Linear, Schedule


@dataclass(frozen=True)
class Trigonometric(Schedule):
    interval = (0.0, 1.0)
    clip = (0.0, 1.0)

    def coefficients(self, t):
        half_pi = torch.pi / 2
        sine, cosine = (half_pi * t.double()).sin(), (half_pi * (1 - t.double())).sin()
        return Coefficients(sine, cosine, half_pi * cosine, -half_pi * sine)

    def time_of(self, half_log_snr):
        return half_log_snr.double().exp().atan() * 2 / torch.pi


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """β(t) = 0.1 + 19.9 t; time runs from noise at 1 to data at 0."""

    interval = (1.0, 0.0)
    clip = (1.0, 1e-5)

    def coefficients(self, t):
        t = t.double()
        beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
        alpha, sigma = (-integral / 2).exp(), (-(-integral).expm1()).sqrt()
        return Coefficients(alpha, sigma, -beta * alpha / 2, beta * alpha**2 / (2 * sigma))

    def time_of(self, half_log_snr):
        integral = nn.functional.softplus(-2 * half_log_snr.double())
        return 2 * integral / (0.1 + (0.01 + 2 * 19.9 * integral).sqrt())


@dataclass(frozen=True)
class NoiseLevel(Schedule):
    """The time is the noise level, from 80 to 0."""

    interval = (80.0, 0.0)
    clip = (80.0, 0.002)

    def coefficients(self, t):
        one = torch.ones_like(t.double())
        return Coefficients(one, t.double(), 0 * one, one)

    def time_of(self, half_log_snr):
        return (-half_log_snr.double()).exp()


SCHEDULES = {s.__class__.__name__: s for s in (Linear(), Trigonometric(), VariancePreserving(), NoiseLevel())}


class Gaussian(nn.Module):
    """The exact net for data N(mean, std²) and independent noise N(0, 1): linear regression of x1 and x0 on x_t."""

    def __init__(self, path, predicts, mean, std):
        super().__init__()
        self.path, self.predicts, self.mean, self.std = path, predicts, mean, std

    def readings(self, t, x):
        alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, *(1,) * (x.ndim - 1)) for c in self.path.coefficients(t))
        variance = alpha**2 * self.std**2 + sigma**2
        gap = x - alpha * self.mean
        data, noise = self.mean + alpha * self.std**2 / variance * gap, sigma / variance * gap
        return {
            "data": data,
            "noise": noise,
            "velocity": d_alpha * data + d_sigma * noise,
            "v": alpha * noise - sigma * data,
            "score": -gap / variance,
        }

    def forward(self, t, x, cond):
        return self.readings(t, x)[self.predicts].to(x.dtype)

    def flow(self, t0, t1, x):
        """Where the exact flow carries x from t0 to t1: quantiles stay quantiles."""
        moments = []
        for t in (t0, t1):
            c = self.path.coefficients(torch.tensor(t, dtype=torch.float64))
            moments.append((c.alpha * self.mean, (c.alpha**2 * self.std**2 + c.sigma**2).sqrt()))
        (mean0, std0), (mean1, std1) = moments
        return mean1 + std1 / std0 * (x - mean0)


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


@pytest.fixture
def schedules():
    return SCHEDULES


@pytest.fixture
def gaussian_model():
    """Builds the exact model of N(mean, std²) on a path."""

    def build(schedule=SCHEDULES["Linear"], predicts="velocity", mean=1.5, std=0.5):
        path = Affine(schedule)
        return FlowModel(Gaussian(path, predicts, mean, std), path, predicts=predicts)

    return build


@pytest.fixture
def inside():
    """Times strictly inside a schedule's interval, nearly to its ends."""

    def times(schedule, n=41, margin=1e-3):
        source, data = schedule.interval
        return source + (data - source) * torch.linspace(margin, 1 - margin, n, dtype=torch.float64)

    return times

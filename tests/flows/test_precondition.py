import pytest
import torch
from torch import nn

from ndeflow.flows import Affine, FlowModel, Identity, Linear, Precondition


class Recorder(nn.Module):
    """Returns x and remembers what it was called with."""

    def forward(self, t, x, cond):
        self.seen = t, x, cond
        return x


@pytest.mark.parametrize("scale", [1.0, 999.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_net_sees_the_scaled_time_per_sample_in_the_dtype_of_the_state(scale, dtype):
    net = Recorder()
    model = FlowModel(net, Affine(Linear()), Identity(scale))
    x, cond = torch.randn(3, 2, dtype=dtype), torch.arange(3)
    for t in (torch.tensor(0.25), torch.tensor([0.25, 0.25, 0.25], dtype=torch.float64)):
        assert model(t, x, cond).value is x
        time, state, label = net.seen
        assert time.dtype == dtype
        assert time.tolist() == [0.25 * scale] * 3
        assert state is x
        assert label is cond


def test_time_is_scaled_before_it_is_rounded():
    net = Recorder()
    t = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    FlowModel(net, Affine(Linear()), Identity(999.0))(t, torch.zeros(50, 1))
    assert torch.equal(net.seen[0], (999 * t).float())
    assert not torch.equal(net.seen[0], 999 * t.float())


def test_a_precondition_can_scale_input_and_output():
    """Unit-variance targets: u = ((αα̇s² + σσ̇)x + |ασ̇ − α̇σ|·s·√V·F(x/√V))/V with V = α²s² + σ²; other shapes fit."""

    class UnitVariance(Precondition):
        def time_input(self, path, t):
            return path.half_log_snr(t) / 4

        def __call__(self, net, path, t, x, cond):
            a, s, da, ds = (c[:, None].to(x.dtype) for c in path.coefficients(t))
            v, determinant = a**2 * 0.25 + s**2, (a * ds - da * s).abs()
            out = net(self.time_input(path, t).to(x.dtype), x / v.sqrt(), cond)
            return (a * da * 0.25 + s * ds) / v * x + determinant * 0.5 / v.sqrt() * out

    class Zero(nn.Module):
        def forward(self, t, x, cond):
            assert t.tolist() == pytest.approx([0.0] * len(x), abs=1e-7)
            return torch.zeros_like(x)

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    half = FlowModel(Zero(), Affine(Linear()), UnitVariance())(torch.tensor(0.5), x)
    # the linear part is the exact velocity of data N(0, 0.5²): data and noise in the ratio of their variances
    torch.testing.assert_close(half.velocity, (0.5 * 0.25 - 0.5) / (0.25 * 0.25 + 0.25) * x)


def test_a_net_that_would_not_know_the_time_is_refused():
    with pytest.raises(ValueError, match="time_scale != 0"):
        Identity(0.0)


def test_preconditions_are_values():
    assert Identity() == Identity(1.0)
    assert repr(Identity(999.0)) == "Identity(time_scale=999.0)"
    with pytest.raises(TypeError, match="abstract"):
        Precondition()

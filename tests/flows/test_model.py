import math

import pytest
import torch
from torch import nn

from ndeflow.flows import Affine, FlowLoss, FlowModel, Independent, Linear, NotAScore, Provenance, Uniform
from ndeflow.nets import MLP
from ndeflow.randomness import fold, normal


class Doubled(nn.Module):
    def forward(self, t, x, cond):
        return 2 * x


def build(net=None, **settings):
    return FlowModel(net or Doubled(), Affine(Linear()), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("predicts", ["data", "noise", "velocity", "v", "score"])
def test_readings_have_dtype_and_shape_of_the_state(dtype, predicts):
    x = torch.randn(3, 1, 4, 4, dtype=dtype)
    prediction = build(predicts=predicts)(torch.rand(3), x)
    for reading in ("data", "noise", "velocity", "v", "score"):
        assert prediction.read(reading).dtype == dtype
        assert prediction.read(reading).shape == x.shape


def test_one_time_for_the_batch_is_that_time_for_each_sample():
    torch.manual_seed(0)
    model = build(MLP((3,), 16, 1))
    nn.init.normal_(model.net.last.weight)
    x = torch.randn(5, 3)
    alike = model(torch.tensor(0.3), x), model(torch.full((5,), 0.3), x)
    assert torch.equal(alike[0].value, alike[1].value)
    assert torch.equal(alike[0].data, alike[1].data)
    assert not torch.equal(model(torch.tensor(0.4), x).value, alike[0].value)


def test_times_enter_in_float64():
    t = torch.tensor(0.1)
    assert build()(t, torch.ones(1, 1)).t.dtype == torch.float64


def test_autocast_lowers_the_net_not_the_state():
    torch.manual_seed(0)
    model = build(MLP((8,), 64, 1))
    nn.init.normal_(model.net.last.weight)
    x, t = torch.randn(4, 8), torch.rand(4)
    exact = model(t, x)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(t, x)
    for reading in ("velocity", "data"):
        assert lowered.read(reading).dtype == torch.float32
        gap = (lowered.read(reading) - exact.read(reading)).abs().max()
        assert 1e-5 < gap < 0.05 * exact.read(reading).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x must be float32 or float64, got {dtype}.*autocast"):
        build()(torch.tensor(0.5), torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("t", "x", "message"),
    [
        (torch.rand(2), torch.ones(3, 2), r"\(B,\) = \(3,\), got \(2,\)"),
        (torch.rand(3, 1), torch.ones(3, 2), r"got \(3, 1\)"),
        (torch.rand(1), torch.ones(3, 2), r"got \(1,\)"),
        (torch.tensor(0.5), torch.ones(3), r"a batch axis and a data axis"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(t, x, message):
    with pytest.raises(ValueError, match=message):
        build()(t, x)


def test_a_net_of_another_shape_is_refused():
    class Summed(nn.Module):
        def forward(self, t, x, cond):
            return x.sum(1, keepdim=True)

    with pytest.raises(ValueError, match=r"returned \(3, 1\) for states of shape \(3, 2\)"):
        build(Summed())(torch.tensor(0.5), torch.ones(3, 2))


def test_what_is_no_reading_is_refused():
    with pytest.raises(ValueError, match="one of data, noise, velocity, v, score, got 'epsilon'"):
        build(predicts="epsilon")


def test_a_score_model_needs_independent_gaussian_noise():
    with pytest.raises(NotAScore, match="use predicts='velocity'"):
        build(predicts="score", provenance=Provenance(independent=False))
    with pytest.raises(NotAScore, match="use predicts='velocity'"):
        FlowModel(Doubled(), Affine(Linear(), gaussian_source=False), predicts="score")


def test_only_the_net_has_state():
    model = build(MLP((2,), 8, 1))
    assert {name.split(".")[0] for name in model.state_dict()} == {"net"}


def test_forward_compiles_as_one_graph():
    torch.manual_seed(0)
    model = build(MLP((4,), 16, 2))
    nn.init.normal_(model.net.last.weight)
    t, x = torch.rand(3), torch.randn(3, 4)
    compiled = torch.compile(lambda t, x: model(t, x).data, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, x), model(t, x).data)


def test_training_reaches_the_least_possible_loss():
    """Noise to N(2, ½²) in one dimension: the least mean squared error is π/4, and a small MLP comes close."""
    torch.manual_seed(0)
    model = build(MLP((1,), 64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    slots, losses = torch.arange(512), []
    for step in range(300):
        keys = fold("training", step, slots)
        pair = Independent()(2 + 0.5 * normal(fold(keys, "data"), (1,)), None, keys)
        sample = model.path.sample(pair.x0, pair.x1, Uniform()(keys, slots, 512, model.path.clip))
        loss = FlowLoss()(model, sample).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(4 + 0.25 + 1, rel=0.2)  # the zero output: E(x1 − x0)²
    assert sum(losses[-100:]) / 100 == pytest.approx(math.pi / 4, rel=0.03)

import pytest
import torch

from ndeflow.flows import Affine, Coupling, Independent, Linear
from ndeflow.randomness import fold

KEYS = fold("couplings", torch.arange(50_000))


def test_source_is_standard_normal_and_independent_of_the_data():
    x1 = 3 + 2 * torch.randn(len(KEYS), 1, generator=torch.Generator().manual_seed(0))
    x0 = Independent()(x1, None, KEYS).x0
    error = 4 / len(KEYS) ** 0.5
    assert abs(x0.mean()) < error
    assert abs(x0.var() - 1) < 2 * error
    assert abs(torch.corrcoef(torch.stack((x0[:, 0], x1[:, 0])))[0, 1]) < error
    assert abs(torch.corrcoef(torch.stack((x0[:, 0], x0[:, 0] + 0.1 * x1[:, 0])))[0, 1]) > error


def test_pairs_keep_data_and_conditions():
    x1, cond = torch.randn(4, 1, 3, 3), torch.arange(4)
    pair = Independent()(x1, cond, KEYS[:4])
    assert pair.x1 is x1
    assert pair.cond is cond
    assert pair.x0.shape == x1.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_source_depends_on_the_key_alone(dtype):
    x1 = torch.randn(10, 2, 3, dtype=dtype)
    whole = Independent()(x1, None, KEYS[:10]).x0
    assert whole.dtype == dtype
    order = torch.tensor([3, 8, 0])
    assert torch.equal(Independent()(x1[order] + 1, None, KEYS[order]).x0, whole[order])
    assert not torch.equal(whole[0], whole[1])


def test_source_of_training_has_the_law_of_the_prior():
    """On a path whose σ is 1 at the source, training and sampling draw by one rule."""
    x1 = torch.zeros(6, 4)
    assert torch.equal(Independent()(x1, None, KEYS[:6]).x0, Affine(Linear()).prior(KEYS[:6], (4,)))


def test_couplings_declare_whether_they_are_independent():
    assert Independent.independent
    with pytest.raises(TypeError, match="abstract"):
        Coupling()

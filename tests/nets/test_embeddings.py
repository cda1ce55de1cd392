import pytest
import torch
from torch import nn

from ndeflow.nets import ConditionEmbedding, TimeEmbedding
from ndeflow.nets.embeddings import zero_init


def test_frequencies_are_geometric_between_their_ends():
    frequencies = TimeEmbedding(16, low=0.5, high=64.0).double().frequencies
    assert frequencies[0].item() == pytest.approx(0.5)
    assert frequencies[-1].item() == pytest.approx(64.0, rel=1e-6)
    torch.testing.assert_close(frequencies[1:] / frequencies[:-1], torch.full((7,), 2.0, dtype=torch.float64))


def test_embedding_is_a_point_on_one_circle_per_frequency():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    embedding = TimeEmbedding(8, high=10.0).double()
    cosine, sine = embedding(t).chunk(2, dim=1)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(3, 4, dtype=torch.float64))
    angle = torch.atan2(sine[:, 0], cosine[:, 0])  # the lowest frequency is 1
    torch.testing.assert_close(angle, t)


def test_near_times_are_near_and_told_apart():
    """Distances grow with the difference in time, from thousandths on."""
    embedding = TimeEmbedding(64)
    base = embedding(torch.tensor([0.5]))
    gaps = [1e-6, 1e-4, 1e-3, 1e-2]
    distances = [(embedding(torch.tensor([0.5 + gap], dtype=torch.float64)) - base).norm().item() for gap in gaps]
    assert distances == sorted(distances)
    assert distances[0] < 0.01
    assert distances[2] > 0.1


def test_times_are_embedded_in_their_own_precision():
    embedding = TimeEmbedding(8)
    assert embedding(torch.rand(2, dtype=torch.float64)).dtype == torch.float64
    assert embedding(torch.rand(2)).dtype == torch.float32
    assert not embedding.state_dict()


def test_conditions_add_up():
    torch.manual_seed(0)
    embedding = ConditionEmbedding(8, (2,), 3, "net")
    t, x, cond = torch.rand(4), torch.zeros(4, 2), torch.tensor([2, 0, 1, 2])
    e = embedding(t, x, cond)
    torch.testing.assert_close(e - embedding.time(t), embedding.label.weight[cond])
    unconditional = ConditionEmbedding(8, (2,), None, "net")
    assert torch.equal(unconditional(t, x, None), unconditional.time(t))


def test_embedding_has_the_dtype_of_the_state():
    embedding = ConditionEmbedding(8, (2,), None, "net")
    assert embedding(torch.rand(4, dtype=torch.float64), torch.zeros(4, 2), None).dtype == torch.float32


def test_labels_out_of_range_are_refused():
    embedding = ConditionEmbedding(8, (2,), 3, "net")
    with pytest.raises(IndexError):
        embedding(torch.rand(1), torch.zeros(1, 2), torch.tensor([3]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TimeEmbedding(7), "even number of features, at least 4, got 7"),
        (lambda: TimeEmbedding(2), "at least 4, got 2"),
        (lambda: TimeEmbedding(8, low=0.0), "0 < low < high, got low=0.0, high=1000.0"),
        (lambda: TimeEmbedding(8, low=5.0, high=5.0), "0 < low < high"),
        (lambda: ConditionEmbedding(8, (), None, "Net"), r"Net needs the shape of one sample.*got \(\)"),
        (lambda: ConditionEmbedding(8, (2, 0), None, "Net"), r"got \(2, 0\)"),
        (lambda: ConditionEmbedding(8, (2,), 0, "Net"), "Net needs classes >= 1.*got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_zero_init_silences_a_layer():
    layer = zero_init(nn.Linear(3, 2))
    assert torch.equal(layer(torch.randn(5, 3)), torch.zeros(5, 2))

import pytest
import torch

from ndeflow.tensors import expand_time


def test_a_scalar_time_stays_a_scalar():
    assert expand_time(torch.tensor(0.5), torch.zeros(3, 2, 2)).shape == ()


def test_times_go_along_the_batch_even_when_it_equals_the_width():
    y = torch.zeros(4, 1, 4, 4)
    assert (y + expand_time(torch.arange(4.0), y))[2].unique().tolist() == [2.0]


@pytest.mark.parametrize("shape", [(5,), (3, 1), (1,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must have shape \(\) or \(B,\) = \(3,\)"):
        expand_time(torch.zeros(shape), torch.zeros(3, 2))

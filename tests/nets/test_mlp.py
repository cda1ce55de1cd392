import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ndeflow.nets import MLP


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), [3, 4], (1,)])
def test_any_shape_of_data(shape):
    x = torch.randn(5, *shape)
    assert MLP(shape, width=8, depth=1)(torch.rand(5), x).shape == x.shape


def test_a_training_step_costs_six_multiplications_per_weight_and_sample():
    """Forward and backward of width 384, depth 3 on 64 numbers: what keeps it within 15 ms on a core."""
    net = MLP((1, 8, 8), width=384, depth=3)
    weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    assert weights < 570_000
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(256), torch.randn(256, 1, 8, 8)).square().mean().backward()
    assert counter.get_total_flops() <= 6 * weights * 256  # data need no gradient, which saves a little


def test_blocks_are_residual():
    """With silent blocks the net is its first and last layer."""
    net = MLP((3,), width=16, depth=3)
    torch.nn.init.normal_(net.last.weight)
    for block in net.blocks:
        torch.nn.init.zeros_(block.weight)
        torch.nn.init.zeros_(block.bias)
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(torch.rand(4), x), net.last(torch.nn.functional.silu(net.first(x))))


def test_depth_counts_blocks():
    shallow, deep = MLP((2,), width=16, depth=1), MLP((2,), width=16, depth=4)
    extra = sum(p.numel() for p in deep.parameters()) - sum(p.numel() for p in shallow.parameters())
    block = 16 * 16 + 16 + 16 + 65 * 16  # matrix, bias, norm, and its share of the condition
    assert extra == 3 * block


def test_it_learns_a_field_that_depends_on_everything():
    torch.manual_seed(0)
    net = MLP((2,), width=64, depth=2, classes=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(301):
        t, x, cond = torch.rand(256), torch.randn(256, 2), torch.randint(2, (256,))
        truth = torch.where(cond[:, None] == 0, (6 * t)[:, None].sin() * x.flip(1), -x)
        loss = (net(t, x, cond) - truth).square().mean()
        if step == 0:
            first = loss.item()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 301)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first


@pytest.mark.parametrize(("width", "depth"), [(0, 1), (8, 0)])
def test_sizes_out_of_range_are_refused(width, depth):
    with pytest.raises(ValueError, match=f"got width={width}, depth={depth}"):
        MLP((2,), width, depth)

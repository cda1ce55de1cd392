import pytest
import torch
from torch.nn import functional as F

from ndeflow.nets import UNet
from ndeflow.nets.unet import _Attention, _Residual, _Upsample


def trace_sizes(net, x):
    """Channels and sides of what each residual block puts out."""
    sizes = []
    for module in net.modules():
        if isinstance(module, _Residual):
            module.register_forward_hook(lambda m, inputs, output: sizes.append(tuple(output.shape[1:])))
    net(torch.rand(len(x)), x)
    return sizes


@pytest.mark.parametrize(
    ("shape", "multipliers", "sizes"),
    [
        ((1, 28, 28), (1, 2, 3), [(8, 28, 28), (16, 14, 14), (24, 7, 7), (24, 7, 7), (24, 7, 7)]),
        ((3, 8, 8), (1, 2), [(8, 8, 8), (16, 4, 4), (16, 4, 4), (16, 4, 4)]),
        ((1, 7, 7), (2,), [(16, 7, 7), (16, 7, 7), (16, 7, 7)]),
        ((2, 12, 20), (1, 1, 1), [(8, 12, 20), (8, 6, 10), (8, 3, 5), (8, 3, 5), (8, 3, 5)]),
        ((1, 8, 8), (1, 1, 1, 1), [(8, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1), (8, 1, 1), (8, 1, 1)]),
    ],
)
def test_levels_halve_down_and_double_up(shape, multipliers, sizes):
    net = UNet(shape, channels=8, multipliers=multipliers, blocks=1)
    seen = trace_sizes(net, torch.randn(2, *shape))
    assert seen[: len(sizes)] == sizes
    assert seen[len(sizes) :] == sizes[: len(multipliers)][::-1]


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_count_per_level_and_direction(blocks):
    seen = trace_sizes(UNet((1, 8, 8), 8, (1, 1), blocks), torch.randn(1, 1, 8, 8))
    assert len(seen) == 2 * 2 * blocks + 2


@pytest.mark.parametrize(("attention", "count"), [((), 0), ((14,), 2), ((7,), 4), ((28, 14, 7), 8)])
def test_attention_sits_at_the_chosen_heights(attention, count):
    net = UNet((1, 28, 28), 8, (1, 2, 2), blocks=1, attention=attention)
    found = [m for m in net.modules() if isinstance(m, _Attention)]
    assert len(found) == count
    if attention:
        heights = set()
        for module in found:
            module.register_forward_hook(lambda m, inputs, output: heights.add(output.shape[-2]))
        net(torch.rand(1), torch.randn(1, 1, 28, 28))
        assert heights == set(attention)


def test_attention_is_the_fused_one_written_out():
    torch.manual_seed(0)
    attention = _Attention(8, heads=2, groups=4)
    x = torch.randn(3, 8, 4, 5)
    qkv = attention.qkv(attention.norm(x)).reshape(3, 3, 2, 4, 20).transpose(-1, -2)
    mixed = F.scaled_dot_product_attention(*qkv.unbind(1)).transpose(-1, -2).reshape(3, 8, 4, 5)
    torch.testing.assert_close(attention(x), x + attention.out(mixed))


def test_attention_reaches_everywhere_convolution_does_not():
    """A change in one corner of 24×24 pixels is seen in the other corner only through attention."""
    changes = []
    for attention in ((), (24,)):
        torch.manual_seed(0)
        net = UNet((1, 24, 24), 8, (1,), blocks=1, attention=attention)
        torch.nn.init.normal_(net.last.weight)
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):  # the norms' statistics are global
                module.forward = lambda h: h
        x = torch.randn(1, 1, 24, 24)
        other = x.clone()
        other[..., 0, 0] += 5
        t = torch.tensor([0.5])
        changes.append((net(t, x) - net(t, other))[..., -1, -1].abs().max().item())
    assert changes[0] == 0
    assert changes[1] > 0


def test_condition_scales_and_shifts_around_the_plain_block():
    torch.manual_seed(0)
    block = _Residual(4, 8, features=2, groups=2, dropout=0.0)
    x, e = torch.randn(3, 4, 5, 5), torch.randn(3, 2)
    torch.nn.init.zeros_(block.condition.weight)
    with torch.no_grad():
        block.condition.bias.copy_(torch.cat((torch.full((8,), 0.5), torch.full((8,), -1.0))))
    normed = F.group_norm(block.conv1(F.silu(block.norm1(x))), 2)
    expected = block.skip(x) + block.conv2(F.silu(1.5 * normed - 1.0))
    torch.testing.assert_close(block(x, e), expected)


def test_upsampling_repeats_pixels():
    layer = _Upsample(3, 3)
    layer.conv = torch.nn.Identity()
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x), F.interpolate(x, scale_factor=2, mode="nearest"))


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 8, (1, 2), 1, dropout=0.5)
    torch.nn.init.normal_(net.last.weight)
    t, x = torch.rand(2), torch.randn(2, 1, 8, 8)
    assert not torch.equal(net(t, x), net(t, x))
    net.eval()
    assert torch.equal(net(t, x), net(t, x))


def test_autocast_runs_through():
    net = UNet((1, 8, 8), 8, (1, 2), 1, attention=(4,))
    torch.nn.init.normal_(net.last.weight)
    t, x = torch.rand(2), torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = net(t, x)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), net(t, x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"multipliers": (1, 2, 2, 2)},
            "4 multipliers halves each side 3 times, 28 x 28 can be halved 2 times: give at most 3 multipliers, or "
            "pad the images to 32 x 32",
        ),
        ({"shape": (1, 28, 30), "multipliers": (1, 1, 1)}, "28 x 30 can be halved 1 times.*pad the images to 28 x 32"),
        ({"shape": (1, 7, 7)}, "7 x 7 can be halved 0 times: give at most 1 multipliers, or pad the images to 8 x 8"),
        ({"shape": (28, 28)}, r"\(channels, height, width\), got \(28, 28\)"),
        ({"multipliers": ()}, "at least one multiplier"),
        ({"blocks": 0}, "blocks >= 1 per level, got 0"),
        ({"channels": 12}, "channels that are a multiple of groups, got channels=12, groups=8"),
        ({"groups": 0}, "got channels=16, groups=0"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got 1.0"),
        ({"attention": (16,)}, r"levels of height \[28, 14, 7\], no attention at 16"),
        ({"attention": (14,), "heads": 3}, "heads that divide the 32 channels at height 14, got 3"),
        ({"classes": 0}, "UNet needs classes >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**({"shape": (1, 28, 28), "channels": 16} | arguments))

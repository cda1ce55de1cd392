"""Every net that the contract covers, small."""

import pytest
import torch

from ndeflow.nets import MLP, UNet

BUILDERS = {
    "mlp on images": ((1, 8, 8), lambda classes: MLP((1, 8, 8), width=16, depth=2, classes=classes)),
    "mlp on points": ((2,), lambda classes: MLP((2,), width=16, depth=1, classes=classes)),
    "unet": ((1, 8, 8), lambda classes: UNet((1, 8, 8), 8, multipliers=(1, 2), blocks=1, classes=classes)),
    "unet with attention": (
        (3, 12, 8),
        lambda classes: UNet((3, 12, 8), 8, (2, 1, 3), 2, attention=(12, 3), heads=2, groups=4, classes=classes),
    ),
}


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys())
def case(request):
    """The shape of a sample, and a builder of the net by its number of classes."""
    return request.param


def batch(shape, n=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, generator=generator, dtype=dtype), torch.randn(n, *shape, generator=generator, dtype=dtype)


@pytest.fixture
def make_batch():
    return batch


@pytest.fixture
def trained():
    """A net after one step of gradient descent, so that its output is no longer zero."""

    def build(builder, shape, classes=None):
        torch.manual_seed(0)
        net = builder(classes)
        t, x = batch(shape)
        cond = None if classes is None else torch.arange(4) % classes
        (net(t, x, cond) - torch.randn(x.shape)).square().mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
        net.zero_grad()
        return net

    return build

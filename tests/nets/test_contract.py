"""What every net promises: net(t, x, cond) of the shape of x, zero at first, sample by sample."""

import inspect

import pytest
import torch

import ndeflow.nets as nets


def test_output_is_zero_at_first(case, make_batch):
    shape, builder = case
    t, x = make_batch(shape)
    assert torch.equal(builder(None)(t, x), torch.zeros_like(x))
    assert torch.equal(builder(3)(t, x, torch.tensor([0, 1, 2, 0])), torch.zeros_like(x))


@pytest.mark.parametrize("classes", [None, 3])
def test_gradients_reach_all_parameters_after_one_step(case, trained, make_batch, classes):
    shape, builder = case
    net = trained(builder, shape, classes)
    t, x = make_batch(shape)
    net(t, x, None if classes is None else torch.tensor([0, 1, 2, 0])).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_net_tells_shape_and_classes(case):
    shape, builder = case
    assert (builder(None).shape, builder(None).classes) == (shape, None)
    assert builder(3).classes == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(case, trained, make_batch, dtype):
    shape, builder = case
    t, x = make_batch(shape, dtype=dtype)
    y = trained(builder, shape).to(dtype)(t, x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y.isfinite().all()


def test_net_moves_to_another_device_whole(case):
    """Buffers follow the parameters; the meta device computes shapes without memory."""
    shape, builder = case
    net = builder(2).to("meta")
    y = net(torch.rand(3, device="meta"), torch.randn(3, *shape, device="meta"), torch.ones(3, device="meta").long())
    assert y.device.type == "meta"
    assert y.shape == (3, *shape)


def test_a_sample_does_not_depend_on_its_neighbors(case, trained, make_batch):
    shape, builder = case
    net = trained(builder, shape)
    t, x = make_batch(shape)
    together = net(t, x)
    for i in range(4):
        torch.testing.assert_close(net(t[i : i + 1], x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
    flipped = net(t.flip(0), x.flip(0)).flip(0)
    torch.testing.assert_close(flipped, together, rtol=1e-4, atol=1e-5)


def test_output_depends_on_time_state_and_label(case, trained, make_batch):
    shape, builder = case
    net = trained(builder, shape, classes=3)
    t, x = make_batch(shape)
    cond = torch.tensor([0, 1, 2, 0])
    y = net(t, x, cond)
    for other in (net(1 - t, x, cond), net(t, x + 1, cond), net(t, x, (cond + 1) % 3)):
        assert ((y - other).abs().flatten(1).amax(1) > 1e-5).all()


def test_seed_decides_the_weights(case):
    _, builder = case
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in builder(2).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_state_is_parameters_alone(case, trained, make_batch):
    """What follows from the constructor is not stored: a checkpoint of another version of it stays loadable."""
    shape, builder = case
    net = trained(builder, shape)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    other = builder(None)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(*make_batch(shape)), net(*make_batch(shape)))


def test_labels_and_nets_that_do_not_belong_together_are_refused_by_name(case, make_batch):
    shape, builder = case
    t, x = make_batch(shape)
    name = type(builder(None)).__name__
    with pytest.raises(ValueError, match=rf"{name} is unconditional but got cond: build it with classes=K"):
        builder(None)(t, x, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{name}\(classes=3\) needs cond: int64 labels of shape \(4,\)"):
        builder(3)(t, x)
    with pytest.raises(TypeError, match=rf"{name} takes int64 labels, got cond of torch.float32"):
        builder(3)(t, x, torch.zeros(4))
    with pytest.raises(ValueError, match=rf"{name} takes one label per sample, cond \(4,\), got \(4, 1\)"):
        builder(3)(t, x, torch.zeros(4, 1, dtype=torch.int64))


def test_states_and_times_of_another_shape_are_refused_by_name(case, make_batch):
    shape, builder = case
    t, x = make_batch(shape)
    net = builder(None)
    name = type(net).__name__
    with pytest.raises(ValueError, match=rf"{name} was built for samples of shape .*, got x \(4, 5\)"):
        net(t, torch.zeros(4, 5))
    for wrong in (t[:2], t[:, None], t[0]):
        with pytest.raises(ValueError, match=rf"{name} takes one time per sample, t \(4,\)"):
            net(wrong, x)


def test_forward_mode_and_second_derivatives_exist(case, trained, make_batch):
    """Mean flows and Jacobian regularizers need them; fused kernels would lack them."""
    shape, builder = case
    net = trained(builder, shape).double()
    t, x = make_batch(shape, n=2, dtype=torch.float64)
    direction = torch.ones_like(x)
    _, forward = torch.func.jvp(lambda x: net(t, x), (x,), (direction,))
    eps = 1e-6
    torch.testing.assert_close(forward, (net(t, x + eps) - net(t, x - eps)) / (2 * eps), rtol=1e-5, atol=1e-7)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(t, x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_every_net_takes_time_state_and_condition():
    built = [c for c in vars(nets).values() if inspect.isclass(c) and "cond" in inspect.signature(c.forward).parameters]
    for net in built:
        parameters = inspect.signature(net.forward).parameters
        assert list(parameters) == ["self", "t", "x", "cond"]
    assert {net.__name__ for net in built} >= {"MLP", "UNet"}

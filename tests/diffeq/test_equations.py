import pytest
import torch
from torch import nn

from ndeflow.diffeq import ODE, Constant, Equation, Heun, Integrator


class Recorder(nn.Module):
    """A field that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def forward(self, t, y, *args):
        self.calls.append((t, y, args))
        return -self.rate.to(y.dtype) * y


@pytest.mark.parametrize(
    ("state", "time"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_the_field_gets_time_in_the_real_dtype_of_the_state(state, time):
    field = Recorder()
    Integrator(Heun(), Constant(0.5))(ODE(field), torch.ones(2, 1, dtype=state), [0, 1])
    assert {t.dtype for t, _, _ in field.calls} == {time}
    ODE(field).field(torch.tensor(0.25, dtype=torch.float64), torch.ones(2, 1, dtype=state))
    assert field.calls[-1][0].dtype == time


def test_args_reach_the_field_only_if_given():
    field, y = Recorder(), torch.ones(2, 1)
    ODE(field).field(torch.tensor(0.0), y)
    args = torch.arange(2)
    ODE(field, args).field(torch.tensor(0.0), y)
    assert field.calls[0][2] == ()
    assert field.calls[1][2] == (args,)


def test_an_ode_is_a_module_with_the_parameters_of_its_field():
    field = Recorder()
    eq = ODE(field)
    assert list(eq.parameters()) == [field.rate]
    assert list(eq.state_dict()) == ["f.rate"]


def test_args_may_be_a_parameter():
    args = nn.Parameter(torch.ones(2, 1))
    eq = ODE(lambda t, y, a: a * y, args)
    assert eq.args is args
    torch.testing.assert_close(eq.field(torch.tensor(0.0), 3 * torch.ones(2, 1)), 3 * torch.ones(2, 1))


def test_increments_keep_float64_and_are_signed():
    t0, t1 = torch.tensor([1e9, 2.0], dtype=torch.float64), torch.tensor([1e9 + 1e-3, 1.5], dtype=torch.float64)
    du = ODE(Recorder()).increment(t0, t1)
    assert du.dtype == torch.float64
    torch.testing.assert_close(du, torch.tensor([1e-3, -0.5], dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_product_spreads_an_increment_over_samples_not_over_the_last_axis():
    eq, f = ODE(Recorder()), torch.arange(8.0).reshape(2, 2, 2)
    du = torch.tensor([2.0, 3.0], dtype=torch.float64)
    product = eq.apply_field(f, du)
    assert product.dtype == f.dtype
    torch.testing.assert_close(product, torch.stack((f[0] * 2, f[1] * 3)))
    torch.testing.assert_close(eq.apply_field(f, du[0]), 2 * f)


def test_taking_rows_takes_the_rows_of_args():
    rate = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    eq = ODE(lambda t, y, a: a * y, rate)
    some = eq.take(torch.tensor([2, 0]))
    torch.testing.assert_close(some.field(torch.tensor(0.0), torch.ones(2, 1)), torch.tensor([[4.0], [1.0]]))
    some.field(torch.tensor(0.0), torch.ones(2, 1)).sum().backward()
    assert rate.grad.squeeze().tolist() == [1.0, 0.0, 1.0]
    plain = ODE(Recorder())
    assert plain.take(torch.tensor([0])) is plain


def test_a_field_under_autocast_keeps_the_state_in_float32():
    net = nn.Linear(2, 2)

    def field(t, y):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(y)
        assert out.dtype == torch.bfloat16
        return out

    ys = Integrator(Heun(), Constant(0.1))(ODE(field), torch.ones(3, 2), [0, 1]).ys
    exact = Integrator(Heun(), Constant(0.1))(ODE(lambda t, y: net(y)), torch.ones(3, 2), [0, 1]).ys
    assert ys.dtype == torch.float32
    torch.testing.assert_close(ys, exact, rtol=2e-2, atol=2e-2)
    assert not torch.equal(ys, exact)


def test_a_real_field_may_drive_a_complex_state():
    eq = ODE(lambda t, y: y.real)
    assert eq.field(torch.tensor(0.0), torch.ones(1, 1, dtype=torch.complex64)).dtype == torch.complex64


@pytest.mark.parametrize(
    ("field", "error", "words"),
    [
        (lambda t, y: y[:, :1], ValueError, r"shape \(3, 1\) for a state of shape \(3, 2\)"),
        (lambda t, y: y[:, None] - y, ValueError, r"shape \(3, 3, 2\) for a state of shape \(3, 2\)"),
        (lambda t, y: y.double(), TypeError, "float64 for a state of torch.float32"),
        (lambda t, y: 1j * y, TypeError, "complex64 for a state of torch.float32"),
        (lambda t, y: None, TypeError, "must return a tensor of shape .3, 2., got NoneType"),
    ],
)
def test_a_field_of_the_wrong_form_is_refused(field, error, words):
    with pytest.raises(error, match=words):
        ODE(field).field(torch.tensor(0.0), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("f", "args", "words"),
    [
        (3.0, None, "module or a function"),
        (abs, 3.0, "one row per sample, got float"),
        (abs, torch.tensor(3.0), r"one row per sample, got \(\)"),
    ],
)
def test_bad_parts_are_refused(f, args, words):
    with pytest.raises(TypeError, match=words):
        ODE(f, args)


def test_equation_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Equation()

import pytest
import torch
from torch import nn

from ndeflow.flows import Affine, FlowModel, Linear
from ndeflow.flows.samplers import Sample, Sampler, draw, named
from ndeflow.nets import MLP, UNet
from ndeflow.randomness import fold

NETS = {
    "mlp": lambda: MLP((3, 8, 8), width=48, depth=2, classes=5),
    "unet": lambda: UNet((3, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), classes=5, dropout=0.5),
}
SHAPE = (3, 8, 8)
SAMPLER = named("Midpoint", 2)
INDEX = torch.arange(45)
KEYS, COND = fold(0, "sample", INDEX), INDEX % 5


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def model(request):
    """A net with random weights everywhere: what it draws is no image, but depends on every input."""
    torch.manual_seed(0)
    net = request.param()
    for parameter in net.last.parameters():
        nn.init.normal_(parameter, std=0.1)
    return FlowModel(net, Affine(Linear())).eval()


def test_a_sample_is_the_same_bit_for_bit_alone_and_in_company(model):
    whole = draw(SAMPLER, model, KEYS, SHAPE, COND, micro_batch=16).x
    alone = torch.cat([draw(SAMPLER, model, KEYS[i : i + 1], SHAPE, COND[i : i + 1], 16).x for i in (0, 15, 16, 44)])
    assert torch.equal(alone, whole[[0, 15, 16, 44]])
    by_seven = [draw(SAMPLER, model, k, SHAPE, c, 16).x for k, c in zip(KEYS.split(7), COND.split(7), strict=True)]
    assert torch.equal(torch.cat(by_seven), whole)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(SAMPLER, model, KEYS[order], SHAPE, COND[order], 16).x, whole[order])
    assert len(whole.flatten(1).unique(dim=0)) == 45


def test_micro_batch_changes_rounding_only(model):
    small = draw(SAMPLER, model, KEYS, SHAPE, COND, micro_batch=16).x
    torch.testing.assert_close(draw(SAMPLER, model, KEYS, SHAPE, COND, micro_batch=64).x, small, rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_key_and_condition(model):
    first = draw(SAMPLER, model, KEYS[:3], SHAPE, COND[:3], 4).x
    other_seed = draw(SAMPLER, model, fold(1, "sample", INDEX[:3]), SHAPE, COND[:3], 4).x
    other_label = draw(SAMPLER, model, KEYS[:3], SHAPE, COND[:3] + 1, 4).x
    for other in (other_seed, other_label):
        assert ((first - other).abs().flatten(1).amax(1) > 1e-3).all()


def test_the_net_sees_micro_batches_of_one_size(model):
    sizes = []
    model.net.register_forward_hook(lambda net, inputs, output: sizes.append(len(output)))
    sample = draw(SAMPLER, model, KEYS, SHAPE, COND, micro_batch=32)
    assert sizes == [32] * 2 * 4  # two micro-batches, two steps of two calls
    assert sample.nfe.tolist() == [4] * 45
    assert sample.nodes is None


def test_draws_start_from_the_prior_of_the_path():
    class Still(Sampler):
        def __call__(self, model, x, cond=None, noise=None):
            return Sample(x, torch.zeros(len(x), dtype=torch.int64), None)

    model = FlowModel(nn.Identity(), Affine(Linear())).eval()
    sample = draw(Still(), model, KEYS, (2,), micro_batch=10)
    assert torch.equal(sample.x, model.path.prior(KEYS, (2,)))
    assert sample.x.shape == (45, 2)


def test_draws_are_exact_samples_of_a_gaussian(gaussian_model):
    model = gaussian_model(mean=1.5, std=0.5).eval()
    sample = draw(named("Heun", 50), model, fold(3, torch.arange(4000)), (1,), micro_batch=1000)
    assert sample.x.mean().item() == pytest.approx(1.5, abs=4 * 0.5 / 4000**0.5)
    assert sample.x.std().item() == pytest.approx(0.5, abs=3 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_have_the_dtype_of_the_parameters(dtype):
    model = FlowModel(MLP((2,), 8, 1).to(dtype), Affine(Linear())).eval()
    sample = draw(named("Euler", 2), model, KEYS[:3], (2,), micro_batch=4)
    assert sample.x.dtype == dtype
    assert not sample.x.requires_grad


def test_shape_may_be_a_list():
    model = FlowModel(MLP((2,), 8, 1), Affine(Linear())).eval()
    assert draw(named("Euler", 1), model, KEYS[:3], [2]).x.shape == (3, 2)


def test_training_mode_is_refused(model):
    with pytest.raises(ValueError, match=r"evaluation mode.*model.eval\(\)"):
        draw(SAMPLER, model.train(), KEYS, SHAPE, COND)


@pytest.mark.parametrize(
    ("keys", "cond", "micro_batch", "message"),
    [
        (KEYS[:0], None, 64, r"n >= 1, got shape \(0,\)"),
        (KEYS[:4].reshape(2, 2), None, 64, r"one key per sample.*got shape \(2, 2\)"),
        (KEYS[:4], COND[:3], 64, r"one condition per key, got cond \(3,\) for 4 keys"),
        (KEYS[:4], COND[:4], 0, "micro_batch >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(model, keys, cond, micro_batch, message):
    with pytest.raises(ValueError, match=message):
        draw(SAMPLER, model, keys, SHAPE, cond, micro_batch)

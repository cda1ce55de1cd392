import pytest
import torch

from ndeflow.data import Digits, EightGaussians, TwoMoons
from ndeflow.diffeq import Euler, Heun
from ndeflow.flows import Affine, FlowModel, Independent, Linear, Provenance
from ndeflow.flows.samplers import Integrate, UniformGrid
from ndeflow.modules.evaluation import evaluate_samples, table
from ndeflow.modules.flow import RectifiedFlow
from ndeflow.nets import MLP
from ndeflow.randomness import fold


def flow(shape=(2,), sampler=None, **net):
    torch.manual_seed(0)
    model = FlowModel(MLP(shape, 16, 1, **net), Affine(Linear()))
    return RectifiedFlow(model, sampler or Integrate(Heun(), UniformGrid(4)), pictures=9).eval()


def batch(n=8, shape=(2,)):
    key = fold(0, torch.arange(n))
    return {"x1": torch.randn(n, *shape), "key": key, "slot": torch.arange(n), "slots": torch.full((n,), n)}


def test_the_loss_of_the_zero_net_is_the_mean_square_of_the_velocity():
    module, data = flow(), batch(4096)
    data["x1"] = torch.full((4096, 2), 3.0)
    loss = module.loss(data)["velocity"]
    assert loss.item() == pytest.approx(9.0 + 1.0, rel=0.05)  # E|x1 - x0|² per dimension = 3² + 1


def test_draws_are_functions_of_the_keys():
    module, data = flow(), batch()
    with torch.no_grad():
        module.model.net.last.bias.fill_(0.3)
    first = module.loss(data)["velocity"]
    torch.randn(10)
    assert torch.equal(module.loss(data)["velocity"], first)
    assert not torch.equal(module.loss({**data, "key": data["key"] + 1})["velocity"], first)


def test_a_small_run_reduces_the_loss_towards_its_floor():
    module = flow()
    data = EightGaussians(256, n=5000)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    while len(losses) < 200:
        for b in data.train_dataloader():
            loss = module.loss(b)["velocity"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        data.position += len(data.train_dataloader())
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


def test_conditional_samples_follow_their_labels():
    module = flow((1, 8, 8), classes=10)
    module.data_info = Digits(256).info
    with torch.no_grad():
        module.model.net.embedding.label.weight.mul_(5)
        torch.nn.init.normal_(module.model.net.last.weight)
    keys = torch.arange(4)
    a, b = (module.sample(keys, torch.full((4,), label)).x for label in (1, 7))
    assert not torch.allclose(a, b)
    assert module.labels(12).tolist() == [*range(10), 0, 1]
    assert flow().labels(3) is None


def test_previews_show_the_same_noise_and_can_be_left_out():
    module = flow((1, 8, 8))
    module.data_info = Digits(256).info
    assert (module.preview()["samples"] == module.preview()["samples"]).all()
    module.pictures = 0
    assert module.preview() == {}
    with pytest.raises(ValueError, match="pictures=-1"):
        RectifiedFlow(module.model, module.sampler, pictures=-1)


def test_coupling_and_provenance_must_agree():
    model = FlowModel(MLP((2,), 4, 1), Affine(Linear()), provenance=Provenance(independent=False))
    with pytest.raises(ValueError, match=r"coupling Independent has independent=True, model\.provenance False"):
        RectifiedFlow(model, Integrate(Euler(), UniformGrid(1)), Independent())


def test_evaluation_of_a_model_that_returns_noise_is_far_above_the_floor():
    module, data = flow(), TwoMoons(64, n=2000)
    module.data_info = data.info
    result = evaluate_samples(module, data, n=100, steps=(2, 1), sampler="Euler", seeds=(0, 1))
    assert result["w2_ratio"] > 1.5
    assert list(result["by_steps"]) == ["1", "2"]
    assert result["steps"] == 2
    assert sum(result["class_shares"]) == pytest.approx(1)
    assert "floor" in table(result)


def test_evaluation_needs_steps_and_seeds():
    with pytest.raises(ValueError, match="at least one"):
        evaluate_samples(flow(), TwoMoons(64), None, (), "Euler", (0,))

import pytest
import pytorch_lightning as pl
import torch

from ndeflow.training.health import Health, NonFinite


class Poison(pl.Callback):
    """Make the loss NaN at chosen steps by a NaN in the batch's keys' place: the data."""

    def __init__(self, *steps):
        self.steps = steps
        self.weights = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx + 1 in self.steps:
            batch["x1"].fill_(torch.nan)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights[trainer.global_step] = pl_module.net[0].weight.detach().clone()


def test_stop_leaves_the_weights_of_the_step_before_and_names_step_term_and_parameter(fit, toy, numbers):
    poison = Poison(4)
    with pytest.raises(NonFinite, match=r"step 4: loss term fit = nan; first parameter .*: net\.0\.weight\. .*step 3"):
        fit(toy, numbers, [poison, Health()])
    assert torch.equal(toy.net[0].weight, poison.weights[3])


def test_skip_changes_neither_weights_nor_optimizer_state(fit, toy, numbers):
    poison, health = Poison(4), Health("skip")
    with pytest.warns(UserWarning, match="skipped: step 4"):
        trainer = fit(toy, numbers, [poison, health], steps=6)
    assert torch.equal(poison.weights[4], poison.weights[3])
    assert not torch.equal(poison.weights[5], poison.weights[4])
    state = next(iter(trainer.optimizers[0].state.values()))
    assert int(state["step"]) == 5
    assert all(torch.isfinite(v).all() for v in state.values())
    assert (health.skipped, health.in_a_row) == (1, 0)


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_in_a_row_stop(fit, toy, numbers):
    with pytest.raises(NonFinite, match="3 steps in a row had non-finite gradients"):
        fit(toy, numbers, [Poison(2, 3, 4), Health("skip", limit=2)])


def test_an_infinite_gradient_of_a_finite_loss_is_found(fit, toy, numbers):
    class Inf(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.net[3].bias.grad[0] = torch.inf

    with pytest.raises(NonFinite, match=r"the loss is finite on this process.*net\.3\.bias"):
        fit(toy, numbers, [Inf(), Health()])


def test_the_norm_is_that_of_all_gradients_before_clipping(fit, toy, numbers):
    class Norm(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            self.norm = torch.sqrt(sum(p.grad.square().sum() for p in pl_module.parameters()))

    norm, health = Norm(), Health()
    fit(toy, numbers, [norm, health], steps=1, gradient_clip_val=1e-3)
    torch.testing.assert_close(health.gradient_norm, norm.norm)


def test_counts_survive_a_checkpoint(toy):
    health, again, checkpoint = Health("skip"), Health("skip"), {}
    health.skipped, health.in_a_row = 5, 2
    health.on_save_checkpoint(None, toy, checkpoint)
    again.on_load_checkpoint(None, toy, checkpoint)
    assert (again.skipped, again.in_a_row) == (5, 2)


def test_limit_is_checked():
    with pytest.raises(ValueError, match="limit=0"):
        Health("skip", 0)

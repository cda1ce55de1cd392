import pytest
import pytorch_lightning as pl
import torch

from ndeflow.training.ema import EMA


class Watch(pl.Callback):
    """Keep the weights after every optimizer step, around validation, and in it."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(pl_module.net[0].weight.detach().clone())

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append(pl_module.net[0].weight.detach().clone())


@pytest.mark.parametrize("warmup", ["inverse", "none"])
def test_the_average_follows_the_definition(fit, toy, numbers, warmup):
    start = toy.net[0].weight.detach().clone()
    watch, ema = Watch(), EMA(0.9, warmup)
    fit(toy, numbers, [watch, ema])
    expected = start.double()
    for n, w in enumerate(watch.steps, 1):
        keep = min(0.9, (1 + n) / (10 + n)) if warmup == "inverse" else 0.9
        expected = keep * expected + (1 - keep) * w.double()
    torch.testing.assert_close(ema.weights["net.0.weight"].double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == 20


def test_validation_sees_the_average_and_training_goes_on_from_the_raw_weights(fit, toy, numbers):
    watch, ema = Watch(), EMA(0.9)
    fit(toy, numbers, [watch, ema], steps=5)
    assert torch.equal(watch.validated[0], ema.weights["net.0.weight"])
    assert torch.equal(toy.net[0].weight, watch.steps[-1])
    assert not torch.equal(watch.validated[0], watch.steps[-1])


def test_one_update_per_optimizer_step_under_accumulation(fit, toy, numbers):
    ema = EMA(0.9)
    fit(toy, numbers, [ema], steps=6, accumulate_grad_batches=2)
    assert ema.updates == 6


def test_a_failing_validation_leaves_the_raw_weights(fit, toy, numbers):
    watch, ema = Watch(), EMA(0.9)

    class Fail(pl.Callback):
        def on_validation_batch_start(self, *args):
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fit(toy, numbers, [watch, ema, Fail()])
    assert torch.equal(toy.net[0].weight, watch.steps[-1])


def test_no_checkpoint_while_swapped(fit, toy, numbers):
    ema = EMA(0.9)
    trainer = fit(toy, numbers, [ema], steps=1)
    with ema.applied(toy), pytest.raises(RuntimeError, match="averaged weights are in the module"):
        ema.on_save_checkpoint(trainer, toy, {})


def test_resuming_with_and_without(fit, toy, numbers):
    ema = EMA(0.9)
    trainer = fit(toy, numbers, [ema], steps=3)
    checkpoint = {}
    ema.on_save_checkpoint(trainer, toy, checkpoint)
    again = EMA(0.9)
    again.on_load_checkpoint(trainer, toy, checkpoint)
    assert again.updates == 3
    assert all(torch.equal(again.weights[k], v) for k, v in ema.weights.items())
    with pytest.raises(ValueError, match=r"has EMA \(decay 0.9, step 3\) but ema is not configured; set ema"):
        EMA().on_load_checkpoint(trainer, toy, checkpoint)
    EMA(drop=True).on_load_checkpoint(trainer, toy, checkpoint)


def test_low_precision_weights_have_a_float32_average():
    module = torch.nn.Linear(2, 2).bfloat16()
    ema = EMA(0.999, "none")
    ema.weights = {n: p.detach().float() for n, p in module.named_parameters()}
    with torch.no_grad():
        module.weight.fill_(2.0)
    before = ema.weights["weight"].clone()
    for _ in range(1000):
        ema.update(list(module.parameters()))
    moved = (ema.weights["weight"] - before) / (2.0 - before)
    torch.testing.assert_close(moved, torch.full((2, 2), 1 - 0.999**1000), rtol=1e-3, atol=0)


def test_frozen_parameters_are_left_out(fit, toy, numbers):
    toy.net[0].requires_grad_(False)
    ema = EMA(0.9)
    fit(toy, numbers, [ema], steps=2)
    assert set(ema.weights) == {"net.3.weight", "net.3.bias"}


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="must lie in"):
        EMA(decay)


def test_drop_and_decay_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        EMA(0.9, drop=True)

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ndeflow.diffeq import SolverError
from ndeflow.modules.base import Module, Optim, clean_name


class Two(Module):
    """A module with two terms."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.optim = Optim(partial(torch.optim.SGD, lr=0.1))

    def loss(self, batch):
        return {"first": self.a(batch["x1"]).square().mean(), "second": self.b(batch["x1"]).abs().mean()}


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"x1": torch.randn(n, 2, generator=generator), "key": torch.arange(n)} for n in sizes]


def trainer(**settings):
    return pl.Trainer(
        max_steps=1,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*no `val_dataloader`", "ignore:.*smaller than the logging interval"
)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("net._orig_mod.w", "net.w"),
        ("_orig_mod.net.w", "net.w"),
        ("a._orig_mod.b._orig_mod.w", "a.b.w"),
        ("net_orig_mod.w", "net_orig_mod.w"),
        ("module.w", "module.w"),
    ],
)
def test_names_without_wrappers(name, clean):
    assert clean_name(name) == clean


def test_the_loss_is_the_sum_and_terms_are_remembered_over_micro_batches():
    module, data = Two(), batches(4, 4)
    before = [module.loss(b) for b in data]
    run = trainer(accumulate_grad_batches=2)
    run.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    for name in ("first", "second"):
        torch.testing.assert_close(module.terms[name], (before[0][name] + before[1][name]).detach() / 2)


def test_validation_means_weigh_batches_by_their_size():
    module, data = Two(), batches(5, 1)
    trainer().validate(module, torch.utils.data.DataLoader(data, batch_size=None), verbose=False)
    with torch.no_grad():
        whole = module.loss({"x1": torch.cat([b["x1"] for b in data])})
    means = module.validation_means()
    assert means["first"] == pytest.approx(float(whole["first"]), rel=1e-6)
    assert means["loss"] == pytest.approx(float(sum(whole.values())), rel=1e-6)


class FailsAtZero(Two):
    """A module whose solve fails for a sample of key 0."""

    def loss(self, batch):
        if batch["key"][0] == 0:
            raise SolverError("euler failed at t=0.5")
        return super().loss(batch)


def test_failed_solves_are_left_out_of_validation_means_loudly_or_end_it():
    module, data = FailsAtZero(), batches(5, 2, 3)
    data[0]["key"] += 1
    data[2]["key"] += 1
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    with pytest.raises(SolverError):
        trainer().validate(module, loader, verbose=False)
    module.skip_failed_solves = True
    with pytest.warns(UserWarning, match=r"validation batch 1 is left out of the means, failed solve: euler failed"):
        trainer().validate(module, loader, verbose=False)
    means = module.validation_means()
    with torch.no_grad():
        rest = module.loss({"x1": torch.cat([data[0]["x1"], data[2]["x1"]]), "key": torch.ones(1)})
    assert means == pytest.approx(
        {"failed_solves": 1, **{k: float(v) for k, v in rest.items()}, "loss": sum(rest.values()).item()}
    )
    with pytest.warns(UserWarning, match="validation batch 0"):
        trainer().validate(module, torch.utils.data.DataLoader(data[1:2], batch_size=None), verbose=False)
    assert module.validation_means() == {"failed_solves": 1}


@pytest.mark.parametrize(
    ("x1", "text"),
    [
        (torch.zeros(2, 2, dtype=torch.uint8), r'batch\["x1"\] is uint8: scale to'),
        (torch.zeros(2, 2, dtype=torch.float64), r'batch\["x1"\] is torch.float64, the module is torch.float32: cast'),
    ],
)
def test_data_of_another_dtype_is_refused(x1, text):
    data = [{"x1": x1, "key": torch.arange(2)}]
    with pytest.raises(TypeError, match=text):
        trainer().fit(Two(), torch.utils.data.DataLoader(data, batch_size=None))


def test_parameter_groups_by_the_first_matching_pattern():
    module = Two()
    module.learning_rates = {"a.weight": 0.5, "a.*": 0.1}
    optimizer = module.configure_optimizers()
    assert {g["name"]: (g["lr"], len(g["params"])) for g in optimizer.param_groups} == {
        "a.weight": (pytest.approx(0.05), 1),
        "a.*": (pytest.approx(0.01), 1),
        "*": (0.1, 2),
    }


def test_patterns_that_match_nothing_and_nothing_to_train():
    module = Two()
    module.learning_rates = {"c.*": 0.1}
    with pytest.raises(ValueError, match=r"'c\.\*' matches no trained parameter"):
        module.parameter_groups()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trained"):
        module.parameter_groups()


def test_without_an_optimizer_it_says_what_to_write():
    module = Two()
    module.optim = None
    with pytest.raises(ValueError, match=r"module\.optim = Optim\(partial"):
        module.configure_optimizers()


def test_schedules_step_once_per_optimizer_step():
    module = Two()
    module.optim = Optim(
        partial(torch.optim.SGD, lr=0.1), partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    built = module.configure_optimizers()
    assert built["lr_scheduler"]["interval"] == "step"


def test_a_failed_solve_becomes_a_loss_that_every_process_skips():
    class Failing(Two):
        def loss(self, batch):
            raise SolverError("euler failed at t=0.5")

    module, data = Failing(), batches(4)
    with pytest.raises(SolverError):
        trainer().fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    module = Failing()
    module.skip_failed_solves = True
    with pytest.warns(UserWarning, match="failed solve: euler failed"):
        trainer().fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    assert module.terms["failed_solve"].isnan()

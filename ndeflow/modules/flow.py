"""Rectified flow: train a velocity field along straight lines from noise to data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndeflow.data.loading import DataModule
from ndeflow.flows import Coupling, FlowLoss, FlowModel, Independent, TimeSampler, Uniform
from ndeflow.flows.samplers import Sample, Sampler, draw
from ndeflow.modules.base import Module
from ndeflow.modules.evaluation import evaluate_samples
from ndeflow.modules.pictures import picture
from ndeflow.randomness import fold


class RectifiedFlow(Module):
    r"""Regress the velocity of the path between coupled source and data points.

    .. math:: L = \mathbb{E}\, w(t)\, \ell\bigl(u_\theta(t, x_t) - \dot x_t\bigr), \qquad
              x_t = \alpha(t) x_1 + \sigma(t) x_0

    with t drawn by `times`, (x0, x1) by `coupling`; for the linear path :math:`\dot x_t = x_1 - x_0`.
    Every draw is a function of the key of its sample.

    Args:
        model: the net with its path and its parametrization.
        sampler: solves from source to data for pictures, reports and `ndeflow sample`.
        coupling: which source point goes with which data point.
        times: the law of t.
        loss: what is compared, and how.
        pictures: how many samples the pictures during training show; 0 for none.

    Reference:
        Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified
        Flow", 2022, equation 1.
    """

    def __init__(
        self,
        model: FlowModel,
        sampler: Sampler,
        coupling: Coupling | None = None,
        times: TimeSampler | None = None,
        loss: FlowLoss | None = None,
        pictures: int = 64,
    ) -> None:
        super().__init__()
        if pictures < 0:
            raise ValueError(f"pictures={pictures} must not be negative")
        self.model, self.sampler, self.pictures = model, sampler, pictures
        self.coupling = coupling or Independent()
        if self.coupling.independent != model.provenance.independent:
            raise ValueError(
                f"coupling {type(self.coupling).__name__} has independent={self.coupling.independent}, "
                f"model.provenance {model.provenance.independent}: say what the model is trained on, for its score "
                "depends on it"
            )
        self.times = times or Uniform()
        self.flow_loss = loss or FlowLoss()

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the flow-matching loss of a batch as the term `velocity`."""
        keys, path = batch["key"], self.model.path
        pair = self.coupling(batch["x1"], batch.get("cond"), keys)
        t = self.times(keys, batch["slot"], batch["slots"], path.clip)
        sample = path.sample(pair.x0, pair.x1, t, keys)
        return {self.flow_loss.reading: self.flow_loss(self.model, sample, pair.cond).mean()}

    def check_data(self, data: DataModule) -> None:
        """Refuse data whose labels or shape the net does not expect."""
        net, conditional = self.model.net, data.cond is not None
        classes, shape = getattr(net, "classes", None), getattr(net, "shape", None)
        if conditional and classes is None:
            raise ValueError(
                f"data.cond={data.cond} hands labels to an unconditional net: set module.model.net.classes="
                f"{data.classes}, or leave data.cond out"
            )
        if classes is not None and (not conditional or (data.classes or 0) > classes):
            raise ValueError(
                f"module.model.net.classes={classes} expects labels: set data.cond=label (the data has {data.classes} "
                "classes), or leave classes out"
            )
        if shape is not None and tuple(shape) != tuple(data.shape):
            raise ValueError(
                f"module.model.net.shape={list(shape)}, but the data has samples of shape {list(data.shape)}"
            )

    @torch.no_grad()
    def sample(
        self, keys: Tensor, cond: Tensor | None = None, sampler: Sampler | None = None, micro_batch: int = 64
    ) -> Sample:
        """Draw one sample per key, in fixed micro-batches so that a sample does not depend on its neighbors.

        Args:
            keys: int64 (n,), on the device of the module.
            cond: labels (n,) for a class-conditional model.
            sampler: by default the module's own.
            micro_batch: samples solved together; changes rounding, hence part of a sample's address.
        """
        shape = tuple(self.data_info["shape"])
        return draw(sampler or self.sampler, self.model, keys, shape, cond, micro_batch)

    def labels(self, n: int) -> Tensor | None:
        """Return labels that go round the classes, (n,), or None for a net without `classes`."""
        classes = getattr(self.model.net, "classes", None)  # a net of one's own need not have it
        return None if classes is None else torch.arange(n, device=self.device) % classes

    def preview(self) -> dict[str, np.ndarray]:
        """Draw the same noise at every call, so that pictures over training compare like with like."""
        if not self.pictures:
            return {}
        keys = fold("picture", torch.arange(self.pictures, device=self.device))
        drawn = picture(self.sample(keys, self.labels(self.pictures), micro_batch=min(64, self.pictures)).x)
        return {} if drawn is None else {"samples": drawn}

    def draw_report(self, folder: Path) -> list[Path]:
        """Write the sample picture."""
        from PIL import Image

        paths = []
        for name, image in self.preview().items():
            Image.fromarray(image).save(folder / f"{name}.png")
            paths.append(folder / f"{name}.png")
        return paths

    def evaluate(
        self,
        data: DataModule,
        n: int | None = None,
        steps: tuple[int, ...] = (1, 2, 5, 20, 100),
        sampler: str = "Euler",
        seeds: tuple[int, ...] = (0, 1, 2),
    ) -> dict[str, Any]:
        """Compare samples with held-out data; see `ndeflow.modules.evaluation.evaluate_samples`."""
        return evaluate_samples(self, data, n, steps, sampler, seeds)

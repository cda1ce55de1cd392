"""A net, the path it lives on, and what its output means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ndeflow.flows.paths import Path, check_state
from ndeflow.flows.precondition import Identity, Precondition
from ndeflow.flows.prediction import READINGS, NotAScore, Prediction, Provenance, Reading
from ndeflow.tensors import expand_time

_IDENTITY = Identity()
_INDEPENDENT = Provenance()


class FlowModel(nn.Module):
    r"""A net that predicts one reading of a path, and so all of them.

    .. math:: y = \mathrm{precondition}(\mathrm{net}, t, x_t, c), \qquad y ≈ pD + qE

    with D = E[x1 | x_t], E = E[x0 | x_t] and (p, q) of `predicts`; see `ndeflow.flows.prediction`.

    Args:
        net: called as net(time input (B,), x (B, *), cond), returns (B, *).
        path: from source to data.
        precondition: what the net sees of t and x.
        predicts: "data", "noise", "velocity", "v" or "score".
        provenance: what the model was trained on.

    Raises:
        ValueError: `predicts` is no reading.
        NotAScore: it is the score, on a path or with a coupling where a flow model has none.

    >>> from ndeflow.flows import Affine, Linear
    >>> from ndeflow.nets import MLP
    >>> model = FlowModel(MLP((2,), width=16, depth=1), Affine(Linear()))
    >>> model(torch.tensor(0.25), torch.ones(1, 2)).data
    tensor([[1., 1.]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        net: nn.Module,
        path: Path,
        precondition: Precondition = _IDENTITY,
        predicts: Reading = "velocity",
        provenance: Provenance = _INDEPENDENT,
    ) -> None:
        super().__init__()
        if predicts not in READINGS:
            raise ValueError(f"FlowModel predicts one of {', '.join(READINGS)}, got {predicts!r}")
        if predicts == "score" and not (path.gaussian_source and provenance.independent):
            raise NotAScore(
                "the score follows from pairs only if the source is Gaussian and independent of the data: use "
                "predicts='velocity', or the default gaussian_source and provenance"
            )
        self.net, self.path, self.precondition, self.provenance = net, path, precondition, provenance
        self.predicts: Reading = predicts

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Prediction:
        """Evaluate the net once.

        Args:
            t: times in the path's own clock, any real dtype, best float64, () or (B,).
            x: states, float32 or float64, (B, *).
            cond: conditions, (B, …), for conditional nets.

        Returns:
            The prediction, in the dtype of x, also under autocast.

        Raises:
            TypeError: x is of half precision.
            ValueError: shapes do not fit.
        """
        check_state(x, "x")
        t = t.to(torch.float64)
        expand_time(t, x)  # refuses times of any shape but () and (B,)
        value = self.precondition(self.net, self.path, t.expand(len(x)), x, cond)
        if value.shape != x.shape:
            raise ValueError(f"the net returned {tuple(value.shape)} for states of shape {tuple(x.shape)}")
        return Prediction(t, x, value.to(x.dtype), self.predicts, self.path, self.provenance)

"""Flow models: paths between noise and data, what a net predicts on them, how to train it and how to move along it."""

from ndeflow.flows.couplings import Coupling, Independent, Pair
from ndeflow.flows.dynamics import probability_flow
from ndeflow.flows.losses import FlowLoss, Premetric, PseudoHuber, Squared
from ndeflow.flows.model import FlowModel
from ndeflow.flows.paths import Affine, Path, PathSample
from ndeflow.flows.precondition import Identity, Precondition
from ndeflow.flows.prediction import NotAScore, Prediction, Provenance, UndefinedReading
from ndeflow.flows.schedules import Coefficients, Linear, Schedule
from ndeflow.flows.times import CosMap, LogitNormal, Shift, TimeSampler, Uniform, UShape

__all__ = [
    "Affine",
    "Coefficients",
    "CosMap",
    "Coupling",
    "FlowLoss",
    "FlowModel",
    "Identity",
    "Independent",
    "Linear",
    "LogitNormal",
    "NotAScore",
    "Pair",
    "Path",
    "PathSample",
    "Precondition",
    "Prediction",
    "Premetric",
    "Provenance",
    "PseudoHuber",
    "Schedule",
    "Shift",
    "Squared",
    "TimeSampler",
    "UShape",
    "UndefinedReading",
    "Uniform",
    "probability_flow",
]

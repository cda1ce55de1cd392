"""Regularizers of learned dynamics: make what is learned easy to solve."""

from ndeflow.regularization.dynamics import Jacobian, Kinetic, Taylor
from ndeflow.regularization.estimates import ErrorEstimate, Stiffness
from ndeflow.regularization.local import LocalError, LocalStiffness
from ndeflow.regularization.solve import Penalty, regularized_solve
from ndeflow.regularization.steer import Steer
from ndeflow.regularization.terms import DynamicsRegularizer, Regularizer, SolveRegularizer
from ndeflow.regularization.weights import CosineWeight, ExponentialWeight, Weight

__all__ = [
    "CosineWeight",
    "DynamicsRegularizer",
    "ErrorEstimate",
    "ExponentialWeight",
    "Jacobian",
    "Kinetic",
    "LocalError",
    "LocalStiffness",
    "Penalty",
    "Regularizer",
    "SolveRegularizer",
    "Steer",
    "Stiffness",
    "Taylor",
    "Weight",
    "regularized_solve",
]

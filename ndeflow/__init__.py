"""ndeflow: train neural differential equations and flows with PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndeflow.training.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use: `import ndeflow` alone must not cost the import of torch."""
    if name == "load":
        from ndeflow.training.loading import load

        return load
    raise AttributeError(f"module 'ndeflow' has no attribute {name!r}")

"""What a field depends on: gradient methods that make steps again reach only what the equation owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.problem import Problem


def parameters(eq: Equation) -> list[nn.Parameter]:
    """Return the trained parameters of an equation."""
    return [p for p in eq.parameters() if p.requires_grad]


def detached(eq: Equation) -> Equation:
    """Return the equation with a detached copy of its `args`, which requires gradients if they do."""
    args = eq.args
    return eq if args is None else eq.with_args(args.detach().requires_grad_(args.requires_grad))


@torch.enable_grad()
def inspect(problem: Problem, method: str) -> int:
    """Evaluate the field once, refuse what it depends on without owning it, and measure its graph.

    Args:
        problem: what is to be solved.
        method: the gradient method that asks.

    Returns:
        Bytes that autograd keeps for one evaluation, parameters aside; what two nodes keep counts twice.

    Raises:
        ValueError: gradients would have to reach a tensor that is neither a parameter of the equation nor in its args.
    """
    eq, y = detached(problem.eq), problem.y0.detach().requires_grad_()
    owned = {id(p) for p in eq.parameters()}
    kept = 0

    def note(x: Tensor) -> Tensor:
        nonlocal kept
        if id(x) not in owned and not isinstance(x, nn.Parameter):
            kept += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        field = eq.field(problem.ts.detach()[..., 0], y)
    known = owned | {id(y), id(eq.args)}
    strange = [leaf for leaf in _leaves(field) if id(leaf) not in known]
    if strange:
        raise ValueError(_complaint(problem.eq, strange, method))
    return kept


def _leaves(value: object) -> Iterator[Tensor]:
    """The tensors that gradients of a field reach."""
    tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else []
    pending = [x.grad_fn for x in tensors if x.grad_fn is not None]
    yield from (x for x in tensors if x.grad_fn is None and x.requires_grad)
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        pending += [following for following, _ in node.next_functions]


def _complaint(eq: Equation, strange: list[Tensor], method: str) -> str:
    """Name the tensors, and say what to do."""
    names = dict(_closed_over(getattr(eq, "f", eq)))
    named = [f"{names.get(id(x), 'a tensor')} {tuple(x.shape)}" for x in strange]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return (
        f"{method} gives no gradient to what the field uses without owning it: {', '.join(named[:4])}{more}. Make the "
        "field a module that has it as parameter, pass what is per sample as ODE(f, args=...), detach it if it needs "
        "no gradient, or use Backprop"
    )


def _closed_over(f: Any) -> Iterator[tuple[int, str]]:
    """Tensors and modules' parameters in a function's closure and in the globals it names, with their names."""
    function: Any = getattr(f, "forward", f) if isinstance(f, nn.Module) else f
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    variables = {name: cell.cell_contents for name, cell in cells}
    variables |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    variables |= {"self": getattr(f, "__self__", f)}
    for name, value in variables.items():
        yield from _tensors_of(name, value)


def _tensors_of(name: str, value: object) -> Iterator[tuple[int, str]]:
    """A tensor, or the parameters and tensor attributes of a module."""
    if isinstance(value, Tensor):
        yield id(value), name
    elif isinstance(value, nn.Module):
        yield from ((id(p), f"{name}.{path}") for path, p in value.named_parameters())
        yield from ((id(x), f"{name}.{path}") for path, x in vars(value).items() if isinstance(x, Tensor))


def ambient(y: Tensor) -> Callable[[], torch.autocast]:
    """Return what enters the autocast state of now, for a backward pass that happens outside of it."""
    device = y.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)

"""What a field depends on: gradient methods that make steps again reach only what the equation owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FunctionType, MethodType
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


def gradients_flow(problem: Problem) -> bool:
    """Whether the field, evaluated once, needs gradients of anything beside the state."""
    with torch.enable_grad():
        field = detached(problem.eq).field(problem.ts.detach()[..., 0], problem.y0.detach())
    return any(x.requires_grad for x in _tensors(field))


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
    if any(id(leaf) not in known for leaf in _leaves(field, {})):
        raise ValueError(_complaint(problem.eq, field, known, method))
    return kept


def _tensors(field: object) -> list[Tensor]:
    """The tensors of a field, which is one, or a tuple of some."""
    return [x for x in (field if isinstance(field, tuple) else (field,)) if isinstance(x, Tensor)]


def _leaves(field: object, ends: Mapping[Any, Tensor]) -> Iterator[Tensor]:
    """The tensors that gradients of a field reach, not going beyond some nodes of the graph, which stand for theirs."""
    tensors = _tensors(field)
    pending = [x.grad_fn for x in tensors if x.grad_fn is not None]
    yield from (x for x in tensors if x.grad_fn is None and x.requires_grad)
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = ends.get(node, getattr(node, "variable", None))
        if variable is not None:
            yield variable
        else:
            pending += [following for following, _ in node.next_functions]


def _complaint(eq: Equation, field: object, known: set[int], method: str) -> str:
    """Name the tensors, and say what to do."""
    variables = list(_closed_over(getattr(eq, "f", eq)))
    computed = {x.grad_fn: x for _, x in variables if x.grad_fn is not None}
    names = {id(x): name for name, x in variables}
    strange = [x for x in _leaves(field, computed) if id(x) not in known]
    named = [f"{names.get(id(x), 'a tensor')} {tuple(x.shape)}" for x in strange]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return (
        f"{method} gives no gradient to what the field uses without owning it: {', '.join(named[:4])}{more}. Make the "
        "field a module that has it as parameter, pass what is per sample as ODE(f, args=...), detach it if it needs "
        "no gradient, or use Backprop"
    )


def _closed_over(f: Any, depth: int = 2) -> Iterator[tuple[str, Tensor]]:
    """Tensors and modules' parameters in a function's closure and in the globals it names, with their names."""
    function: Any = getattr(f, "forward", f) if isinstance(f, nn.Module) else f
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    variables = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        with suppress(ValueError):  # a variable without a value yet
            variables[name] = cell.cell_contents
    variables |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    variables |= {"self": getattr(f, "__self__", f)}
    for name, value in variables.items():
        yield from _tensors_of(name, value)
        if isinstance(value, FunctionType | MethodType) and depth:
            yield from _closed_over(value, depth - 1)


def _tensors_of(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the parameters and tensor attributes of a module."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{path}", p) for path, p in value.named_parameters())
        for prefix, module in value.named_modules(prefix=name):
            yield from ((f"{prefix}.{path}", x) for path, x in vars(module).items() if isinstance(x, Tensor))


def ambient(y: Tensor) -> Callable[[], torch.autocast]:
    """Return what enters the autocast state of now, for a backward pass that happens outside of it."""
    device = y.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def check_owned(eq: Equation, params: Sequence[Tensor]) -> None:
    """Refuse a backward pass that would not find the parameters of the solve.

    Args:
        eq: the equation.
        params: its trained parameters when it was solved.

    Raises:
        RuntimeError: they have been exchanged or frozen since.
    """
    now = {id(p) for p in parameters(eq)}
    if any(id(p) not in now for p in params):
        raise RuntimeError(
            "parameters of the field were exchanged or frozen between the solve and its backward pass, which evaluates "
            "the field again (functional_call does so): call backward before that, or use Backprop"
        )

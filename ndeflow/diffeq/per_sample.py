"""Adaptive stepping with a step size of its own for each sample: masks, and compaction as samples end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ndeflow.diffeq.controllers import Adaptive, Memory
from ndeflow.diffeq.equations import Equation
from ndeflow.diffeq.failures import Failure
from ndeflow.diffeq.loop import NOTHING, ROUNDING
from ndeflow.diffeq.problem import Legs, Problem, Stride, legs
from ndeflow.diffeq.script import Script, Sheet, arrange, choose, pick
from ndeflow.diffeq.solvers.base import State

_ENOUGH = 0.25  # share of ended samples at which the others are gathered anew: less costs more than it saves


class Lane(NamedTuple):
    """The samples on their way, each (b, …): all that is gathered anew when some have ended.

    Attributes:
        rows: which samples they are.
        y: state.
        state: what the solver needs beside it.
        t: time.
        dt: size of the next step.
        leg: the number of the leg they are on.
        memory: of the controller.
        accepted: steps so far.
        rejected: steps thrown away.
        nfe: field evaluations.
        over: whether they have ended or failed.
        fresh: whether they stand behind a jump.
    """

    rows: Tensor
    y: Tensor
    state: State
    t: Tensor
    dt: Tensor
    leg: Tensor
    memory: Memory
    accepted: Tensor
    rejected: Tensor
    nfe: Tensor
    over: Tensor
    fresh: Tensor


class Outcome(NamedTuple):
    """What a solve came to.

    Attributes:
        sheet: what was read off the steps.
        script: the steps.
        rejected: steps thrown away, (B,).
        nfe: field evaluations, (B,).
        y: states at the ends, (B, *).
        failures: of the samples that did not get to their end.
    """

    sheet: Sheet
    script: Script
    rejected: Tensor
    nfe: Tensor
    y: Tensor
    failures: list[Failure]


Visit: TypeAlias = Callable[[Tensor, Stride, Tensor, Tensor, Tensor], Tensor]
"""Called after each attempt with the samples, the step, who made it, their times and states; returns new states."""


class EachSolve:
    """One adaptive solve with per-sample steps, without gradients.

    Args:
        problem: what to solve.
        controller: of the steps.
        visit: may change the states after each attempt; the solver then begins each step anew.
    """

    def __init__(self, problem: Problem, controller: Adaptive, visit: Visit | None = None) -> None:
        self.problem, self.controller, self.visit = problem, controller, visit
        self.end = problem.y0.clone()
        self.legs: Legs = legs(problem)
        self.count = (self.legs.t0 != self.legs.t1).sum(-1)
        self.sign = (problem.ts[:, -1] - problem.ts[:, 0]).sign()
        self.sheet = Sheet(problem)
        self.rejected, self.nfe = torch.zeros_like(self.count), torch.zeros_like(self.count)
        self.log: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.failures: list[Failure] = []
        self.patience = 1 if problem.y0.device.type == "cpu" else 8  # attempts between looks at who has ended

    def run(self) -> Outcome:
        """Step until every sample has ended or failed."""
        lane, eq = self._start()
        attempt = 0
        while len(lane.rows):
            attempt += 1
            lane = self._attempt(lane, eq)
            if attempt % self.patience == 0 and self._sparse(lane):
                lane = self._leave(lane)
                eq = self.problem.eq.take(lane.rows)
        nothing = (self.count[:0], self.problem.ts[:0, 0], self.problem.ts[:0, 0], self.count[:0].bool())
        rows, *steps = (torch.cat(column) for column in zip(nothing, *self.log, strict=True))
        useful = self._useful(rows, steps[0])
        script = arrange(len(self.count), rows[useful], *(column[useful] for column in steps))
        return Outcome(self.sheet, script, self.rejected, self.nfe, self.end, self.failures)

    def _useful(self, rows: Tensor, t0: Tensor) -> Tensor:
        """Which steps are worth making again: of a sample that failed, those up to the last output that it reached.

        In those behind it may grow beyond bounds, and 0 · ∞ would reach the gradients of what all samples share.
        """
        failed = torch.zeros_like(self.count, dtype=torch.bool)
        failed[[failure.sample for failure in self.failures]] = True
        signed = self.sign.unsqueeze(1) * self.problem.ts
        reached = signed.masked_fill(~self.sheet.written, -torch.inf).amax(1)
        return ~failed[rows] | (self.sign[rows] * t0 < reached[rows])

    def _start(self) -> tuple[Lane, Equation]:
        """All samples that have somewhere to go, with their first steps."""
        problem = self.problem
        rows = self.count.nonzero()[:, 0]
        eq, y, t = problem.eq.take(rows), problem.y0[rows], problem.ts[rows, 0]
        nothing = torch.zeros_like(rows)
        state, dt, nfe = None, torch.zeros_like(t), 0
        if len(rows):
            state = problem.solver.init(eq, t, y)
            dt, nfe = self.controller.init(eq, problem.solver, t, problem.ts[rows, -1] - t, y, state)
        ones = torch.ones_like(t)
        memory = Memory(ones, ones, nothing.bool())
        fresh = nothing.bool()
        return Lane(rows, y, state, t, dt, nothing, memory, nothing, nothing, nothing + nfe + 1, fresh, fresh), eq

    def _attempt(self, lane: Lane, eq: Equation) -> Lane:
        """Try one step of every sample."""
        solver = self.problem.solver
        sign, end = self.sign[lane.rows], self.legs.t1[lane.rows, lane.leg]
        last = lane.dt * (1 + 1e-10) >= (end - lane.t).abs()
        t1 = torch.where(last, end, lane.t + sign * lane.dt)
        alive, nfe = ~lane.over, solver.evaluations
        state = lane.state
        if state is None:
            state, nfe = solver.init(eq, lane.t, lane.y), nfe + 1
        step = solver.step(eq, lane.t, t1 - lane.t, lane.y, state)
        stride = Stride(lane.t, t1 - lane.t, lane.y, state, step)
        norm = self.controller.measure(lane.y, step, shared=False)
        verdict = self.controller.judge((t1 - lane.t).abs(), norm, lane.memory, solver)
        accept = verdict.accept & alive
        self._note(eq, lane, stride, t1, accept)
        landed = accept & last
        leg = lane.leg + landed
        ended = leg >= self.count[lane.rows]
        leg = torch.where(ended, lane.leg, leg)
        t = torch.where(accept, t1, lane.t)
        t = torch.where(landed & ~ended, self.legs.t0[lane.rows, leg], t)
        dt = torch.where(verdict.accept & last, torch.maximum(lane.dt, verdict.dt), verdict.dt)
        following = lane._replace(
            y=choose(accept, step.y1, lane.y),
            state=None if step.state is None else choose(accept, step.state, state),
            t=t,
            dt=torch.where(alive, dt, lane.dt),
            leg=leg,
            memory=verdict.memory,
            accepted=lane.accepted + accept,
            rejected=lane.rejected + (alive & ~accept),
            nfe=lane.nfe + alive * nfe,
            over=lane.over | ended,
            fresh=torch.where(accept, landed & ~ended & self.legs.fresh[lane.rows, leg], lane.fresh),
        )
        if self.visit:
            y = self.visit(lane.rows, stride, accept, following.t, following.y)
            following = following._replace(y=y, state=None)
        tried = torch.minimum(lane.dt, stride.dt.abs())
        return self._check(self._jump(following, eq, accept), stride, accept, tried)

    def _jump(self, lane: Lane, eq: Equation, accept: Tensor) -> Lane:
        """Ask the solver for a new state where the field has just jumped."""
        if not self.problem.eq.jumps or lane.state is None:
            return lane
        jumped = accept & lane.fresh
        if not bool(jumped.any()):
            return lane
        new = self.problem.solver.init(eq, lane.t, lane.y)
        return lane._replace(state=choose(jumped, new, lane.state), nfe=lane.nfe + jumped)

    def _note(self, eq: Equation, lane: Lane, stride: Stride, t1: Tensor, accept: Tensor) -> None:
        """Remember the accepted steps, and read off what the solution needs."""
        at = accept.nonzero()[:, 0]
        self.log.append((lane.rows[at], lane.t[at], t1[at], lane.fresh[at]))
        self.sheet.take(eq, lane.rows, stride, t1, at)

    def _check(self, lane: Lane, stride: Stride, accept: Tensor, tried: Tensor) -> Lane:
        """Find the samples that cannot go on; the others try no smaller step than makes sense."""
        way = (self.legs.t1[lane.rows, lane.leg] - lane.t).abs()
        least = torch.maximum(ROUNDING * lane.t.abs(), NOTHING * way).clamp(min=self.controller.dt_min or 0.0)
        stuck = ~lane.over & ~accept & (tried <= least)
        spent = ~lane.over & (lane.accepted + lane.rejected >= self.problem.max_steps)
        failed = stuck | spent
        if bool(failed.any()):
            for i in failed.nonzero()[:, 0].tolist():
                self._fail("underflow" if bool(stuck[i]) else "budget", lane, stride, i)
        return lane._replace(over=lane.over | failed, dt=torch.where(accept, lane.dt, lane.dt.maximum(least)))

    def _fail(self, reason: str, lane: Lane, stride: Stride, i: int) -> None:
        """Remember why a sample failed."""
        counts = (int(lane.accepted[i]), int(lane.rejected[i]), int(lane.nfe[i]))
        row = torch.tensor([i], device=lane.t.device)
        one = pick(stride, row)
        self.failures.append(Failure(reason, int(lane.rows[i]), float(lane.t[i]), float(one.dt[0]), counts, one, 0))

    def _sparse(self, lane: Lane) -> bool:
        """Whether enough samples have ended to gather the others."""
        over = int(lane.over.sum())
        return over >= max(1, int(_ENOUGH * len(lane.rows)))

    def _leave(self, lane: Lane) -> Lane:
        """Let those who have ended go."""
        self.rejected[lane.rows], self.nfe[lane.rows] = lane.rejected, lane.nfe
        self.end[lane.rows] = lane.y
        return pick(lane, (~lane.over).nonzero()[:, 0])


@torch.no_grad()
def run_each(problem: Problem, controller: Adaptive) -> Outcome:
    """Solve a problem with a step size for each sample, without gradients."""
    return EachSolve(problem, controller).run()

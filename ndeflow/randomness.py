r"""Keyed randomness: every draw is a pure function of integer keys, nothing random is state.

A *key* is a 64-bit integer. `fold` derives keys from keys, `uniform` and `normal` turn one key per
sample into numbers by hashing `(key, element)`; no generator is involved, so a draw depends neither on
what was drawn before nor on batch size, order, device or process. `seed_all` seeds the global
generators from a key, once per batch, for what libraries draw themselves (dropout, augmentation).
This is the only module that seeds anything.

The hash is the finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014; constants of Stafford's variant 13) in wrap-around 64-bit arithmetic.
Bits are equal on every device; normals are equal up to the device's rounding of log, cos and sin.
"""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_START = 0x6A09E667F3BCC908
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """The int64 with the same 64 bits as `x`."""
    return ((x & _MASK) ^ (1 << 63)) - (1 << 63)


def _mix(x: int) -> int:
    """One splitmix64 finalizer of an unsigned Python integer."""
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` on int64 tensors; logical shifts are arithmetic shifts under a mask. Overwrites `x`."""
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _signed(_MIX1)
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(_MIX2)
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


@lru_cache(maxsize=4096)
def _word(text: str) -> int:
    """A 64-bit integer for a string, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@overload
def fold(*words: int | str) -> int: ...
@overload
def fold(*words: int | str | Tensor) -> Any: ...
def fold(*words: int | str | Tensor) -> int | Tensor:
    r"""Derive a key from words: h ← mix(h + γ·w + γ) for each word w in turn, γ odd.

    Args:
        words: integers, strings, or int64 tensors that broadcast against each other.

    Returns:
        An int in [−2⁶³, 2⁶³), or an int64 tensor as soon as one word is a tensor; entry i of that
        tensor equals the result for the i-th integers.

    Raises:
        TypeError: a word is of another type, or a tensor is not int64.

    >>> fold(0, "train", 3) == fold(torch.tensor([7, 0]), "train", 3)[1].item()
    True
    """
    state: int | Tensor = _START
    for word in words:
        if isinstance(word, str):
            word = _word(word)
        if isinstance(word, Tensor):
            if word.dtype != torch.int64:
                raise TypeError(f"fold takes int64 tensors, got {word.dtype}: keys are 64-bit integers")
            base = state if isinstance(state, Tensor) else _signed(state)
            state = _mix_tensor(word * _signed(_GOLDEN) + base + _signed(_GOLDEN))
        elif isinstance(word, int | np.integer) and not isinstance(word, bool):
            step = _GOLDEN * (int(word) + 1)
            state = _mix_tensor(state + _signed(step)) if isinstance(state, Tensor) else _mix((state + step) & _MASK)
        else:
            raise TypeError(f"fold takes int, str and int64 tensors, got {type(word).__name__} {word!r}")
    return state if isinstance(state, Tensor) else _signed(state)


def seed_all(*words: int | str) -> None:
    """Seed the global generators of random, NumPy and torch (all devices in use) from `fold(*words)`.

    torch.manual_seed does the same 300 times slower, because it visits every backend.
    """
    seed = fold(*words) & _MASK
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed >> 1)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed >> 1)


def permutation(n: int, *words: int | str) -> Tensor:
    """Return a permutation of 0 … n−1, int64 (n,), drawn by the key `fold(*words)`."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((fold(*words) & _MASK) >> 1))


@lru_cache(maxsize=64)
def _elements(n: int, device: torch.device) -> Tensor:
    """Hashes of the element indices 0 … n−1, int64 (n,)."""
    return _mix_tensor(torch.arange(1, n + 1, device=device) * _signed(_GOLDEN))


def _bits(keys: Tensor, n: int) -> Tensor:
    """64 random bits for each (key, element), int64 (*keys.shape, n)."""
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be an int64 tensor, got {keys.dtype}: derive them with randomness.fold")
    return _mix_tensor(_mix_tensor(keys ^ _signed(_START)).unsqueeze(-1) + _elements(n, keys.device))


def _check(dtype: torch.dtype) -> None:
    """Refuse dtypes whose resolution would distort the law."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"draws are float32 or float64, got {dtype}: draw in float32 and cast")


def uniform(keys: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from U[0, 1), one independent array per key.

    Args:
        keys: int64, any shape K.
        shape: shape of one sample.
        dtype: float32 (24 random bits) or float64 (53).

    Returns:
        Tensor of shape (*K, *shape). Element j of a sample depends on (key, j) alone.
    """
    _check(dtype)
    digits = 24 if dtype == torch.float32 else 53
    bits = _bits(keys, math.prod(shape))
    return ((bits >> (64 - digits)) & ((1 << digits) - 1)).to(dtype).mul_(2.0**-digits).reshape((*keys.shape, *shape))


def normal(keys: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from N(0, 1), one independent array per key, by Box–Muller.

    Args:
        keys: int64, any shape K.
        shape: shape of one sample.
        dtype: float32 (two normals from 64 bits, |z| ≤ 6.8) or float64 (from 106 bits, |z| ≤ 8.6).

    Returns:
        Tensor of shape (*K, *shape). Element j of a sample depends on (key, j) alone, so a shorter
        draw from the same key is a prefix of a longer one.
    """
    _check(dtype)
    n = math.prod(shape)
    pairs = (n + 1) // 2
    if dtype == torch.float32:
        bits = _bits(keys, pairs)
        radius = (((bits >> 32) & 0xFFFFFFFF).to(dtype) + 0.5).mul_(2.0**-32)
        angle = (bits & 0xFFFFFFFF).to(dtype).mul_(2.0 * math.pi * 2.0**-32)
    else:
        bits = ((_bits(keys, 2 * pairs) >> 11) & ((1 << 53) - 1)).to(dtype).reshape(*keys.shape, pairs, 2)
        radius = (bits[..., 0] + 0.5) * 2.0**-53
        angle = bits[..., 1] * (2.0 * math.pi * 2.0**-53)
    radius = radius.log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return both.flatten(-2)[..., :n].reshape((*keys.shape, *shape))

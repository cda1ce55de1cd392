"""A convolutional U-Net for images from 8×8 pixels up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ndeflow.nets.embeddings import ConditionEmbedding, zero_init


class _Residual(nn.Module):
    """Norm, SiLU, convolution, twice; the condition scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, features: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(features, 2 * outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, affine=False)  # the condition brings scale and shift
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.condition(e)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Residual self-attention over pixels, written out: fused kernels have no forward mode, no second derivative."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *_ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, -1).unbind(1)
        weights = (q.transpose(-1, -2) @ k * (c // self.heads) ** -0.5).softmax(-1)
        return x + self.out((v @ weights.transpose(-1, -2)).reshape(x.shape))


class _Stage(nn.Module):
    """A residual block, followed by attention if `heads`."""

    def __init__(self, inputs: int, outputs: int, features: int, groups: int, dropout: float, heads: int) -> None:
        super().__init__()
        self.residual = _Residual(inputs, outputs, features, groups, dropout)
        self.attention = _Attention(outputs, heads, groups) if heads else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.attention(self.residual(x, e))


class _Upsample(nn.Module):
    """Double each side by repetition, then convolve; F.interpolate has no deterministic gradient on GPUs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return self.conv(x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w))


class _Down(nn.Module):
    """One level on the way down: change the resolution, then the stages, whose outputs are kept."""

    def __init__(self, resample: nn.Module, stages: list[_Stage]) -> None:
        super().__init__()
        self.resample, self.stages = resample, nn.ModuleList(stages)

    def forward(self, h: Tensor, e: Tensor) -> list[Tensor]:
        outputs = [self.resample(h)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1], e))
        return outputs[1:]


class _Up(nn.Module):
    """One level on the way up: stages that take the kept outputs in reverse, then change the resolution."""

    def __init__(self, stages: list[_Stage], resample: nn.Module) -> None:
        super().__init__()
        self.stages, self.resample = nn.ModuleList(stages), resample

    def forward(self, h: Tensor, e: Tensor, kept: list[Tensor]) -> Tensor:
        for stage, skip in zip(self.stages, reversed(kept), strict=True):
            h = stage(torch.cat((h, skip), dim=1), e)
        return self.resample(h)


def _halvings(side: int) -> int:
    """How often a side can be halved exactly."""
    return (side & -side).bit_length() - 1


def _check_levels(shape: tuple[int, ...], levels: int) -> None:
    """Refuse shapes that are not images or cannot be halved between all levels."""
    if len(shape) != 3:
        raise ValueError(f"UNet takes images, shape (channels, height, width), got {shape}")
    if levels < 1:
        raise ValueError("UNet needs at least one multiplier")
    _, height, width = shape
    possible = min(_halvings(height), _halvings(width))
    if possible < levels - 1:
        multiple = 2 ** (levels - 1)
        padded = " x ".join(str(-(-side // multiple) * multiple) for side in (height, width))
        raise ValueError(
            f"UNet with {levels} multipliers halves each side {levels - 1} times, {height} x {width} can be halved "
            f"{possible} times: give at most {possible + 1} multipliers, or pad the images to {padded}"
        )


def _check_widths(channels: int, blocks: int, groups: int, dropout: float) -> None:
    """Refuse sizes that are out of range."""
    if blocks < 1:
        raise ValueError(f"UNet needs blocks >= 1 per level, got {blocks}")
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"UNet needs channels that are a multiple of groups, got channels={channels}, groups={groups}")
    if not 0 <= dropout < 1:
        raise ValueError(f"UNet needs 0 <= dropout < 1, got {dropout}")


def _check_attention(attention: tuple[int, ...], heights: list[int], widths: list[int], heads: int) -> None:
    """Refuse attention where the net has no level, or heads that do not divide its channels."""
    for height in attention:
        if height not in heights:
            raise ValueError(f"UNet has levels of height {heights}, no attention at {height}: choose among them")
        channels = widths[heights.index(height)]
        if heads < 1 or channels % heads:
            raise ValueError(f"UNet needs heads that divide the {channels} channels at height {height}, got {heads}")


class UNet(nn.Module):
    """Convolutional U-Net in (t, x), optionally class-conditional.

    Each level has `blocks` residual blocks (group norm, SiLU, 3×3 convolution) on the way down and as many on the
    way up, joined by concatenation; between levels the sides halve, so that 28 → 14 → 7 makes three levels. Time and
    class scale and shift the second norm of every residual block. The output starts at zero.

    Args:
        shape: (channels, height, width) of an image; each side divisible by 2^(levels − 1).
        channels: of the first level, a multiple of `groups`.
        multipliers: channels of each level relative to the first; their number is the number of levels.
        blocks: residual blocks per level and direction.
        attention: heights of the levels that get self-attention after each residual block.
        heads: of the attention; must divide the channels there.
        groups: of the group norms.
        dropout: probability, in each residual block.
        classes: number of labels, None for an unconditional net.

    Raises:
        ValueError: the sides cannot be halved often enough, or another argument does not fit; says what would.

    Reference:
        Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, appendix B; Dhariwal, Nichol, "Diffusion
        models beat GANs on image synthesis", 2021, section 3 (scale and shift by the condition).

    >>> net = UNet((1, 28, 28), channels=8, multipliers=(1, 2, 2), blocks=1, attention=(7,))
    >>> net(torch.rand(2), torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        multipliers: tuple[int, ...] = (1, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        heads: int = 4,
        groups: int = 8,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        _check_levels(self.shape, len(multipliers))
        _check_widths(channels, blocks, groups, dropout)
        widths = [channels * m for m in multipliers]
        heights = [self.shape[1] >> level for level in range(len(widths))]
        _check_attention(tuple(attention), heights, widths, heads)

        features = 4 * channels
        self.embedding = ConditionEmbedding(features, self.shape, classes, owner="UNet")
        self.condition = nn.Sequential(nn.Linear(features, features), nn.SiLU())

        def stage(inputs: int, level: int) -> _Stage:
            attend = heads if heights[level] in attention else 0
            return _Stage(inputs, widths[level], features, groups, dropout, attend)

        self.first = nn.Conv2d(self.shape[0], channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            finer = widths[level - 1] if level else channels
            halve = nn.Conv2d(finer, width, 3, stride=2, padding=1) if level else nn.Identity()
            double = _Upsample(width, finer) if level else nn.Identity()
            inputs = [width if level or i else finer for i in range(blocks)]
            self.down.append(_Down(halve, [stage(n, level) for n in inputs]))
            self.up.append(_Up([stage(2 * width, level) for _ in range(blocks)], double))
        self.middle = _Down(nn.Identity(), [stage(widths[-1], -1), stage(widths[-1], -1)])
        self.norm = nn.GroupNorm(groups, widths[0])
        self.last = zero_init(nn.Conv2d(widths[0], self.shape[0], 3, padding=1))

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Evaluate the net.

        Args:
            t: time inputs, (B,).
            x: images, (B, *shape).
            cond: labels, int64 (B,), exactly for a class-conditional net.

        Returns:
            (B, *shape).

        Raises:
            ValueError: shapes do not fit, or labels are missing or superfluous.
        """
        e = self.condition(self.embedding(t, x, cond))
        h, kept = self.first(x), []
        for down in self.down:
            kept.append(down(h, e))
            h = kept[-1][-1]
        h = self.middle(h, e)[-1]
        for up, outputs in zip(reversed(self.up), reversed(kept), strict=True):
            h = up(h, e, outputs)
        return self.last(F.silu(self.norm(h)))

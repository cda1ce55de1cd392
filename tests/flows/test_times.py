import math

import pytest
import torch
from scipy import stats

from ndeflow.flows import Affine, CosMap, Independent, Linear, LogitNormal, Shift, TimeSampler, Uniform, UShape
from ndeflow.flows.times import stratified
from ndeflow.randomness import fold, normal, uniform

SAMPLERS = {
    "uniform": Uniform(),
    "logit-normal": LogitNormal(),
    "logit-normal, shifted": LogitNormal(mean=1.2, std=1.2),
    "u-shape": UShape(),
    "u-shape, steep": UShape(a=12.0),
    "cosmap": CosMap(),
    "shift": Shift(k=3.0),
    "shift, towards data": Shift(k=0.5),
}
N = 100_000
LIMIT = 1.63 / math.sqrt(N)  # Kolmogorov–Smirnov, level 1 %

every = pytest.mark.parametrize("times", SAMPLERS.values(), ids=SAMPLERS.keys())


def independent_draws(times, interval=(0.0, 1.0), n=N):
    """Batches of one sample each: nothing is stratified."""
    return times(fold("times", torch.arange(n)), torch.zeros(n, dtype=torch.int64), 1, interval)


def integrated(times, t, interval=(0.0, 1.0)):
    """The distribution function by integrating the density, knowing nothing of the quantiles; t ascending."""
    low, high = sorted(interval)
    nodes = low + (high - low) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    cells = times.density(nodes, interval) * (high - low) / 200_000
    share = torch.cat((torch.zeros(1), cells.cumsum(0)))
    position = (t - low) / (high - low) * 200_000
    below = position.long().clamp(max=199_999)
    return share[below] + (position - below) * cells[below]


def kolmogorov(t, times, interval=(0.0, 1.0)):
    t = t.sort().values
    ranks = torch.arange(len(t) + 1) / len(t)
    law = integrated(times, t, interval)
    return torch.maximum((ranks[1:] - law).max(), (law - ranks[:-1]).max()).item()


@every
def test_draws_follow_the_density(times):
    assert kolmogorov(independent_draws(times), times) < LIMIT


def test_the_test_tells_near_laws_apart():
    assert kolmogorov(independent_draws(LogitNormal(0.03)), LogitNormal()) > LIMIT
    assert kolmogorov(independent_draws(UShape(4.0)), UShape(4.3)) > LIMIT


@every
@pytest.mark.parametrize("interval", [(0.0, 1.0), (1.0, 0.0), (80.0, 0.0)])
def test_density_integrates_to_one_and_turns_with_the_path(times, interval):
    low, high = sorted(interval)
    assert integrated(times, torch.tensor([high], dtype=torch.float64), interval).item() == pytest.approx(1, abs=1e-4)
    source, data = interval
    t = source + (data - source) * torch.tensor([0.2, 0.7], dtype=torch.float64)
    expected = times.density(torch.tensor([0.2, 0.7], dtype=torch.float64)) / (high - low)
    torch.testing.assert_close(times.density(t, interval), expected)


def test_zero_is_the_source_whatever_the_direction():
    towards_data = LogitNormal(mean=2.0)
    assert independent_draws(towards_data, (0.0, 1.0), 1000).mean() > 0.75
    assert independent_draws(towards_data, (1.0, 0.0), 1000).mean() < 0.25
    assert independent_draws(towards_data, (80.0, 0.0), 1000).mean() < 20


@every
def test_a_batch_has_one_time_in_each_stratum(times):
    n = 240
    slots = torch.arange(n)
    t = times(fold("strata", slots), slots, n, (0.0, 1.0))
    strata = (integrated(times, t.sort().values) * n).floor().long()
    assert (strata - torch.arange(n)).abs().max() <= 1  # numerical integration may miss a border by a cell
    assert strata.unique().numel() > 0.95 * n


def test_stratification_removes_the_noise_of_batch_means():
    """Std of the batch mean of 1/(0.05 + t) at B = 256: 0.198 independently, 0.0037 stratified."""
    means = {"stratified": [], "independent": []}
    slots = torch.arange(256)
    for batch in range(200):
        keys = fold("means", batch, slots)
        means["stratified"].append((1 / (0.05 + Uniform()(keys, slots, 256, (0.0, 1.0)))).mean().item())
        means["independent"].append((1 / (0.05 + Uniform()(keys, slots * 0, 1, (0.0, 1.0)))).mean().item())
    assert torch.tensor(means["stratified"]).std().item() == pytest.approx(0.0037, rel=0.3)
    assert torch.tensor(means["independent"]).std().item() == pytest.approx(0.198, rel=0.3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_ranks_share_covers_the_interval(ranks):
    """Consecutive slots, as a rank owns them, are spread: no gap is much longer than for an even spacing."""
    slots = torch.arange(256)
    p = stratified(fold(0, slots), slots, 256)
    for share in p.chunk(ranks):
        edges = torch.cat((torch.zeros(1), share.sort().values, torch.ones(1)))
        assert edges.diff().max() < 3.5 / len(share)
    assert p[:16].sort().values.diff().max() < 0.2


def test_every_batch_size_is_permuted():
    for n in [*range(1, 300), 2310, 30030, 65536, 510510]:
        slots = torch.arange(min(n, 3000))
        strata = (stratified(fold(0, slots), slots, n) * n).floor()
        assert strata.unique().numel() == len(slots)
        assert strata.max() < n


def test_global_batch_may_be_an_int_or_a_column_of_the_batch():
    slots = torch.arange(6)
    keys = fold(1, slots)
    p = stratified(keys, slots, 12)
    for given in (torch.tensor(12), torch.full((6,), 12)):
        assert torch.equal(stratified(keys, slots, given), p)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stratified(keys, slots, 0)


def test_a_time_depends_on_its_own_key_and_slot_alone():
    slots = torch.arange(64)
    keys = fold(2, slots)
    t = Uniform()(keys, slots, 64, (0.0, 1.0))
    part = torch.tensor([40, 3, 17])
    assert torch.equal(Uniform()(keys[part], slots[part], 64, (0.0, 1.0)), t[part])
    assert t.dtype == torch.float64


def test_time_and_noise_of_one_key_are_uncorrelated():
    """Also with noise that another component draws from the bare key, whose bits a bare uniform would share."""
    keys = fold("one key", torch.arange(20_000))
    t = Uniform()(keys, torch.zeros_like(keys), 1, (0.0, 1.0))
    x0 = Independent()(torch.zeros(len(keys), 1, dtype=torch.float64), None, keys).x0[:, 0]
    bare, shared = normal(keys, dtype=torch.float64), uniform(keys, dtype=torch.float64)

    def correlation(a, b):
        return abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) * len(keys) ** 0.5

    for noise in (x0, x0.square(), bare, bare.square()):
        assert correlation(t, noise) < 4
    assert correlation(shared, bare.square()) > 20


def test_logit_normal_is_the_logistic_of_a_normal():
    logits = independent_draws(LogitNormal(-0.4, 0.7)).logit()
    assert stats.kstest(logits.numpy(), stats.norm(-0.4, 0.7).cdf).statistic < LIMIT
    assert stats.kstest(logits.numpy(), stats.norm(-0.4, 0.75).cdf).statistic > LIMIT


def test_log_normal_noise_levels_are_a_logit_normal_of_the_linear_path():
    """log(σ/α) ~ N(−1.2, 1.2²) is mean 1.2, std 1.2."""
    t = independent_draws(LogitNormal(1.2, 1.2))
    levels = -Affine(Linear()).half_log_snr(t)
    assert stats.kstest(levels.numpy(), stats.norm(-1.2, 1.2).cdf).statistic < LIMIT


def test_u_shape_has_the_published_proportions():
    """a = 4: 2.07 at the ends, 0.551 in the middle, 17.25 % below 0.1."""
    ends_and_middle = UShape(4.0).density(torch.tensor([0.0, 0.5, 1.0]))
    assert ends_and_middle.tolist() == pytest.approx([2.0746, 0.5514, 2.0746], abs=1e-3)
    assert (independent_draws(UShape(4.0)) < 0.1).double().mean().item() == pytest.approx(0.1725, abs=5e-3)


@pytest.mark.parametrize("k", [0.3, 3.0])
def test_shift_lowers_the_logit(k):
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(Shift(k).quantile(p).logit(), p.logit() - math.log(k))


def test_cosmap_passes_noise_levels_as_the_cosine_schedule_does():
    """log(α/σ) of a uniform angle: tan on the trigonometric path, u/(1 − u) on the linear one."""
    p = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    levels = Linear().half_log_snr(CosMap().quantile(p))
    torch.testing.assert_close(levels, (p * math.pi / 2).tan().log())


@every
def test_ends_are_reached_and_not_left(times):
    u = times.quantile(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert 0 <= u[0] < 1e-12
    assert 0.999 < u[1] <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitNormal(std=0.0), "std > 0, got 0"),
        (lambda: UShape(a=0.0), "for a = 0 use Uniform"),
        (lambda: UShape(a=-1.0), "0 < a <= 1000, got -1"),
        (lambda: Shift(k=0.0), "k > 0, got 0"),
    ],
)
def test_laws_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_time_samplers_are_abstract_or_final():
    with pytest.raises(TypeError, match="abstract"):
        TimeSampler()

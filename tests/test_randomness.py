"""Derived numbers: right distribution, bijective order, and the same whatever is asked for beside them."""

import numpy as np
import pytest
from scipy import stats

from vitcli.randomness import derive_seed, normal, permute, uniform


def test_seeds_depend_on_every_part_its_type_and_order() -> None:
    seeds = {
        derive_seed(0, "a"),
        derive_seed("a", 0),
        derive_seed(0, "b"),
        derive_seed(1, "a"),
        derive_seed("0", "a"),
        derive_seed(0),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
    assert uniform(7, [0, 5], 2).tolist() == uniform(7, np.array([0, 5]), 2).tolist()


def test_a_row_depends_on_its_counter_alone() -> None:
    together = uniform(5, np.arange(100), 8)
    assert (uniform(5, [42], 8) == together[42]).all()
    assert (uniform(5, [42], 3) == together[42, :3]).all()


def test_uniform_and_normal_pass_kolmogorov_smirnov() -> None:
    assert stats.kstest(uniform(1, np.arange(20_000), 2).ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(1, np.arange(20_000), 2).ravel(), "norm").pvalue > 1e-3
    u = uniform(1, np.arange(20_000), 2)
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.03  # draws
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03  # neighbours


@pytest.mark.parametrize("size", [1, 2, 3, 10, 997, 4096, 50_000])
def test_permute_is_a_bijection(size: int) -> None:
    assert sorted(permute(np.arange(size), size, seed=9)) == list(range(size))


def test_permute_mixes_and_reaches_far_positions_at_once() -> None:
    order = permute(np.arange(10_000), 10_000, seed=1)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (order != permute(np.arange(10_000), 10_000, seed=2)).mean() > 0.99
    far = permute(np.arange(13_999_900, 14_000_000), 14_000_000, seed=1)
    assert len(set(far.tolist())) == 100
    assert far.max() < 14_000_000


def test_every_order_of_three_comes_up() -> None:
    orders = {tuple(permute(np.arange(3), 3, seed=seed)) for seed in range(200)}
    assert len(orders) == 6


def test_positions_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="below 10"):
        permute([10], 10, seed=0)

"""The order of samples is a pure function of (seed, pass), and every purpose has its own random numbers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietvit.data.sampler import SampleOrder, batch_rng, pass_order, replacement, sample_rng


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 5))
def test_each_pass_holds_every_sample_once(num_samples: int, seed: int, pass_: int) -> None:
    order = SampleOrder(num_samples, seed)
    first = pass_ * num_samples
    drawn = [order.sample_at(position) for position in range(first, first + num_samples)]
    assert sorted(index for index, _ in drawn) == list(range(num_samples))
    assert {p for _, p in drawn} == {pass_}


def test_positions_may_be_asked_for_in_any_order() -> None:
    wanted = [SampleOrder(7, 3).sample_at(position) for position in range(70)]
    order = SampleOrder(7, 3)
    for position in np.random.default_rng(0).permutation(70).tolist():
        assert order.sample_at(position) == wanted[position]
    assert pickle.loads(pickle.dumps(order)).sample_at(33) == wanted[33]


def test_memory_holds_two_passes_at_most() -> None:
    order = SampleOrder(5, 0)
    for position in range(100):
        order.sample_at(position)
    assert len(order._orders) <= 2


def test_passes_and_seeds_differ() -> None:
    orders = {tuple(pass_order(50, seed, pass_).tolist()) for seed in range(3) for pass_ in range(4)}
    assert len(orders) == 12


def test_the_order_is_written_in_stone() -> None:
    # A resumed run must find the order of the run it resumes, also under another version of NumPy or quietvit.
    assert pass_order(10, seed=0, pass_=0).tolist() == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]


def test_orders_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), pass_order(6, seed, 0)] += 1
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 60  # 25 degrees of freedom: beyond 60 one time in 10,000


def test_streams_are_apart_and_repeatable() -> None:
    def first(rng: np.random.Generator) -> float:
        return float(rng.random())

    keys = [(seed, index, pass_) for seed in range(3) for index in range(3) for pass_ in range(3)]
    draws = [first(sample_rng(*key)) for key in keys] + [first(batch_rng(*key[:2])) for key in keys[::3]]
    assert len(set(draws)) == len(draws)
    assert draws[: len(keys)] == [first(sample_rng(*key)) for key in keys]


def test_replacements_cover_the_data() -> None:
    drawn = {replacement(10, 0, index, 0, attempt) for index in range(10) for attempt in range(1, 11)}
    assert drawn == set(range(10))
    assert replacement(10**6, 1, 2, 3, 4) == replacement(10**6, 1, 2, 3, 4) != replacement(10**6, 1, 2, 3, 5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no samples"):
        SampleOrder(0, 0)
    with pytest.raises(ValueError, match="seed must not be negative"):
        SampleOrder(1, -1)

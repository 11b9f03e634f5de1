"""Rows of packed documents: what an obvious loop makes, all documents once per epoch, the same however asked for."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.packing import IGNORE, Mixture, Order, packed_rows
from train.data.shuffle import Permutation
from train.data.source import Source
from train.loss import next_token_targets

SEQ = 24


def order(store, seed, epoch):
    """The documents of an epoch, one by one."""
    places = Permutation(len(store), 1, seed, int(store.digest[:16], 16), epoch)
    return [int(places(np.array([place]))[0]) for place in range(len(store))]


def obvious_rows(store, seq, seed, count):
    """The first rows, token by token: lists of (token, document's place in the row, position)."""
    rows, row, segment, position = [], [], 0, 0
    for epoch in range(10_000):
        for document in order(store, seed, epoch):
            segment, position = segment + 1, 0
            for token in store[document]:
                row.append((int(token), segment, position))
                position += 1
                if len(row) == seq:
                    rows.append(row)
                    row, segment, position = [], 1, 0
                    if len(rows) == count:
                        return rows
            if not row:
                segment = 0


@pytest.mark.parametrize("seq", [2, SEQ, 200])
def test_rows_are_those_of_an_obvious_loop(store, seq):
    count = 3 * store.tokens // seq + 2  # into the fourth epoch
    rows = packed_rows([Source(store)], seq, 7)
    whole = obvious_rows(store, seq, 7, count + store.tokens // seq)
    for index in range(count):
        row, expected = rows[index], whole[rows.origin(index)]
        tokens, segments, positions = (np.array(column) for column in zip(*expected, strict=True))
        np.testing.assert_array_equal(row.tokens, tokens)
        np.testing.assert_array_equal(row.segment_ids, segments)
        np.testing.assert_array_equal(row.positions, positions)
        assert all(array.dtype == np.int32 and array.shape == (seq,) for array in row)


def test_targets_are_those_of_the_loss(store):
    rows = [packed_rows([Source(store)], SEQ, 1)[index] for index in range(50)]
    tokens, targets, segments, _ = (np.stack(column) for column in zip(*rows, strict=True))
    np.testing.assert_array_equal(targets, next_token_targets(jnp.asarray(tokens), jnp.asarray(segments)))
    assert (targets == IGNORE).sum() == sum(row.segment_ids[-1] for row in rows)


def test_every_document_once_per_epoch(store):
    rows = packed_rows([Source(store)], SEQ, 5)
    epochs = 4
    count = epochs * store.tokens // SEQ + 1
    by_origin = {rows.origin(index): rows[index].tokens for index in range(count + store.tokens // SEQ)}
    stream = np.concatenate([by_origin[origin] for origin in range(count)])
    documents = sorted(bytes(store[document]) for document in range(len(store)))
    assert len(set(documents)) == len(documents)
    seen = []
    for epoch in range(epochs):
        tokens = stream[epoch * store.tokens : (epoch + 1) * store.tokens]
        ends = np.flatnonzero(tokens == store[0][-1]) + 1
        seen.append([bytes(document) for document in np.split(tokens, ends)[:-1]])
        assert sorted(seen[-1]) == documents
    assert all(a != b for n, a in enumerate(seen) for b in seen[:n])


def test_neighbors_are_shuffled(make_store, monkeypatch):
    """A long document's rows do not follow each other, and within a window no row comes twice."""
    monkeypatch.setattr("train.data.packing._WINDOW", 50)
    long = make_store([chr(ord("a") + n % 26) * 400 for n in range(20)])
    rows = packed_rows([Source(long)], SEQ, 5)
    origins = [rows.origin(index) for index in range(150)]
    for first in (0, 50, 100):
        assert sorted(origins[first : first + 50]) == list(range(first, first + 50))
    assert origins[:50] != [origin - 50 for origin in origins[50:100]]  # each window in an order of its own
    letters = [int(rows[index].tokens[0]) for index in range(150)]
    assert sum(a == b for a, b in itertools.pairwise(letters)) < 60  # 140 in the order of the stream
    small = packed_rows([Source(long)], long.tokens // 3, 5)
    assert sorted(small.origin(index) for index in range(6)) == [*range(3), *range(3, 6)]


def test_rows_do_not_depend_on_what_was_asked_before(store):
    """grain#1178, datasets#7901: the state of a shuffle was another one once it was restored. Here there is none."""
    expected = [packed_rows([Source(store)], SEQ, 3)[index] for index in range(300)]
    rows = packed_rows([Source(store)], SEQ, 3)
    for index in random.Random(0).sample(range(300), 300):
        assert all(map(np.array_equal, rows[index], expected[index]))
    far = 10**12
    assert all(map(np.array_equal, rows[far], packed_rows([Source(store)], SEQ, 3)[far]))


def test_seeds_and_contents_differ(store, make_store):
    first = packed_rows([Source(store)], SEQ, 3)
    other = packed_rows([Source(store)], SEQ, 4)
    assert sum(np.array_equal(first[index].tokens, other[index].tokens) for index in range(100)) == 0
    assert order(store, 3, 0) != order(make_store([f"{n:02}" for n in range(60)]), 3, 0)


def test_blocks_do_not_show(make_store, monkeypatch):
    """Orders are looked up in blocks; of 4, so that a few documents make many, and by 3 of them at a time."""
    big = make_store([f"{n}" * (n % 7 + 1) for n in range(101)])
    whole = packed_rows([Source(big)], SEQ, 3)
    expected = [whole[index] for index in range(100)]
    monkeypatch.setattr("train.data.packing._BLOCK", 4)
    monkeypatch.setattr("train.data.packing._BLOCKS", 3)
    rows = packed_rows([Source(big)], SEQ, 3)
    for index in random.Random(0).sample(range(100), 100):
        assert all(map(np.array_equal, rows[index], expected[index]))


class Lengths:
    """A store without tokens."""

    def __init__(self, lengths):
        self._lengths = np.asarray(lengths)

    def __len__(self):
        return len(self._lengths)

    def lengths(self, documents):
        return self._lengths[documents]


def test_an_order_finds_any_token():
    store = Lengths(np.random.default_rng(0).integers(1, 9, 5000))
    shuffled = Order(store, 1, 2)
    documents = [document for document, _, _ in shuffled.documents(0)]
    assert sorted(documents) == list(range(5000))
    begins = np.cumsum(store.lengths(np.array(documents))) - store.lengths(np.array(documents))
    for place in (0, 1, 1023, 1024, 4999):
        begin = int(begins[place])
        last = int(store.lengths(np.array(documents[place : place + 1]))[0]) - 1
        assert next(shuffled.documents(begin)) == (documents[place], 0, last + 1)
        assert next(shuffled.documents(begin + last)) == (documents[place], last, last + 1)


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permutations_are_bijections(size, key):
    places = np.arange(size)
    shuffled = Permutation(size, key)(places)
    assert sorted(shuffled.tolist()) == places.tolist()
    some = np.array([0, size // 2, size - 1])
    np.testing.assert_array_equal(Permutation(size, key)(some), shuffled[some])


def test_permutations_of_large_sizes():
    """None is held in memory; four numbers out of 2^60."""
    places = np.array([0, 1, 2**59, 2**60 - 2])
    numbers = Permutation(2**60 - 1, 5)(places)
    assert len(set(numbers.tolist())) == 4 and ((numbers >= 0) & (numbers < 2**60 - 1)).all()


@pytest.mark.parametrize("size", [5, 5000])
def test_permutations_are_fair(size):
    """Over 5,000 keys each of 5 numbers stands in every fifth of the places equally often: chi-squared, 1e-6 tail.

    One size is sorted, the other a network.
    """
    counts, keys = np.zeros((5, 5)), 5000
    places = np.arange(5) * (size // 5)
    for key in range(keys):
        counts[np.arange(5), Permutation(size, key)(places) * 5 // size] += 1
    expected = keys / 5
    assert ((counts - expected) ** 2 / expected).sum() < 63.0  # 20 degrees of freedom at most


def test_permutations_are_the_same_everywhere():
    """Written down once: a change would change every run's data."""
    assert Permutation(10, 1, 2)(np.arange(10)).tolist() == [1, 7, 4, 2, 5, 6, 0, 9, 3, 8]
    assert Permutation(5000, 1, 2)(np.arange(4)).tolist() == [4437, 4602, 2678, 4030]


def test_mixtures_have_their_proportions(store, make_store):
    other = make_store([f"{n}" * 9 for n in range(50)])
    third = make_store([f"z{n}" * 9 for n in range(50)])
    mixture = packed_rows([Source(store, 6.0), Source(other, 3.0), Source(third, 1.0)], SEQ, 1)
    assert isinstance(mixture, Mixture) and mixture.shares == [6000, 3000, 1000]
    origins = [mixture.origin(index) for index in range(20_000)]
    for begin in (0, 10_000):
        assert np.bincount([source for source, _ in origins[begin : begin + 10_000]]).tolist() == [6000, 3000, 1000]
    # Every row of each source occurs once, and early rows before late ones.
    for source, share in enumerate(mixture.shares):
        assert sorted(number for s, number in origins[:10_000] if s == source) == list(range(share))
    # No part of it is far from the proportions: 200 rows, 6 standard deviations.
    for begin in range(0, 20_000, 200):
        assert abs(sum(source == 0 for source, _ in origins[begin : begin + 200]) - 120) < 42
    rows = [packed_rows([Source(each)], SEQ, 1) for each in (store, other, third)]
    for index in range(0, 20_000, 997):
        source, number = mixture.origin(index)
        assert all(map(np.array_equal, mixture[index], rows[source][number]))
    reseeded = Mixture([], [6, 3, 1], 2)
    assert origins[:100] != [reseeded.origin(index) for index in range(100)]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 0.2, 0.7], [1e-4, 1], [5, 3, 2, 1e-3 * 11]])
def test_shares_are_the_nearest_rows(weights):
    shares = Mixture([], weights, 0).shares
    assert sum(shares) == 10_000
    assert max(abs(share - 10_000 * w / sum(weights)) for share, w in zip(shares, weights, strict=True)) < 1


def test_bad_input(store):
    for sources, seq, seed, message in [
        ([], 8, 0, "there is no training data"),
        ([Source(store)], 1, 0, "rows must have at least 2 tokens"),
        ([Source(store)], 10**6, 0, f"has {store.tokens} tokens in all, fewer than the 1000000 of one row"),
        ([Source(store)], 8, -1, "seed must not be negative"),
        ([Source(store, 0.0)], 8, 0, "weight of .* must be positive"),
        ([Source(store, float("nan"))], 8, 0, "weight of .* must be positive"),
        ([Source(store), Source(store, 1e-9)], 8, 0, "source 2 of the mixture has weight 1e-09 of 1"),
        ([Source(store, 1e308), Source(store, 1e308)], 8, 0, "weights are too large to be added up"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_rows(sources, seq, seed)
    assert packed_rows([Source(store)], store.tokens, 0)[0].tokens.shape == (store.tokens,)


def test_what_is_read_is_told(store):
    what = f"{len(store)} documents, {store.tokens:,} tokens"
    rows = packed_rows([Source(store)], store.tokens // 2, 0)
    assert rows.described(3) == f"{what}, read {3 * (store.tokens // 2) / store.tokens:.2g} times"
    mixed = packed_rows([Source(store, 3.0), Source(store)], store.tokens // 2, 0)
    assert mixed.described(8) == f"{what}, read 3 times, and {what}, read 1 times"

"""Attention by a loop over queries in float64, its scores from explicit relative positions."""

import numpy as np


def relative_positions(query_positions, key_positions, chunk_size, local_size):
    """[T, S] distances that RoPE sees under Dual Chunk Attention: the closed form, one pair after the other."""
    length = chunk_size - local_size
    matrix = np.zeros((len(query_positions), len(key_positions)), int)
    for row, i in enumerate(query_positions):
        for column, j in enumerate(key_positions):
            (query_chunk, r), (key_chunk, k) = divmod(i, length), divmod(j, length)
            if query_chunk == key_chunk:
                matrix[row, column] = r - k
            elif query_chunk == key_chunk + 1:
                matrix[row, column] = min(r + length, chunk_size) - k
            else:
                matrix[row, column] = min(2 * length - 1, chunk_size) - k
    return matrix


def attention(query, key, value, distances, seen, frequencies, temperatures=1.0):
    """[B, T, N, H] float64.

    Args:
      query: [B, T, N, H] and key: [B, K, S, H], neither rotated.
      value: [B, K, S, H].
      distances: [B, T, S], how far RoPE takes each key to stand behind each query.
      seen: [B, T, S] bool.
      frequencies: [H/2].
      temperatures: [B, T, S], multiplies the scores.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    temperatures = np.broadcast_to(temperatures, distances.shape)
    half = query.shape[-1] // 2
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:3]):
        slots = np.flatnonzero(seen[b, t])
        if len(slots) == 0:
            continue
        k, v = (x[b, n * key.shape[1] // query.shape[2], slots] for x in (key, value))
        # Pairs as complex numbers: turning one by an angle is a product, so the score is Re(q conj(k) e^(i m theta)).
        pairs = (query[b, t, n, :half] + 1j * query[b, t, n, half:]) * (k[:, :half] - 1j * k[:, half:])
        turned = pairs * np.exp(1j * distances[b, t, slots][:, None] * np.asarray(frequencies, np.float64))
        scores = turned.real.sum(axis=-1) / np.sqrt(2 * half) * temperatures[b, t, slots]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v / weights.sum()
    return out

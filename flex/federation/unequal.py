"""FlexLoRA: clients with LoRAs of unequal rank (arXiv 2402.11505).

With `B_k A_k` the LoRA of client k, rank r_k, p_k its share of the examples, and one scale alpha / r for all of them:

    D = sum_k p_k B_k A_k,     D = U S V' (singular values descending),
    the server keeps  B = U S, A = V'  of rank R, the largest;  client k is sent the first r_k columns of B, rows of A:
    its best approximation of D.

A client pads what it gets with zeros to the rank its model has. Rows of A and columns of B that are zero together get
no gradient and stay zero, so that what it sends back is cut to r_k again without loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from flex.federation.messages import Arrays

A, B = ".lora_A.", ".lora_B."


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(A, B) of every LoRA among these tensors."""
    return [(name, name.replace(A, B)) for name in names if A in name and name.replace(A, B) in names]


def averaged_product(
    factors: Sequence[tuple[np.ndarray, np.ndarray]], shares: Sequence[float], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """(A [rank, in], B [out, rank]) of the best approximation of sum_k p_k B_k A_k.

    The sum itself is never made: with B = Q_B R_B and A' = Q_A R_A of the stacked factors, its singular values are
    those of R_B R_A', whose sides are the sum of the ranks.
    """
    a = np.concatenate([a for a, _ in factors]).astype(np.float64)
    b = np.concatenate([share * b for (_, b), share in zip(factors, shares, strict=True)], axis=1).astype(np.float64)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(s))
    new_a, new_b = v[:kept] @ q_a.T, np.zeros((b.shape[0], rank))
    new_b[:, :kept] = (q_b @ u[:, :kept]) * s[:kept]
    if kept < rank:  # what the sum does not reach can still be learnt: B is zero there, A is not
        new_a = np.concatenate([new_a, np.linalg.svd(new_a)[2][kept:rank]])
    return new_a.astype(np.float32), new_b.astype(np.float32)


def cut_to_rank(arrays: Arrays, rank: int) -> Arrays:
    """What a client of this rank is sent: the first rows of A, columns of B; anything else as it is."""
    cut = dict(arrays)
    for a, b in pairs(list(arrays)):
        cut[a], cut[b] = arrays[a][:rank], arrays[b][:, :rank]
    return cut


def padded_to(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The inverse, with zeros, where the model's LoRA has a higher rank than what came."""
    padded = dict(arrays)
    for pair in pairs(list(arrays)):
        for axis, name in enumerate(pair):
            if name in shapes:
                missing = shapes[name][axis] - arrays[name].shape[axis]
                padded[name] = np.pad(arrays[name], [(0, max(0, missing) * (axis == own)) for own in (0, 1)])
    return padded


def cut_to(arrays: Arrays, like: Arrays) -> Arrays:
    """The tensors, cut to the shapes of those that came."""
    return {name: array[tuple(slice(0, size) for size in like[name].shape)] for name, array in arrays.items()}

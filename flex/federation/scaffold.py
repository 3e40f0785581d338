"""SCAFFOLD, the client's half (option II): control variates against the drift of the clients.

The server keeps c, client k keeps c_k in its personal file; both have the shapes of the shared state and start at zero.
A round of K steps with learning rate lr, from the shared state w to w_k:

    every step   w <- w - lr (u + c - c_k),  u: the optimizer's direction
    at the end   c_k <- (w - w_k) / (K lr) - (c - c_k),  and the change of c_k is sent beside w_k

For plain SGD u is the gradient and this is the published algorithm. With AdamW, c_k is the mean direction that the
client's AdamW took, of the size of 1 whatever the size of the gradients. It must not be added to them, then: it would
drown them, and AdamW would follow the control variates alone (seen: the demo's model swings between two states).
"""

import numpy as np

from flex.federation.messages import Arrays

CONTROL_PREFIX = "c/"  # of their names: on the way, beside the shared state, and among the strategy's moments


def split_control(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(shared state, control variates by the names of what they belong to) of what a turn takes or gives; with another
    strategy the latter are none."""
    control = {n.removeprefix(CONTROL_PREFIX): a for n, a in arrays.items() if n.startswith(CONTROL_PREFIX)}
    return {n: a for n, a in arrays.items() if not n.startswith(CONTROL_PREFIX)}, control


def control_update(
    shared: Arrays, trained: Arrays, control: Arrays, own: Arrays, num_steps: int, learning_rate: float
) -> tuple[Arrays, Arrays]:
    """c_k after the client's last step.

    Args:
        shared, trained: the shared state as it came, and after the local steps.
        control: the server's c of this round.
        own: the client's c_k, from its personal file; empty before its first round (c_k = 0).
        num_steps, learning_rate: K and lr of this round.

    Returns:
        the new c_k, for the personal file; and what to send back beside `trained`, under the names it travels by.
    """
    new, change = {}, {}
    for name, c in control.items():
        c_k = own.get(name, np.zeros_like(c))
        gradient = (shared[name] - trained[name]) / (num_steps * learning_rate)  # the mean of the round's steps
        new[name] = np.asarray(gradient - (c - c_k), dtype=np.float32)
        change[CONTROL_PREFIX + name] = np.asarray(new[name] - c_k, dtype=np.float32)
    return new, change

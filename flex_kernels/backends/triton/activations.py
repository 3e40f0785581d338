"""The gated activations `a = act(z) * u` and their derivatives, in fp32, as Triton formulas.

Each activation is `act(z) = z p(z)`: silu has `p = sigmoid(z)`, gelu `p = Phi(z)`, gelu_tanh
`p = (1 + tanh(v)) / 2 = sigmoid(2 v)` with `v = sqrt(2/pi) (z + 0.044715 z^3)`. So `act'(z) = p + z p'`.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_TANH_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.07135481627159559)  # 2 sqrt(2 / pi) 0.044715


@triton.jit
def pass_through(z, ACTIVATION: tl.constexpr):
    """`p(z)`, the share of `z` that the activation lets through."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "activation must be silu, gelu or gelu_tanh")
        share = tl.sigmoid(z * (_TANH_LINEAR + _TANH_CUBIC * z * z))
    return share


@triton.jit
def activation_slope(z, share, ACTIVATION: tl.constexpr):
    """`act'(z) = p + z p'`, given `share = p(z)`."""
    if ACTIVATION == "silu":
        d_share = share * (1.0 - share)
    elif ACTIVATION == "gelu":
        d_share = tl.exp(-0.5 * z * z) * _INV_SQRT_TWO_PI
    else:
        d_share = share * (1.0 - share) * (_TANH_LINEAR + 3.0 * _TANH_CUBIC * z * z)
    return share + z * d_share

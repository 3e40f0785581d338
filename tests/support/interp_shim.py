"""What Triton's interpreter gets wrong in bfloat16, made right (Triton 3.6 to 3.9).

`TRITON_INTERPRET=1` runs a kernel in numpy, which has no bfloat16: the interpreter keeps such values as bit patterns in
uint16. Unmended, a `tl.dot` multiplies the patterns, arithmetic and comparisons act on them, and a cast from fp32 cuts
instead of rounding to nearest even: all silent. Here casts and dots are mended, and arithmetic is refused: a kernel of
this house upcasts right after the load, and one that forgets should fail, not be helped.

Smaller things: floating-point warnings of numpy are switched off inside a launch (a GPU gives infinity without a word,
and the tests turn warnings into errors); the interpreter prepares a device function once a launch, not at every call (a
third of the time); a comparison is an int1 in all versions (in 3.9, a scalar one joined to a block became int32); and
Triton 3.6 with numpy >= 2.4 learns `range` over a loaded number.

`install()` once, before the first launch. Compiled kernels are not touched.
"""

import functools

import numpy as np
import triton.language as tl


def float_to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns (uint16), rounding to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(np.shape(values)))


def bfloat16_bits_to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> fp32, exact."""
    wide = np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_mended", False):
        return
    builder._mended = True
    _mend_casts(builder, interpreter.TensorHandle)
    _mend_dot(builder, interpreter.TensorHandle)
    _mend_comparisons(builder)
    for name in ("binary_op", "unary_op"):
        _refuse_arithmetic(builder, name)
    for scan_or_reduce in (interpreter.ReduceOps, interpreter.ScanOps):
        _refuse_reductions(scan_or_reduce)
    _silence_and_speed_up(interpreter)
    _mend_index(interpreter)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _mend_casts(builder, handle_type) -> None:
    def mended(original, source, destination, *rest):
        from_bfloat16, to_bfloat16 = _is_bfloat16(source), destination.scalar == tl.bfloat16
        if from_bfloat16 and not to_bfloat16:
            source = handle_type(bfloat16_bits_to_float(source.data), tl.float32)
            return source if destination.scalar == tl.float32 else original(source, destination, *rest)
        if to_bfloat16 and not from_bfloat16:
            return handle_type(float_to_bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return original(source, destination, *rest)

    def get_bf16(self, value):
        return handle_type(float_to_bfloat16_bits(np.array([value], np.float32)), tl.bfloat16)

    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    builder.cast_impl = lambda self, *args: mended(functools.partial(cast, self), *args)
    builder.create_fp_to_fp = lambda self, *args: mended(functools.partial(fp_to_fp, self), *args)
    builder.get_bf16 = get_bf16


def _mend_dot(builder, handle_type) -> None:
    original = builder.create_dot

    def create_dot(self, a, b, accumulator, *rest):
        a, b = (handle_type(bfloat16_bits_to_float(h.data), tl.float32) if _is_bfloat16(h) else h for h in (a, b))
        return original(self, a, b, accumulator, *rest)

    builder.create_dot = create_dot


def _mend_comparisons(builder) -> None:
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
    original = builder.binary_op

    def binary_op(self, left, right, operation):
        result = original(self, left, right, operation)
        if operation in comparisons:
            result.dtype = tl.int1
        return result

    builder.binary_op = binary_op


def _refuse_arithmetic(builder, name: str) -> None:
    original = getattr(builder, name)

    def refusing(self, *args):
        if any(_is_bfloat16(handle) for handle in args[:-1]):
            raise TypeError(f"{args[-1].__name__} on bfloat16 inside a kernel: cast to tl.float32 right after the load")
        return original(self, *args)

    setattr(builder, name, refusing)


def _refuse_reductions(reduction) -> None:
    original = reduction.apply_impl

    def refusing(self, tensors):
        if any(tensor.dtype.scalar == tl.bfloat16 for tensor in tensors):
            raise TypeError("reduction of bfloat16 inside a kernel: cast to tl.float32 right after the load")
        return original(self, tensors)

    reduction.apply_impl = refusing


def _silence_and_speed_up(interpreter) -> None:
    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    prepared = set()  # device functions whose view of triton.language the running launch has already patched

    def quiet(self, *args, **kwargs):
        prepared.clear()
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def call_device_function(self, *args, **kwargs):
        if self.fn not in prepared:
            prepared.add(self.fn)
            patch_language(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet
    interpreter.InterpretedFunction.__call__ = call_device_function


def _mend_index(interpreter) -> None:
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch

"""Which form of a weight MatMulNBits runs fast, and which it does not.

The CPU kernels take 2, 4 and 8 bits in blocks of 16 … 256, but some combinations are dequantized anew on every call, 20
to 200 times slower and without a word.  Where another form is exact and fast, the weight is stored in that one:

    artifact            stored                     why
    3 bits              4 bits, zero points given  no 3-bit kernel (the session is refused)
    2 bits, group 16    4 bits, zero points given  2-bit block 16 is dequantized every call (measured 200x slower)
    2 bits, group 256   2 bits, block 128          the same for block 256; each scale stands twice
    whole row           block 256 (4 bits) or 128  1.31 refuses blocks over 256; the row's scale is repeated

With `kernels`, products run by roundexport's own operator (kernels/native/), which takes three bits as they are.

What stays slow whatever the form is reported, not changed: float32 activations (accuracy_level below 4), see `slow`.
The cliffs are the same on AVX2 and on AVX-512 with VNNI (min ms of K=2048, N=6144, one row, two threads):

    bits block acc    AVX2     AVX-512          bits block acc    AVX2     AVX-512
    4    32    4      0.27     0.13             8    128   4      0.40     0.24
    4    128   4      0.26     0.11             8    32    0      53.5     18.2 (block 128)
    4    16    4      0.75     0.28             2    64    4      0.20     0.09
    4    128   0      1.32     0.24             2    256   4      46.6     8.6

Source: onnxruntime 1.31.1, CPU provider, measured and checked against the exact product; float zero points and
``g_idx`` are slow or wrong there and are never written.  1.32.0 has the same cliffs (2 bits in blocks of 16 and 256; 2
and 8 bits at accuracy_level 0) and takes blocks over 256, which stay unwritten as long as 1.31 is supported.
"""

from __future__ import annotations

from dataclasses import dataclass

from roundexport.quant.spec import QuantSpec

# stored bits -> blocks with a fast kernel, the most wanted first
FAST_BLOCKS = {2: (128, 64, 32), 4: (256, 128, 64, 32, 16), 8: (128, 256, 64, 32, 16)}
OWN_BLOCK = 32
"""Blocks that roundexport's own operator takes are multiples of this."""


@dataclass(frozen=True)
class StoredForm:
    """The form of one weight in the graph.

    Args:
        bits: stored bits, 2, 4 or 8, and 3 for roundexport's own operator.
        block: weights along K that share a stored scale.
        zero_points: whether zero points are stored; absent ones mean ``2**(bits-1)``.
    """

    bits: int
    block: int
    zero_points: bool

    def describe(self) -> str:
        """Short name, as in the package manifest."""
        return f"{self.bits} bits, block {self.block}{', zero points' if self.zero_points else ''}"


def stored_form(spec: QuantSpec, in_features: int, kernels: bool = False) -> StoredForm:
    """The fastest form that holds a weight of this scheme exactly.

    Args:
        spec: the artifact's scheme.
        in_features: K.
        kernels: for roundexport's own operator.
    """
    if kernels and spec.bits == 3 and spec.group_size is not None and spec.group_size % OWN_BLOCK == 0:
        return StoredForm(3, spec.group_size, not spec.symmetric)
    bits = 4 if spec.bits == 3 or (spec.bits == 2 and spec.group_size == 16) else spec.bits
    return StoredForm(bits, _block(bits, spec.group_size, in_features), bits != spec.bits or not spec.symmetric)


def _block(bits: int, group_size: int | None, in_features: int) -> int:
    fast = FAST_BLOCKS[bits]
    if group_size is not None:
        return group_size if group_size in fast else next(block for block in fast if group_size % block == 0)
    return dividing_block(bits, in_features) or min((block for block in fast if block >= in_features), default=fast[0])


def dividing_block(bits: int, in_features: int) -> int | None:
    """The most wanted block of 32 and more that cuts a whole row into equal pieces; None: there is none."""
    return next((block for block in FAST_BLOCKS[bits] if block >= 32 and in_features % block == 0), None)


def slow(spec: QuantSpec, form: StoredForm, accuracy_level: int) -> str | None:
    """Why this weight will not run at full speed, or None."""
    if accuracy_level != 4:
        if form.bits == 4:
            return f"accuracy_level {accuracy_level} computes in float32: 2 to 5 times slower at one token"
        return (
            f"accuracy_level {accuracy_level} dequantizes {form.bits}-bit weights on every call: 40 to 250 times slower"
        )
    if form.block == 16:
        return "block 16 runs at about a third of the speed of block 32 and more"
    if form.bits > spec.bits:
        return f"{spec.bits}-bit codes are stored in {form.bits} bits, as there is no fast kernel for {spec.describe()}"
    return None

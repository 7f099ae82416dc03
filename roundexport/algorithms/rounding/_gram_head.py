"""lm_head in Gram space: rounded for the sums over what enters it in the float model; the method is told in gram.py.

An lm_head is rounded before the blocks, as the token embedding is, with which it often shares its weight.  So its
inputs are the float model's, and there is no repair of what the blocks lose.

In: H.  Out: a function that rounds some rows of the table.  Memory: 8·K² bytes while it is held, 16·K² while it is
made.  Limits: where an embedding shares the weight, its rows get what is best for the head; they are a sixth farther
from their floats than the nearest.
"""

from __future__ import annotations

from torch import Tensor

from roundexport.algorithms.common.error_compensation import raised
from roundexport.algorithms.common.latent_codes import pack
from roundexport.kernels import cholesky, gram_rounding
from roundexport.kernels.gram_rounding import Effort
from roundexport.quant.quantized_linear import QuantizedLinear
from roundexport.quant.spec import QuantSpec

from ._gram_weight import round_weight


class HeadRounder:
    """Rounds rows of a table for what enters it.

    Args:
        gram: H [K, K]; overwritten.
        damping: added to its diagonal, as a share of a usual input's size.
        effort: how far to go.
    """

    def __init__(self, gram: Tensor, damping: float, effort: Effort) -> None:
        damped = raised(gram, gram_rounding.usual_share(gram, damping), overwrite=True)
        self._problem, self._effort = {"gram": damped, "factor": cholesky.inverse_factor(damped)}, effort

    def __call__(self, weight: Tensor, spec: QuantSpec) -> QuantizedLinear:
        """Rows [n, K] of the table, rounded.

        Raises:
            SpecError: the group size does not divide K.
        """
        rows = round_weight(weight, spec, self._problem, self._effort)
        return pack(spec, rows.centered_codes(), rows.scale, rows.zero_point)

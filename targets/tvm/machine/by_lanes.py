"""Numbers by the lanes of a vector: rates, register blocks and parameters of instruction sets, as they were measured.

All of them hold for `f32`; another element type is another table beside it. The entries 16, 8 and 4 are AVX-512, AVX2
and 128-bit instructions of an Intel Xeon; NEON has registers of 4 lanes, 32 of them on AArch64 and 16 on ARMv7.
"""

from __future__ import annotations

from dvexport.targets.tvm.machine.dtype import F32, DType
from dvexport.targets.tvm.machine.rates import Parameters, Rates

__all__ = ["convolution_block", "estimate", "parameters", "product_block", "rates"]

_RATES = {
    F32: {
        16: Rates(
            call=2988.0,
            row=23.41,
            product=0.1257,
            point_product=0.1563,
            window_product=0.1496,
            loaded=0.3297,
            packed=0.8568,
            packed_short=0.2876,
            finished=2.639,
            written=0.0,
            residual=0.7792,
            weight=0.1837,
            line=15.33,
            tile_row=1.251,
            tile_product=0.1051,
            input2=2.435,
            input4=3.024,
            output2=0.8195,
            output4=2.626,
            source="measured on x86-64 with 16 lanes",
        ),
        8: Rates(
            call=1998.0,
            row=41.71,
            product=0.1353,
            point_product=0.146,
            window_product=0.1397,
            loaded=0.1282,
            packed=0.8538,
            packed_short=0.4376,
            finished=1.437,
            written=0.0,
            residual=0.6502,
            weight=0.1936,
            line=9.74,
            tile_row=0.7165,
            tile_product=0.114,
            input2=1.903,
            input4=1.945,
            output2=0.6417,
            output4=1.524,
            source="measured on x86-64 with 8 lanes",
        ),
        4: Rates(
            call=1832.0,
            row=46.37,
            product=0.1289,
            point_product=0.1221,
            window_product=0.1363,
            loaded=0.04685,
            packed=0.7369,
            packed_short=0.4696,
            finished=0.935,
            written=0.0,
            residual=0.5319,
            weight=0.188,
            line=8.992,
            tile_row=1.241,
            tile_product=0.1386,
            input2=1.171,
            input4=1.063,
            output2=0.4506,
            output4=0.723,
            source="measured on x86-64 with 4 lanes",
        ),
    },
}
"""By element type and lanes."""

_MEMORY = ("call", "row", "weight", "line", "tile_row")
"""Rates that are mostly waiting for memory, whose latency differs less between machines than their arithmetic."""

_CONVOLUTION_BLOCKS = {16: (8, 2), 8: (4, 3)}
_CONVOLUTION_BLOCKS_NEON = {True: (5, 4), False: (3, 3)}
"""Output channels x vectors of pixels by lanes; of NEON, by whether it is AArch64."""

_PRODUCT_BLOCKS = {16: (8, 3), 8: (4, 3)}
"""Rows x vectors of a matrix product by lanes: the sums and a panel's vectors fill the registers."""

_PARAMETERS = {
    # With more than six row addresses, x86-64 has no register left for the pixels of a third vector. Winograd's weights
    # are read once for every block: four vectors instead of two made ResNet-18 3 % faster, with gates up to 7 %.
    16: Parameters((8, 3), (6, 4), 8, 128, (8, 8, 8, 6), "measured on x86-64 with AVX-512"),
    8: Parameters((6, 2), (4, 3), 0, 128, (8, 6, 4), "measured on x86-64 with AVX2"),
}
_PARAMETERS_NEON = {
    True: Parameters((5, 4), (5, 4), 0, 128, (12, 8, 6, 6), "as many sums as the 32 registers of AArch64 hold"),
    False: Parameters((3, 3), (3, 3), 0, 128, (6, 4, 3), "as many sums as the 16 registers of ARMv7 hold"),
}


def rates(lanes: int, dtype: DType = F32) -> Rates:
    """Return what was measured on x86-64 with so many lanes, or with the fewest."""
    known = _RATES[dtype]
    return known.get(lanes, known[min(known)])


def estimate(lanes: int, gflops: float, dtype: DType = F32) -> Rates:
    """Return rates for a processor that nobody measured: those of x86-64 with so many lanes, its arithmetic scaled.

    Args:
        lanes: values of a vector.
        gflops: what one core reaches; a multiply-accumulate counts two.
        dtype: the type of the values.
    """
    known = rates(lanes, dtype)
    speed = 2 * lanes / gflops / known.product
    values = {name: value * (1 if name in _MEMORY else speed) for name, value in known.values().items()}
    return Rates(**values, source=f"estimated: x86-64 with {lanes} lanes, scaled to {gflops:g} GFLOP/s a core")


def convolution_block(lanes: int, is_aarch64: bool) -> tuple[int, int]:
    """Return output channels x vectors of the register block of a convolution."""
    return _CONVOLUTION_BLOCKS.get(lanes) or _CONVOLUTION_BLOCKS_NEON[is_aarch64]


def product_block(lanes: int) -> tuple[int, int] | None:
    """Return rows x vectors of the register block of a matrix product; None: that of a convolution."""
    return _PRODUCT_BLOCKS.get(lanes)


def parameters(lanes: int, is_aarch64: bool) -> Parameters:
    """Return the parameters of an instruction set."""
    return _PARAMETERS.get(lanes) or _PARAMETERS_NEON[is_aarch64]

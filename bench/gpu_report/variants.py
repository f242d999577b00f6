"""Every kernel with every dtype and flag that is reported, launched as `lioncub.kernels.triton_gpu` launches it.

A new kernel needs one more `Variant` in `float_variants` or in `word_variants`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

BLOCK_SIZE, ROW_THREADS, WIDE_THREADS = 1024, 128, 256
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# parameters, gradients, and the momentum where it differs from them
DTYPES = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "fp16": ("fp16", "fp16"), "mixed": ("bf16", "fp32")}
# numbers of `lioncub.kernels.triton_gpu.launch`
KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "u8": 3}
# what every list kernel is given
TABLES = {"rows_ptr": "i64", "owners_ptr": "i32", "nonfinite_ptr": "i32", "active_ptr": "i32"}
# bytes of a one-bit code
CODE = 1 / 8
# why threads exchange values
IN_CUT_TILES = "only in tiles that are cut or not aligned, to store elements side by side"
IN_NORMS = "norms are summed over a tile"


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled and launched, and what it must move.

    Attributes:
        label: what it does; with ``dtype`` it is unique.
        dtype: of the data, a name of `DTYPES`, or "codes" where all of it is packed.
        kernel: the Triton function.
        pointers: what each pointer argument points to.
        constants: values of the constexpr arguments.
        reads, writes: bytes per element of each tensor that all threads have a share in.
        threads: of a program.
        elements: of a program; an element is a parameter's, or a code of one voter.
        aside: bytes per element that few threads write: a norm per block, a partial sum per program.
        exchanges: why threads must exchange values; empty where none need to.
    """

    label: str
    dtype: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, object]
    reads: tuple[float, ...]
    writes: tuple[float, ...]
    threads: int = ROW_THREADS
    elements: int = BLOCK_SIZE
    exchanges: str = ""
    aside: float = 0

    @property
    def bytes_per_element(self) -> float:
        """The least that must be moved: each tensor once in each direction that it is needed."""
        return sum(self.reads) + sum(self.writes) + self.aside

    @property
    def loaded_bytes(self) -> int:
        """The least that each thread loads, in whole bytes."""
        return sum(bits // 8 * number for bits, number in self.widths(self.reads).items())

    @property
    def stored_bytes(self) -> int:
        """The least that each thread stores, in whole bytes."""
        return sum(bits // 8 * number for bits, number in self.widths(self.writes).items())

    def widths(self, tensors: tuple[float, ...]) -> dict[int, int]:
        """The fewest accesses of a thread by bits, where its share of each tensor is in one piece."""
        found: dict[int, int] = {}
        for n_bytes in tensors:
            share = 8 * n_bytes * self.elements / self.threads
            bits = 128 if share >= 128 else max(round(share), 8)
            found[bits] = found.get(bits, 0) + max(round(share / 128), 1)
        return found


def all_variants() -> list[Variant]:
    """All that the report has, in its order."""
    from gpu_report.word_variants import word_variants

    return [*(variant for dtype in DTYPES for variant in float_variants(dtype)), *word_variants()]


def float_variants(dtype: str) -> list[Variant]:
    """Kernels that read or write data of a float dtype."""
    lion = _lion_variants(dtype)
    if dtype == "mixed":
        return lion
    return [*lion, *_sign_variants(dtype), *_level_variants(dtype), *_scale_variants(dtype)]


def _lion_variants(dtype: str) -> list[Variant]:
    """Encode, apply and step."""
    from lioncub.kernels.triton_gpu import lion, signs

    data, momentum = DTYPES[dtype]
    d, m = BYTES[data], BYTES[momentum]
    flags = {"BLOCK_SIZE": BLOCK_SIZE, "HAS_FLAGS": True}
    of_encode = {**flags, "KINDS": (_kinds(momentum, data, "u8"),), "IS_UPDATE": True, "ADVANCE": False}
    encode = Variant("encode", dtype, signs._encode_signs_kernel, TABLES, of_encode, (m, d), (CODE,))
    advancing = replace(encode, label="encode_", constants={**of_encode, "ADVANCE": True}, writes=(CODE, m))
    # never read unless the momentum advances
    alone = {**flags, "KINDS": (_kinds(data, "u8", data, data),), "ADVANCE": False, "ROUNDING": lion.NEAREST, "BITS": 1}
    apply = Variant("apply", dtype, lion._apply_codes_kernel, TABLES, alone, (CODE, d), (d,), _threads(data))
    apply = replace(apply, exchanges=IN_CUT_TILES)
    moving = replace(apply, label="apply with momentum", threads=_threads(data, momentum))
    moving = replace(moving, constants={**alone, "KINDS": (_kinds(data, "u8", data, momentum),), "ADVANCE": True})
    moving = replace(moving, reads=(CODE, d, m, d), writes=(m, d))
    of_step = {**flags, "KINDS": (_kinds(data, data, momentum),), "ROUNDING": lion.NEAREST}
    step = replace(moving, label="step", kernel=lion._step_lion_kernel, constants=of_step)
    step = replace(step, reads=(d, d, m), writes=(d, m))
    two = {**moving.constants, "BITS": 2}
    found = [encode, advancing, moving, step]
    found.append(replace(moving, label="apply 2-bit codes with momentum", constants=two, reads=(2 * CODE, d, m, d)))
    if dtype != "mixed":
        found.append(apply)
        for bits in (2, 16):
            coded = replace(apply, label=f"apply {bits}-bit codes", constants={**alone, "BITS": bits})
            found.append(replace(coded, reads=(bits * CODE, d)))
    if dtype != "fp32":
        rounded = {"ROUNDING": lion.PARAM_AND_MOMENTUM}
        found += [
            replace(v, label=f"{v.label}, rounded stochastically", constants={**v.constants, **rounded})
            for v in (moving, step)
        ]
    return found


def _sign_variants(dtype: str) -> list[Variant]:
    from lioncub.kernels.triton_gpu import signs

    d, flags = BYTES[dtype], {"BLOCK_SIZE": BLOCK_SIZE}
    packing = {
        **flags,
        "KINDS": (_kinds(dtype, dtype, "u8"),),
        "HAS_FLAGS": False,
        "IS_UPDATE": False,
        "ADVANCE": False,
    }
    unpacked = {"packed_ptr": "u8", "out_ptr": dtype}
    return [
        Variant("pack", dtype, signs._encode_signs_kernel, TABLES, packing, (d,), (CODE,)),
        Variant("unpack", dtype, signs._unpack_signs_kernel, unpacked, flags, (CODE,), (d,), _threads(dtype)),
    ]


def _level_variants(dtype: str) -> list[Variant]:
    """Quantization: levels of the update, and back."""
    from lioncub.kernels.triton_gpu import quantization

    d, floats = BYTES[dtype], {"packed_ptr": "u8", "scale_ptr": "fp32", "out_ptr": dtype}
    flags: dict[str, object] = {"BLOCK_SIZE": BLOCK_SIZE, "SCALE_BLOCK": 0, "BITS": 2}
    updates = {**flags, "KINDS": (_kinds(dtype, dtype, "fp32", "u8"),), "HAS_FLAGS": True, "IS_UPDATE": True}
    updates |= {"STOCHASTIC": True}
    plain = {**updates, "STOCHASTIC": False}
    quantize = Variant("quantize", dtype, quantization._quantize_values_kernel, TABLES, updates, (d, d), (2 * CODE,))
    quantize = replace(quantize, exchanges=IN_CUT_TILES)
    back = Variant("dequantize", dtype, quantization._dequantize_codes_kernel, floats, flags, (2 * CODE,), (d,))
    return [
        quantize,
        replace(quantize, label="quantize to nearest", constants=plain),
        replace(quantize, label="quantize to 8 bits", constants={**plain, "BITS": 8}, writes=(1,)),
        replace(back, threads=_threads(dtype)),
    ]


def _scale_variants(dtype: str) -> list[Variant]:
    """Norms of the update, of blocks and of tiles."""
    from lioncub.kernels.triton_gpu import scales

    d, tables = BYTES[dtype], {**TABLES, "partial_ptr": "fp64"}
    flags: dict[str, object] = {"BLOCK_SIZE": BLOCK_SIZE, "IS_UPDATE": True, "NORM": "l1", "SCALE_BLOCK": 64}
    flags |= {"KINDS": (_kinds(dtype, dtype, "fp32"),), "HAS_PARTIAL": False}
    blocks = Variant("scale of blocks", dtype, scales._scale_blocks_kernel, tables, flags, (d, d), ())
    blocks = replace(blocks, exchanges=IN_NORMS, aside=4 / 64)
    of_tiles = {**flags, "SCALE_BLOCK": 0, "HAS_PARTIAL": True}
    tiles = replace(blocks, label="scale of tiles", constants=of_tiles, aside=8 / BLOCK_SIZE)
    largest = replace(tiles, label="scale of tiles, linf", constants={**of_tiles, "NORM": "linf"}, aside=4 / BLOCK_SIZE)
    return [blocks, tiles, replace(largest, pointers={**TABLES, "partial_ptr": "i32"})]


def _kinds(*dtypes: str) -> tuple[int, ...]:
    """The dtypes of a table's lists, as the kernels are told them."""
    return tuple(KINDS[dtype] for dtype in dtypes)


def _threads(*dtypes: str) -> int:
    """`lioncub.kernels.triton_gpu.launch.elementwise_threads`."""
    return WIDE_THREADS if "fp32" in dtypes else ROW_THREADS

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
# numbers of `lioncub.kernels.triton_gpu.tables`
KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "u8": 3}
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
    lion = [*_lion_variants(dtype), *_list_variants(dtype)]
    if dtype == "mixed":
        return lion
    return [*lion, *_sign_variants(dtype), *_level_variants(dtype), *_scale_variants(dtype)]


def _lion_variants(dtype: str) -> list[Variant]:
    """Encode, apply and step, of one tensor."""
    from lioncub.kernels.triton_gpu import codes, lion
    from lioncub.kernels.triton_gpu.random_rows import NEAREST, PARAM_AND_MOMENTUM

    data, momentum = DTYPES[dtype]
    d, m = BYTES[data], BYTES[momentum]
    pointers = {**_pointers(dtype), "out_ptr": "u8"}
    flags = {"BLOCK_SIZE": BLOCK_SIZE, "HAS_STATUS": True, "ADVANCE": False, "HAS_GATE": False, "ROUNDING": NEAREST}
    advance = {**flags, "ADVANCE": True}
    encode = Variant("encode", dtype, lion._encode_update_kernel, pointers, flags, (m, d), (CODE,))
    apply = Variant("apply", dtype, lion._apply_votes_kernel, pointers, flags, (CODE, d), (d,), _threads(data))
    moving = replace(apply, label="apply with momentum", constants=advance, threads=_threads(data, momentum))
    moving = replace(moving, reads=(CODE, d, m, d), writes=(m, d))
    step = replace(moving, label="step", kernel=lion._step_lion_kernel, reads=(d, d, m), writes=(d, m))
    found = [encode, replace(encode, label="encode_", constants=advance, writes=(CODE, m)), moving, step]
    two = replace(moving, label="apply 2-bit codes with momentum", kernel=codes._apply_codes_kernel)
    found.append(replace(two, constants={**advance, "BITS": 2}, reads=(2 * CODE, d, m, d)))
    if dtype != "mixed":
        found.append(apply)
        for bits in (2, 16):
            coded = replace(apply, label=f"apply {bits}-bit codes", kernel=codes._apply_codes_kernel)
            found.append(replace(coded, constants={**flags, "BITS": bits}, reads=(bits * CODE, d)))
    if dtype != "fp32":
        rounded = {**advance, "ROUNDING": PARAM_AND_MOMENTUM}
        found += [replace(v, label=f"{v.label}, rounded stochastically", constants=rounded) for v in (moving, step)]
    return found


def _list_variants(dtype: str) -> list[Variant]:
    """The same for lists of tensors, whose tiles find their addresses in a table."""
    from lioncub.kernels.triton_gpu import codes, lion_lists

    plain = {variant.label: variant for variant in _lion_variants(dtype)}
    data, momentum = (KINDS[name] for name in DTYPES[dtype])
    pointers = {"rows_ptr": "i64", "owners_ptr": "i32", "status_ptr": "i32", "gate_ptr": "i32"}
    four, three = (data, KINDS["u8"], data, momentum), (data, data, momentum)
    chosen = [
        ("encode a list", "encode", lion_lists._encode_updates_kernel, (momentum, data, KINDS["u8"])),
        ("apply to a list", "apply with momentum", lion_lists._apply_all_votes_kernel, four),
        ("step of a list", "step", lion_lists._step_all_kernel, three),
        ("apply 2-bit codes to a list", "apply 2-bit codes with momentum", codes._apply_all_codes_kernel, four),
    ]
    found = []
    for label, like, kernel, kinds in chosen:
        constants = {**plain[like].constants, "HAS_GATE": True, "KINDS": (kinds,)}
        same = replace(plain[like], label=label, kernel=kernel, pointers=pointers, constants=constants)
        found.append(same if like == "encode" else replace(same, exchanges=IN_CUT_TILES))
    return found


def _sign_variants(dtype: str) -> list[Variant]:
    from lioncub.kernels.triton_gpu import packing

    d, flags, pointers = BYTES[dtype], {"BLOCK_SIZE": BLOCK_SIZE}, _pointers(dtype)
    packed, unpacked = {**pointers, "out_ptr": "u8"}, {**pointers, "out_ptr": dtype}
    return [
        Variant("pack", dtype, packing._pack_signs_kernel, packed, flags, (d,), (CODE,)),
        Variant("unpack", dtype, packing._unpack_signs_kernel, unpacked, flags, (CODE,), (d,), _threads(dtype)),
    ]


def _level_variants(dtype: str) -> list[Variant]:
    """Quantization: levels of the update, and back."""
    from lioncub.kernels.triton_gpu import quantization

    d, codes, floats = BYTES[dtype], {**_pointers(dtype), "out_ptr": "u8"}, {**_pointers(dtype), "out_ptr": dtype}
    flags = {"BLOCK_SIZE": BLOCK_SIZE, "HAS_STATUS": True, "IS_UPDATE": True, "STOCHASTIC": True, "SCALE_BLOCK": 0}
    flags["BITS"] = 2
    plain = {**flags, "STOCHASTIC": False}
    quantize = Variant("quantize", dtype, quantization._quantize_values_kernel, codes, flags, (d, d), (2 * CODE,))
    back = Variant("dequantize", dtype, quantization._dequantize_codes_kernel, floats, flags, (2 * CODE,), (d,))
    listed = {**flags, "KINDS": ((KINDS[dtype], KINDS[dtype], KINDS["fp32"], KINDS["u8"]),)}
    tables = {"rows_ptr": "i64", "owners_ptr": "i32", "status_ptr": "i32"}
    of_list = replace(quantize, label="quantize a list", kernel=quantization._quantize_updates_kernel)
    return [
        quantize,
        replace(of_list, pointers=tables, constants=listed, exchanges=IN_CUT_TILES),
        replace(quantize, label="quantize to nearest", constants=plain),
        replace(quantize, label="quantize to 8 bits", constants={**plain, "BITS": 8}, writes=(1,)),
        replace(back, threads=_threads(dtype)),
    ]


def _scale_variants(dtype: str) -> list[Variant]:
    """Norms of the update, of blocks and of chunks of tiles."""
    from lioncub.kernels.triton_gpu import scales

    d, pointers, chunk = BYTES[dtype], _pointers(dtype), 16 * BLOCK_SIZE
    flags = {"BLOCK_SIZE": BLOCK_SIZE, "IS_UPDATE": True, "NORM": "l1", "SCALE_BLOCK": 64}
    blocks = Variant("scale of blocks", dtype, scales._scale_blocks_kernel, pointers, flags, (d, d), ())
    blocks = replace(blocks, exchanges=IN_NORMS, aside=4 / 64)
    chunks = replace(blocks, label="scale of chunks", kernel=scales._reduce_chunks_kernel)
    chunks = replace(chunks, elements=chunk, aside=8 / chunk)
    largest = replace(chunks, label="scale of chunks, linf", constants={**flags, "NORM": "linf"})
    tables = {"rows_ptr": "i64", "owners_ptr": "i32", "partial_ptr": "fp64"}
    listed = {**flags, "KINDS": ((KINDS[dtype], KINDS[dtype], KINDS["fp32"]),), "SCALE_BLOCK": 0}
    tiles = replace(blocks, label="scale of tiles of a list", kernel=scales._scale_updates_kernel, aside=8 / BLOCK_SIZE)
    tiles = replace(tiles, pointers=tables, constants=listed)
    return [blocks, tiles, chunks, replace(largest, pointers={**pointers, "partial_ptr": "i32"}, aside=4 / chunk)]


def _pointers(dtype: str) -> dict[str, str]:
    data, momentum = DTYPES[dtype]
    pointers = dict.fromkeys(("param_ptr", "grad_ptr", "x_ptr"), data) | {"exp_avg_ptr": momentum}
    pointers |= {"packed_ptr": "u8", "scale_ptr": "fp32", "partial_ptr": "fp64"}
    return pointers | {"status_ptr": "i32", "gate_ptr": "i32"}


def _threads(*dtypes: str) -> int:
    """`lioncub.kernels.triton_gpu.launch.elementwise_threads`."""
    return WIDE_THREADS if "fp32" in dtypes else ROW_THREADS

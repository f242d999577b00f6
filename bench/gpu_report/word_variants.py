"""Kernels whose data is all packed: votes, counts, fields and their sums."""

from __future__ import annotations

from dataclasses import replace

from gpu_report.variants import BLOCK_SIZE, CODE, IN_NORMS, ROW_THREADS, Variant

# voters of a vote, rows of a sum, and groups of counts whose planes are summed
VOTERS, GROUPS = 8, 2
# words of a tile of 128 bits per thread
WORDS = 4 * ROW_THREADS


def word_variants() -> list[Variant]:
    """All of them; what is voted on has no dtype."""
    return [*_vote_variants(), *_field_variants(), *_sum_variants(), _combining_variant()]


def _vote_variants() -> list[Variant]:
    from lioncub.kernels.triton_gpu import vote

    pointers = dict.fromkeys(("packed_ptr", "planes_ptr", "out_ptr"), "i32") | {"counts_ptr": "i64"}
    flags = {"PLANES": VOTERS.bit_length(), "HAS_COUNTS": False, "UNIT": 4, "BLOCK_SIZE": WORDS}
    voting = Variant("vote", "codes", vote._vote_majority_kernel, pointers, flags, (CODE,) * VOTERS, (CODE,))
    voting = replace(voting, elements=32 * WORDS)
    tally = replace(voting, label="vote with counts", constants={**flags, "HAS_COUNTS": True})
    counting = replace(voting, label="count", kernel=vote._count_votes_kernel, writes=(CODE,) * VOTERS.bit_length())
    # two groups of up to 7 voters: planes for 14
    planes = {**flags, "GROUP_PLANES": 3, "PLANES": 4}
    summing = replace(voting, label="sum counts", kernel=vote._sum_counts_kernel, constants=planes)
    return [
        voting,
        replace(tally, exchanges="numbers of ties and of unanimous codes are summed over a tile"),
        counting,
        replace(summing, reads=(CODE,) * 3 * GROUPS),
    ]


def _field_variants() -> list[Variant]:
    from lioncub.kernels.triton_gpu import fields

    words = {"packed_ptr": "u8", "fields_ptr": "i32", "out_ptr": "i32", "counts_ptr": "i64"}
    found = []
    for bits, field_bits in ((1, 2), (1, 4), (1, 8), (1, 16), (4, 8)):
        flags = {"BITS": bits, "FIELD_BITS": field_bits, "BLOCK_SIZE": ROW_THREADS}
        label, moved = f"spread {bits} to {field_bits}", ((bits * CODE,), (field_bits * CODE,))
        variant = Variant(label, "codes", fields._spread_codes_kernel, words, flags, *moved)
        found.append(replace(variant, elements=WORDS * 32 // field_bits))
    for bits in (1, 2, 4, 8, 16):
        flags = {"FIELD_BITS": bits, "HAS_COUNTS": False, "BLOCK_SIZE": ROW_THREADS}
        label, pointers, moved = f"vote on {bits}-bit fields", {**words, "out_ptr": "u8"}, ((bits * CODE,), (CODE,))
        variant = Variant(label, "codes", fields._vote_fields_kernel, pointers, flags, *moved)
        found.append(replace(variant, elements=WORDS * 32 // bits))
    return found


def _sum_variants() -> list[Variant]:
    from lioncub.kernels.triton_gpu import fields

    found = []
    for bits, field_bits in ((1, 16), (2, 4), (4, 4), (8, 16)):
        pointers = {"packed_ptr": "i32" if bits == field_bits else "u8", "out_ptr": "i32"}
        flags = {"BITS": bits, "FIELD_BITS": field_bits, "BLOCK_SIZE": ROW_THREADS}
        label, moved = f"add {bits}-bit codes in {field_bits}", ((bits * CODE,) * VOTERS, (field_bits * CODE,))
        variant = Variant(label, "codes", fields._add_codes_kernel, pointers, flags, *moved)
        exchanges = "a byte of codes is spread over the words of several threads" if bits == 1 else ""
        found.append(replace(variant, elements=WORDS * 32 // field_bits, exchanges=exchanges))
    for bits in (4, 16):
        pointers = {"fields_ptr": "u8", "out_ptr": "u8", "counts_ptr": "i64"}
        flags = {"FIELD_BITS": bits, "HAS_COUNTS": False, "BLOCK_SIZE": BLOCK_SIZE}
        label, moved = f"signs of {bits}-bit fields", ((bits * CODE,), (2 * CODE,))
        variant = Variant(label, "codes", fields._sign_fields_kernel, pointers, flags, *moved)
        exchanges = "" if bits == 16 else "fields are loaded by other threads than pack the codes"
        found.append(replace(variant, exchanges=exchanges))
    return found


def _combining_variant() -> Variant:
    """Partial norms of tiles to the norms of whole tensors; an element is a tile's."""
    from lioncub.kernels.triton_gpu import scales

    pointers, flags = {"rows_ptr": "i64", "partial_ptr": "fp64"}, {"NORM": "l1", "TILES": BLOCK_SIZE}
    flags |= {"BLOCK_SIZE": BLOCK_SIZE}
    variant = Variant("scale from tiles", "codes", scales._combine_tiles_kernel, pointers, flags, (8,), ())
    return replace(variant, exchanges=IN_NORMS, aside=4 / BLOCK_SIZE)

"""The order in which kernels read codes: one mask takes two codes out of a word.

A row is cut into chunks of 32 inputs, b words of 32 bits for b-bit codes. The codes of a
pair of neighbouring inputs lie 16 bits apart, so that a mask leaves one code in each half of a
word; an OR with a power of two makes each half a float16. At 3 bits, five pairs leave bits 15
and 31 of each word unused; these bits of the three words hold the sixteenth pair. Ternary codes
take two bits here; a file packs five of them into a byte.

    pair p of a chunk, 1, 2, 4 bits:  word p / (16/b), bits b·(p mod 16/b) and 16 more
                       3 bits, p < 15: word p / 5, bits 3·(p mod 5) and 16 more

Codes are brought into this order when a model is loaded on a GPU, some rows at a time.
"""

import mlx.core as mx

from mlxquant.codes.packing import unpack_codes
from mlxquant.codes.width import Width

CHUNK = 32  # inputs
# Rows are padded to a multiple of so many inputs, by width: 16 bytes of codes, at 3 bits 12.
RUN = {1: 128, 2: 64, 3: 32, 4: 32}
_AT_ONCE = 1 << 24  # codes that are held unpacked

DECODE = """
template <int BITS>
FUNCTION uint pair_word(const THREAD uint* words, int pair) {
    if (BITS == 3 && pair == 15)
        return ((words[0] >> 15) & 0x00010001u) | ((words[1] >> 14) & 0x00020002u)
            | ((words[2] >> 13) & 0x00040004u);
    return words[BITS == 3 ? pair / 5 : pair / (16 / BITS)];
}
FUNCTION int pair_shift(int bits, int pair) {
    return bits == 3 ? (pair == 15 ? 0 : 3 * (pair % 5)) : bits * (pair % (16 / bits));
}
// Codes are masked where they lie into the mantissas of two float16; one shift serves all of a word
// that lie above.
FUNCTION int pair_at(int bits, int pair) {
    const int shift = pair_shift(bits, pair);
    return shift + bits > 10 ? shift - 6 : shift;
}
// What the floats of pair p are larger by than the levels, from 0.5 · (1 − count) up.
FUNCTION float pair_offset(int bits, int levels, int pair) {
    return float(1 << (10 - pair_at(bits, pair))) + 0.5f * float(levels - 1);
}
// Pair p of a chunk as floats, ``mask`` the lowest BITS of both halves: an AND, an OR, and what it
// takes to read a float16 as a float, on Apple's GPUs nothing.
template <int BITS>
FUNCTION float2 pair_floats(const THREAD uint* words, int pair, uint mask) {
    const uint at = uint(pair_at(BITS, pair)), power = (25u - at) << 10;
    const uint word = pair_word<BITS>(words, pair);
    const uint moved = pair_shift(BITS, pair) + BITS > 10 ? word >> 6 : word;
    return floats_of_halves((moved & (mask << at)) | (power | power << 16));
}
"""


def offsets(bits: Width) -> mx.array:
    """By how much a kernel's decoded floats exceed their levels: (32,), one for each input."""
    made = []
    for pair in range(CHUNK // 2):
        inside = 5 if bits.code_bits == 3 else 16 // bits.code_bits
        shift = 0 if pair == 15 and inside == 5 else bits.code_bits * (pair % inside)
        at = shift - 6 if shift + bits.code_bits > 10 else shift
        made += 2 * [2.0 ** (10 - at) + 0.5 * (bits.levels - 1)]
    return mx.array(made)


def reorder(packed: mx.array, bits: Width, columns: int) -> mx.array:
    """Codes as they lie in a file, (rows, …), in the kernels' order: (rows, chunks, b) uint32."""
    step = max(1, _AT_ONCE // columns)
    parts = []
    for start in range(0, len(packed), step):
        codes = unpack_codes(packed[start:start + step], bits, columns)
        parts.append(pack(codes, bits.code_bits))
        mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def row_bytes(bits: Width, columns: int) -> int:
    """Bytes of a row of codes in the kernels' order."""
    return bits.code_bits * (columns + -columns % RUN[bits.code_bits]) // 8


def pack(codes: mx.array, width: int) -> mx.array:
    """Codes (rows, columns) of ``width`` bits in the kernels' order; rows end in codes of 0."""
    rows, columns = codes.shape
    codes = mx.pad(codes, [(0, 0), (0, -columns % RUN[width])]).astype(mx.uint32)
    pairs = codes.reshape(rows, -1, CHUNK // 2, 2)
    pairs = pairs[..., 0] | pairs[..., 1] << 16
    inside = 5 if width == 3 else 16 // width
    shifts = width * mx.arange(inside, dtype=mx.uint32)
    words = pairs[..., :inside * width].reshape(rows, -1, width, inside) << shifts
    words = words.sum(-1).astype(mx.uint32)
    if width == 3:
        bits = mx.arange(3, dtype=mx.uint32)
        words = words | ((pairs[..., 15:] >> bits) & 0x00010001) << 15
    return words


def unpack(words: mx.array, columns: int) -> mx.array:
    """The inverse of ``pack``: codes (rows, columns) as uint8."""
    rows, _, width = words.shape
    inside = 5 if width == 3 else 16 // width
    shifts = width * mx.arange(inside, dtype=mx.uint32)
    mask = (1 << width) - 1
    low = (words[..., None] >> shifts).reshape(rows, words.shape[1], -1) & mask
    high = (words[..., None] >> shifts + 16).reshape(rows, words.shape[1], -1) & mask
    pairs = low | high << 16
    if width == 3:
        bits = mx.arange(3, dtype=mx.uint32)
        last = (((words >> 15) & 0x00010001) << bits).sum(-1, keepdims=True).astype(mx.uint32)
        pairs = mx.concatenate([pairs, last], axis=-1)
    codes = mx.stack([pairs & 0xFFFF, pairs >> 16], axis=-1).astype(mx.uint8)
    return codes.reshape(rows, -1)[:, :columns]

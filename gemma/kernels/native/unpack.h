// SPDX-License-Identifier: Apache-2.0
// Blocks of every packed integer type as 32 small integers and their factors; layouts are those of gemma/quants.py.
//
// A Format names a type's blocks. `codes` gives 32 consecutive weights as bytes, signed or not; `split` widens bytes to
// int16 in "split order": the 16 even ones, then the 16 odd ones, which costs a mask and a shift instead of shuffles.
// Activations are kept in the same order. In both, the first 8 of each 16 belong to the first half of the block, so types
// with a scale for every 16 weights need no other order. `factors` gives the floats: value = code * scale - minimum.
#pragma once

namespace gk::GK_NS {

struct Codes {  // 32 bytes, in order
  du part[kParts];
};
struct Split {  // 32 int16 in split order: part[0 .. kParts) even, then odd
  dh part[2 * kParts];
};

GK_INLINE Codes bytes32(const uint8_t* p) {
  Codes c;
  for (int i = 0; i < kParts; ++i) c.part[i] = load<du>(p + i * kLanes * 4);
  return c;
}
template <bool Signed>
GK_INLINE Split split(Codes c) {
  Split s;
  for (int i = 0; i < kParts; ++i) {
    if constexpr (Signed) {
      s.part[i] = (dh)(c.part[i] << 8) >> 8;
      s.part[kParts + i] = (dh)c.part[i] >> 8;
    } else {
      s.part[i] = (dh)(c.part[i] & 0x00FF);
      s.part[kParts + i] = (dh)(c.part[i] >> 8);
    }
  }
  return s;
}
GK_INLINE uint16_t both(int byte) { return (uint16_t)(byte * 0x0101); }

// 16 bytes whose low nibbles are the first 16 weights and whose high ones the other 16.
GK_INLINE Codes nibbles16(const uint8_t* p) {
  Codes c;
#if defined(GK_AVX2) || defined(GK_AVX512)
  __m128i v = _mm_loadu_si128((const __m128i*)p);
  c.part[0] = (du)_mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1) & both(15);
#else
  c.part[0] = load<du>(p);
  c.part[1] = (c.part[0] >> 4) & both(15);
  c.part[0] &= both(15);
#endif
  return c;
}
// 0xFF where a bit of the 32 is set, in order.
GK_INLINE Codes spread_bits(const uint8_t* p) {
  Codes c;
#if defined(GK_AVX2) || defined(GK_AVX512)
  const __m256i where = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(p)), where);
  c.part[0] = (du)_mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit);
#else
  typedef uint8_t b16 __attribute__((vector_size(16)));
  const b16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  for (int i = 0; i < 2; ++i) {
    uint64_t two[2] = {p[2 * i] * 0x0101010101010101u, p[2 * i + 1] * 0x0101010101010101u};
    c.part[i] = (du)((load<b16>(two) & bit) == bit);
  }
#endif
  return c;
}

#define GK_EACH for (int i = 0; i < kParts; ++i)

struct BlockQ8_0 {
  static constexpr int kElements = 32, kBytes = 34, kWidth = 32;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int) { return bytes32(b + 2); }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float*) { scale[0] = half_to_float(b); }
};
struct BlockInt8 {
  static constexpr int kElements = 32, kBytes = 32, kWidth = 32;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = true;
  GK_INLINE Codes codes(const uint8_t* b, int) { return bytes32(b); }
  GK_INLINE void factors(const uint8_t*, float row, float* scale, float*) { scale[0] = row; }
};
template <int Offset>  // of the codes: INT4 has no factor of its own
struct BlockNibble {
  static constexpr int kElements = 32, kBytes = 16 + Offset, kWidth = 32;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = Offset == 0;
  GK_INLINE Codes codes(const uint8_t* b, int) {
    Codes c = nibbles16(b + Offset);
    // q - 8 as a signed byte: flip bit 3, then extend it: (q ^ 8) - 8 never borrows across bytes when done as below
    GK_EACH {
      du flipped = c.part[i] ^ both(8);
      c.part[i] = flipped | ((flipped & both(8)) * 0x1E);  // bit 3 into bits 4..7 (8 * 30 = 240)
    }
    return c;
  }
  GK_INLINE void factors(const uint8_t* b, float row, float* scale, float*) {
    scale[0] = Offset ? half_to_float(b) : row;
  }
};
using BlockQ4_0 = BlockNibble<2>;
using BlockInt4 = BlockNibble<0>;
struct BlockQ4_1 {
  static constexpr int kElements = 32, kBytes = 20, kWidth = 32;
  static constexpr bool kSigned = false, kMinimum = true, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int) { return nibbles16(b + 4); }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    scale[0] = half_to_float(b), minimum[0] = -half_to_float(b + 2);
  }
};
struct BlockQ5_0 {
  static constexpr int kElements = 32, kBytes = 22, kWidth = 32;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int) {
    Codes c = nibbles16(b + 6), set = spread_bits(b + 2);
    GK_EACH c.part[i] |= ~set.part[i] & both(0xF0);  // q - 16 where the fifth bit is clear
    return c;
  }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float*) { scale[0] = half_to_float(b); }
};
struct BlockQ5_1 {
  static constexpr int kElements = 32, kBytes = 24, kWidth = 32;
  static constexpr bool kSigned = false, kMinimum = true, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int) {
    Codes c = nibbles16(b + 8), set = spread_bits(b + 4);
    GK_EACH c.part[i] |= set.part[i] & both(0x10);
    return c;
  }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    scale[0] = half_to_float(b), minimum[0] = -half_to_float(b + 2);
  }
};

// Levels: the small integers that a K block's one or two halves are multiplied by, as bytes.
struct Levels {
  uint8_t scale[16], minimum[16];
};
GK_INLINE Levels six_bit_levels(const uint8_t* b) {  // the eight 6-bit scales and minima of Q4_K and Q5_K
  uint32_t low, mid, high;
  memcpy(&low, b + 4, 4), memcpy(&mid, b + 8, 4), memcpy(&high, b + 12, 4);
  const uint32_t s0 = low & 0x3F3F3F3F, s1 = (high & 0x0F0F0F0F) | ((low >> 2) & 0x30303030);
  const uint32_t m0 = mid & 0x3F3F3F3F, m1 = ((high >> 4) & 0x0F0F0F0F) | ((mid >> 2) & 0x30303030);
  Levels out;
  const uint64_t scale = s0 | (uint64_t)s1 << 32, minimum = m0 | (uint64_t)m1 << 32;
  memcpy(out.scale, &scale, 8), memcpy(out.minimum, &minimum, 8);
  return out;
}
// Factors of one block from its levels.
template <class F>
GK_INLINE void level_factors(const uint8_t* b, float* scale, float* minimum) {
  const Levels levels = F::levels(b);
  const float d = half_to_float(b + F::kScaleAt);
  for (int i = 0; i < F::kElements / F::kWidth; ++i)
    scale[i] = d * (F::kSignedLevels ? (float)(int8_t)levels.scale[i] : (float)levels.scale[i]);
  if constexpr (F::kMinimum) {
    const float m = half_to_float(b + F::kScaleAt + 2);
    for (int i = 0; i < F::kElements / F::kWidth; ++i) minimum[i] = m * (float)levels.minimum[i];
  }
}
GK_INLINE Codes shifted(Codes c, int shift, int mask) {
  GK_EACH c.part[i] = (c.part[i] >> shift) & both(mask);
  return c;
}

struct BlockQ4_K {
  static constexpr int kElements = 256, kBytes = 144, kWidth = 32;
  static constexpr bool kSigned = false, kMinimum = true, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int g) { return shifted(bytes32(b + 16 + 32 * (g >> 1)), 4 * (g & 1), 15); }
  static constexpr bool kSignedLevels = false;
  static constexpr int kScaleAt = 0;
  GK_INLINE Levels levels(const uint8_t* b) { return six_bit_levels(b); }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    level_factors<BlockQ4_K>(b, scale, minimum);
  }
};
struct BlockQ5_K {
  static constexpr int kElements = 256, kBytes = 176, kWidth = 32;
  static constexpr bool kSigned = false, kMinimum = true, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int g) {
    Codes c = shifted(bytes32(b + 48 + 32 * (g >> 1)), 4 * (g & 1), 15), high = bytes32(b + 16);
    GK_EACH c.part[i] |= ((high.part[i] >> g) & both(1)) << 4;
    return c;
  }
  static constexpr bool kSignedLevels = false;
  static constexpr int kScaleAt = 0;
  GK_INLINE Levels levels(const uint8_t* b) { return six_bit_levels(b); }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    level_factors<BlockQ5_K>(b, scale, minimum);
  }
};
struct BlockQ6_K {
  static constexpr int kElements = 256, kBytes = 210, kWidth = 16;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int g) {
    const int half = g >> 2, part = g & 3;
    Codes c = shifted(bytes32(b + 64 * half + 32 * (part & 1)), 4 * (part >> 1), 15);
    Codes high = shifted(bytes32(b + 128 + 32 * half), 2 * part, 3);
    // q - 32: the top bit flipped becomes the sign, bits 5 to 7 alike
    GK_EACH {
      du flipped = (high.part[i] << 4) ^ both(32);
      c.part[i] |= flipped | ((flipped & both(32)) * 6);
    }
    return c;
  }
  static constexpr bool kSignedLevels = true;
  static constexpr int kScaleAt = 208;
  GK_INLINE Levels levels(const uint8_t* b) {
    Levels out;
    memcpy(out.scale, b + 192, 16);
    return out;
  }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    level_factors<BlockQ6_K>(b, scale, minimum);
  }
};
struct BlockQ2_K {
  static constexpr int kElements = 256, kBytes = 84, kWidth = 16;
  static constexpr bool kSigned = false, kMinimum = true, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int g) { return shifted(bytes32(b + 16 + 32 * (g >> 2)), 2 * (g & 3), 3); }
  static constexpr bool kSignedLevels = false;
  static constexpr int kScaleAt = 80;
  GK_INLINE Levels levels(const uint8_t* b) {
    Levels out;
    for (int i = 0; i < 2; ++i) {
      const uint64_t eight = load<uint64_t>(b + 8 * i), low = eight & 0x0F0F0F0F0F0F0F0F;
      const uint64_t high = (eight >> 4) & 0x0F0F0F0F0F0F0F0F;
      memcpy(out.scale + 8 * i, &low, 8), memcpy(out.minimum + 8 * i, &high, 8);
    }
    return out;
  }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    level_factors<BlockQ2_K>(b, scale, minimum);
  }
};
struct BlockQ3_K {
  static constexpr int kElements = 256, kBytes = 110, kWidth = 16;
  static constexpr bool kSigned = true, kMinimum = false, kRowScale = false;
  GK_INLINE Codes codes(const uint8_t* b, int g) {
    Codes c = shifted(bytes32(b + 32 + 32 * (g >> 2)), 2 * (g & 3), 3), high = bytes32(b);
    // q - 4 where the bit is clear: bits 2 to 7 set
    GK_EACH c.part[i] |= (((high.part[i] >> g) & both(1)) ^ both(1)) * 0xFC;
    return c;
  }
  static constexpr bool kSignedLevels = true;
  static constexpr int kScaleAt = 108;
  GK_INLINE Levels levels(const uint8_t* b) {  // six bits each, minus 32
    const uint64_t low = load<uint64_t>(b + 96), top = load<uint32_t>(b + 104);
    const uint64_t tops[2] = {(top & 0x03030303) | ((top >> 2) & 0x03030303) << 32,
                              ((top >> 4) & 0x03030303) | ((top >> 6) & 0x03030303) << 32};
    Levels out;
    for (int i = 0; i < 2; ++i) {
      const uint64_t six = ((low >> (4 * i)) & 0x0F0F0F0F0F0F0F0F) | tops[i] << 4;
      // minus 32: bit 5 flipped is the sign; bits 6 and 7 follow it
      const uint64_t flipped = six ^ 0x2020202020202020, sign = flipped & 0x2020202020202020;
      const uint64_t level = flipped | sign << 1 | sign << 2;
      memcpy(out.scale + 8 * i, &level, 8);
    }
    return out;
  }
  GK_INLINE void factors(const uint8_t* b, float, float* scale, float* minimum) {
    level_factors<BlockQ3_K>(b, scale, minimum);
  }
};

// Calls f with the Format of a packed integer type; false for the float types.
template <class F>
GK_INLINE bool with_format(int type, F f) {
  switch (type) {
    case GK_Q4_0: f(BlockQ4_0{}); return true;
    case GK_Q4_1: f(BlockQ4_1{}); return true;
    case GK_Q5_0: f(BlockQ5_0{}); return true;
    case GK_Q5_1: f(BlockQ5_1{}); return true;
    case GK_Q8_0: f(BlockQ8_0{}); return true;
    case GK_Q2_K: f(BlockQ2_K{}); return true;
    case GK_Q3_K: f(BlockQ3_K{}); return true;
    case GK_Q4_K: f(BlockQ4_K{}); return true;
    case GK_Q5_K: f(BlockQ5_K{}); return true;
    case GK_Q6_K: f(BlockQ6_K{}); return true;
    case GK_INT8: f(BlockInt8{}); return true;
    case GK_INT4: f(BlockInt4{}); return true;
  }
  return false;
}

}  // namespace gk::GK_NS

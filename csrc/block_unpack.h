// How each block type's weights and scales come out of a tile (see block_formats.h), for any instruction set.
//
// A block is unpacked in `kPhases`, a phase in `kUnits`; a unit gives `kVecs` vectors of 16 rows by 4
// columns, vector v for sub-block `sub(phase, v % kAccs)`, columns 4 * group(unit, v) on. A sub-block, `kSub`
// columns, has one scale, and a minimum if `kMin`: weight = scale * (q - kZero) - minimum.
#pragma once

#include <cstdint>

#include "block_formats.h"

namespace puna {
namespace PUNA_ISA {
namespace {

using W = Simd::W;
using F = Simd::F;
using B = Simd::B;

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

template <int type_id>
struct SmallBlock {  // the types of 32 columns and one scale, nibbles in two halves
  static constexpr int kType = type_id, kSub = 32, kZero = 0, kLargest = 15;
  static constexpr bool kMin = false, kSigned = false;
  static constexpr int kPhases = 1, kUnits = 4, kVecs = 2, kAccs = 1;
  static constexpr int sub(int, int) { return 0; }
  static constexpr int group(int unit, int v) { return unit + 4 * v; }
};

template <int offset, int unit>
inline void nibbles(const uint8_t* tile, W* w) {
  const W q = Simd::load_w(tile + offset + 64 * unit);
  w[0] = Simd::template field<0, 15>(q);
  w[1] = Simd::template field<4, 15>(q);
}

// The fifth bit of the vector for `group`, from bit planes: see Field::bit_planes.
template <int offset, int group>
inline W fifth_bit(const uint8_t* tile, W low) {
  return Simd::either(low, Simd::template place<group, 1, 4>(Simd::load_w(tile + offset)));
}

struct Q4_0 : SmallBlock<kQ4_0> {
  static constexpr int kZero = 8;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<32, unit>(tile, w);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    scale[0] = Simd::load_half(tile);
  }
};

struct Q4_1 : SmallBlock<kQ4_1> {
  static constexpr bool kMin = true;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<64, unit>(tile, w);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F* minimum) {
    scale[0] = Simd::load_half(tile);
    minimum[0] = Simd::sub(Simd::zero_f(), Simd::load_half(tile + 32));
  }
};

struct Q5_0 : SmallBlock<kQ5_0> {
  static constexpr int kZero = 16, kLargest = 31;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<96, unit>(tile, w);
    w[0] = fifth_bit<32, unit>(tile, w[0]);
    w[1] = fifth_bit<32, unit + 4>(tile, w[1]);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    scale[0] = Simd::load_half(tile);
  }
};

struct Q5_1 : SmallBlock<kQ5_1> {
  static constexpr int kLargest = 31;
  static constexpr bool kMin = true;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<128, unit>(tile, w);
    w[0] = fifth_bit<64, unit>(tile, w[0]);
    w[1] = fifth_bit<64, unit + 4>(tile, w[1]);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F* minimum) {
    Q4_1::scales<phase>(tile, scale, minimum);
  }
};

struct Q8_0 : SmallBlock<kQ8_0> {
  static constexpr int kLargest = 128, kUnits = 8, kVecs = 1;
  static constexpr bool kSigned = true;
  static constexpr int group(int unit, int) { return unit; }
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    w[0] = Simd::load_w(tile + 32 + 64 * unit);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    scale[0] = Simd::load_half(tile);
  }
};

struct IQ4_NL : SmallBlock<kIQ4_NL> {
  static constexpr int kLargest = 128;
  static constexpr bool kSigned = true;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<32, unit>(tile, w);
    w[0] = Simd::look_up(w[0], kIq4Values);
    w[1] = Simd::look_up(w[1], kIq4Values);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    scale[0] = Simd::load_half(tile);
  }
};

struct IQ4_XS : SmallBlock<kIQ4_XS> {
  static constexpr int kLargest = 128, kPhases = 8;
  static constexpr bool kSigned = true;
  static constexpr int sub(int phase, int) { return phase; }
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<128, 4 * phase + unit>(tile, w);
    w[0] = Simd::look_up(w[0], kIq4Values);
    w[1] = Simd::look_up(w[1], kIq4Values);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    const B low = Simd::template field<4 * (phase % 2), 15>(Simd::load_b(tile + 64 + 16 * (phase / 2)));
    const B high = Simd::template field<2 * (phase % 4), 3>(Simd::load_b(tile + 32 + 16 * (phase / 4)));
    const B both = Simd::either(low, Simd::template shift_up<4>(high));
    scale[0] = Simd::mul(Simd::load_half(tile), Simd::sub(Simd::bytes_to_f(both), Simd::fill_f(32.0f)));
  }
};

// The 6-bit scale and minimum of sub-block j, out of 12 bytes for each row.
template <int j>
inline void six_bit_pair(const uint8_t* packed, B* scale, B* minimum) {
  if constexpr (j < 4) {
    *scale = Simd::template field<0, 63>(Simd::load_b(packed + 16 * j));
    *minimum = Simd::template field<0, 63>(Simd::load_b(packed + 16 * (j + 4)));
  } else {
    const B low = Simd::load_b(packed + 16 * (j + 4));
    const B scale_top = Simd::template field<6, 3>(Simd::load_b(packed + 16 * (j - 4)));
    const B minimum_top = Simd::template field<6, 3>(Simd::load_b(packed + 16 * j));
    *scale = Simd::either(Simd::template field<0, 15>(low), Simd::template shift_up<4>(scale_top));
    *minimum = Simd::either(Simd::template field<4, 15>(low), Simd::template shift_up<4>(minimum_top));
  }
}

struct Q4_K {
  static constexpr int kType = kQ4_K, kSub = 32, kZero = 0, kLargest = 15;
  static constexpr bool kMin = true, kSigned = false;
  static constexpr int kPhases = 4, kUnits = 8, kVecs = 2, kAccs = 2;
  static constexpr int sub(int phase, int acc) { return 2 * phase + acc; }
  static constexpr int group(int unit, int) { return unit; }
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<256, 8 * phase + unit>(tile, w);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F* minimum) {
    const F d = Simd::load_half(tile), dmin = Simd::load_half(tile + 32);
    B s[2], m[2];
    six_bit_pair<2 * phase>(tile + 64, &s[0], &m[0]);
    six_bit_pair<2 * phase + 1>(tile + 64, &s[1], &m[1]);
    for (int i = 0; i < 2; ++i) {
      scale[i] = Simd::mul(d, Simd::bytes_to_f(s[i]));
      minimum[i] = Simd::mul(dmin, Simd::bytes_to_f(m[i]));
    }
  }
};

struct Q5_K : Q4_K {
  static constexpr int kType = kQ5_K, kLargest = 31;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    nibbles<768, 8 * phase + unit>(tile, w);
    w[0] = fifth_bit<256 + 64 * unit, 2 * phase>(tile, w[0]);
    w[1] = fifth_bit<256 + 64 * unit, 2 * phase + 1>(tile, w[1]);
  }
};

// Types with sub-blocks of 16: phase = 2 * (half of the block) + (half of 32 columns); vector v is the v-th
// run of 32 columns in the half block.
template <int type_id>
struct FineBlock {
  static constexpr int kType = type_id, kSub = 16;
  static constexpr bool kSigned = false;
  static constexpr int kPhases = 4, kUnits = 4, kVecs = 4, kAccs = 4;
  static constexpr int sub(int phase, int acc) { return 8 * (phase / 2) + 2 * acc + phase % 2; }
  static constexpr int group(int unit, int) { return unit; }
  // The vector of 4 columns in a field with 32 bytes for each half of the block.
  template <int phase, int unit>
  static constexpr int chunk() {
    return 8 * (phase / 2) + 4 * (phase % 2) + unit;
  }
};

template <int chunk_offset>
inline void pairs(const uint8_t* tile, W* w) {
  const W q = Simd::load_w(tile + chunk_offset);
  w[0] = Simd::template field<0, 3>(q);
  w[1] = Simd::template field<2, 3>(q);
  w[2] = Simd::template field<4, 3>(q);
  w[3] = Simd::template field<6, 3>(q);
}

struct Q2_K : FineBlock<kQ2_K> {
  static constexpr int kZero = 0, kLargest = 3;
  static constexpr bool kMin = true;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    pairs<320 + 64 * chunk<phase, unit>()>(tile, w);
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F* minimum) {
    const F d = Simd::load_half(tile), dmin = Simd::load_half(tile + 32);
    for (int i = 0; i < 4; ++i) {
      const B packed = Simd::load_b(tile + 64 + 16 * sub(phase, i));
      scale[i] = Simd::mul(d, Simd::bytes_to_f(Simd::template field<0, 15>(packed)));
      minimum[i] = Simd::mul(dmin, Simd::bytes_to_f(Simd::template field<4, 15>(packed)));
    }
  }
};

struct Q3_K : FineBlock<kQ3_K> {
  static constexpr int kZero = 4, kLargest = 7;
  static constexpr bool kMin = false;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    pairs<736 + 64 * chunk<phase, unit>()>(tile, w);
    const W bits = Simd::load_w(tile + 224 + 64 * (4 * (phase % 2) + unit));
    constexpr int first = 4 * (phase / 2);
    w[0] = Simd::either(w[0], Simd::template place<first, 1, 2>(bits));
    w[1] = Simd::either(w[1], Simd::template place<first + 1, 1, 2>(bits));
    w[2] = Simd::either(w[2], Simd::template place<first + 2, 1, 2>(bits));
    w[3] = Simd::either(w[3], Simd::template place<first + 3, 1, 2>(bits));
  }
  template <int j>
  static F scale_of(const uint8_t* tile) {
    const uint8_t* packed = tile + 32;
    const B low = Simd::template field < j<8 ? 0 : 4, 15>(Simd::load_b(packed + 16 * (j % 8)));
    const B high = Simd::template field<2 * (j / 4), 3>(Simd::load_b(packed + 16 * (8 + j % 4)));
    const B both = Simd::either(low, Simd::template shift_up<4>(high));
    return Simd::mul(Simd::load_half(tile), Simd::sub(Simd::bytes_to_f(both), Simd::fill_f(32.0f)));
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    scale[0] = scale_of<sub(phase, 0)>(tile);
    scale[1] = scale_of<sub(phase, 1)>(tile);
    scale[2] = scale_of<sub(phase, 2)>(tile);
    scale[3] = scale_of<sub(phase, 3)>(tile);
  }
};

struct Q6_K : FineBlock<kQ6_K> {
  static constexpr int kZero = 32, kLargest = 63;
  static constexpr bool kMin = false;
  template <int phase, int unit>
  static void weights(const uint8_t* tile, W* w) {
    constexpr int low = 16 * (phase / 2) + 4 * (phase % 2) + unit;
    const W first = Simd::load_w(tile + 288 + 64 * low), second = Simd::load_w(tile + 288 + 64 * (low + 8));
    const W top = Simd::load_w(tile + 288 + 2048 + 64 * chunk<phase, unit>());
    w[0] = Simd::either(Simd::template field<0, 15>(first), Simd::template place<0, 3, 4>(top));
    w[1] = Simd::either(Simd::template field<0, 15>(second), Simd::template place<2, 3, 4>(top));
    w[2] = Simd::either(Simd::template field<4, 15>(first), Simd::template place<4, 3, 4>(top));
    w[3] = Simd::either(Simd::template field<4, 15>(second), Simd::template place<6, 3, 4>(top));
  }
  template <int phase>
  static void scales(const uint8_t* tile, F* scale, F*) {
    const F d = Simd::load_half(tile);
    for (int i = 0; i < 4; ++i)
      scale[i] = Simd::mul(d, Simd::signed_bytes_to_f(Simd::load_b(tile + 32 + 16 * sub(phase, i))));
  }
};

}  // namespace
}  // namespace PUNA_ISA
}  // namespace puna

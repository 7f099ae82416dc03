// AVX2: eight rows a register.  Products of a byte pair are summed in 16 bits, which 32 columns cannot overflow up to
// four bits (8 * 2 * 15 * 127 = 30480); eight bits are taken as two times four.
#include "product.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

namespace roundexport {
namespace {

struct Avx2 {
  using Bytes = __m256i;
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8, kRows = 2;

  INLINE Float zero() { return _mm256_setzero_ps(); }
  INLINE Int broadcast(int value) { return _mm256_set1_epi32(value); }
  INLINE Float load(const float* at) { return _mm256_loadu_ps(at); }
  INLINE Float load_half(const uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  INLINE Int widen(const uint8_t* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  INLINE Int widen_nibbles(const uint8_t* at, int quarter) {
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * (quarter & 1)));
    return _mm256_cvtepu8_epi32(_mm_and_si128(quarter & 2 ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15)));
  }
  INLINE Int minus_product(Int sum, Int zero, Int x) { return _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, x)); }
  INLINE Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
  INLINE Float times(Float scale, float by) { return _mm256_mul_ps(scale, _mm256_set1_ps(by)); }
  INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  INLINE void store(float* at, Float value) { _mm256_storeu_ps(at, value); }

  INLINE Bytes load_bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  INLINE Bytes both(Bytes v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask))); }
  INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  template <int COUNT>
  INLINE Bytes right(Bytes v) { return _mm256_srli_epi16(v, COUNT); }

  INLINE Int add_pairs(Int sum, Int pairs, int weight) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<short>(weight))));
  }

  template <int BITS, int M>
  INLINE void codes(const uint8_t* unit, const int8_t* const (&x)[M], int group, Int (&sum)[M][4]) {
    for (int k = 0; k < group; k += kUnit, unit += BITS * kUnit * kTileRows / 8) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        Bytes v[8];
        Codes<Avx2, BITS>::unpack(unit, c / 2, c % 2, v);
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
          const int32_t* at = reinterpret_cast<const int32_t*>(x[m] + k);
          Int low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 8
          for (int j = 0; j < 8; j++) {
            const Int four = _mm256_set1_epi32(at[j]);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(BITS == 8 ? both(v[j], 15) : v[j], four));
            if (BITS == 8) high = _mm256_add_epi16(high, _mm256_maddubs_epi16(both(right<4>(v[j]), 15), four));
          }
          sum[m][c] = add_pairs(sum[m][c], low, 1);
          if (BITS == 8) sum[m][c] = add_pairs(sum[m][c], high, 16);
        }
      }
    }
  }
};

void quantize(const float* x, int columns, int group, int8_t* values, float* scales, int32_t* sums) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (int start = 0, g = 0; start < columns; start += group, g++) {
    const int count = columns - start < group ? columns - start : group;
    alignas(32) float filled[8], lanes[8];
    const auto load = [&](int k) {
      if (count - k >= 8) return _mm256_loadu_ps(x + start + k);
      for (int i = 0; i < 8; i++) filled[i] = k + i < count ? x[start + k + i] : 0.0f;
      return _mm256_load_ps(filled);
    };
    __m256 most = _mm256_setzero_ps();
    for (int k = 0; k < count; k += 8) most = _mm256_max_ps(most, _mm256_and_ps(load(k), absolute));
    _mm256_store_ps(lanes, most);
    float top = 0;
    for (float lane : lanes) top = lane > top ? lane : top;
    const __m256 inverse = _mm256_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < group; k += 8) {
      const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(load(k), inverse));
      sum = _mm256_add_epi32(sum, v);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(values + start + k), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t parts[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
    int32_t total = 0;
    for (int32_t part : parts) total += part;
    scales[g] = top / 127.0f;
    sums[g] = total;
  }
}

}  // namespace

const Isa* avx2_isa() {
  static const Isa isa = {"avx2", tiles<Avx2>, quantize};
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? &isa : nullptr;
}

}  // namespace roundexport
#else
namespace roundexport {
const Isa* avx2_isa() { return nullptr; }
}  // namespace roundexport
#endif

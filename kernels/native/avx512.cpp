// AVX-512 with VNNI: sixteen rows a register, four columns a lane, one instruction for 64 products.
#include "product.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

namespace roundexport {
namespace {

struct Avx512 {
  using Bytes = __m512i;
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16, kRows = 4;

  INLINE Float zero() { return _mm512_setzero_ps(); }
  INLINE Int broadcast(int value) { return _mm512_set1_epi32(value); }
  INLINE Float load(const float* at) { return _mm512_loadu_ps(at); }
  INLINE Float load_half(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  INLINE Int widen(const uint8_t* at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  INLINE Int widen_nibbles(const uint8_t* at, int half) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm512_cvtepu8_epi32(_mm_and_si128(half ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15)));
  }
  INLINE Int minus_product(Int sum, Int zero, Int x) { return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, x)); }
  INLINE Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
  INLINE Float times(Float scale, float by) { return _mm512_mul_ps(scale, _mm512_set1_ps(by)); }
  INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  INLINE void store(float* at, Float value) { _mm512_storeu_ps(at, value); }

  INLINE Bytes load_bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
  INLINE Bytes both(Bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask))); }
  INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  template <int COUNT>
  INLINE Bytes right(Bytes v) { return _mm512_srli_epi16(v, COUNT); }

  template <int BITS, int M>
  INLINE void codes(const uint8_t* unit, const int8_t* const (&x)[M], int group, Int (&sum)[M][2]) {
    constexpr bool kTwo = M < 4;  // a second sum per row, where a row's products would wait for one another
    Int other[kTwo ? M : 1][2];
    if constexpr (kTwo)
      for (int m = 0; m < M; m++) other[m][0] = other[m][1] = _mm512_setzero_si512();
    for (int k = 0; k < group; k += kUnit, unit += BITS * kUnit * kTileRows / 8) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        Bytes v[8];
        Codes<Avx512, BITS>::unpack(unit, half, 0, v);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            Int& to = kTwo && j % 2 ? other[m][half] : sum[m][half];
            to = _mm512_dpbusd_epi32(to, v[j], _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x[m] + k)[j]));
          }
        }
      }
    }
    if constexpr (kTwo)
      for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) sum[m][half] = _mm512_add_epi32(sum[m][half], other[m][half]);
  }
};

void quantize(const float* x, int columns, int group, int8_t* values, float* scales, int32_t* sums) {
  for (int start = 0, g = 0; start < columns; start += group, g++) {
    const int count = columns - start < group ? columns - start : group;
    __m512 most = _mm512_setzero_ps();
    for (int k = 0; k < count; k += 16) {
      const __mmask16 mask = count - k >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - k)) - 1);
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + start + k)));
    }
    const float top = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < group; k += 16) {
      const int left = count - k;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + start + k), inverse));
      sum = _mm512_add_epi32(sum, v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + start + k), _mm512_cvtsepi32_epi8(v));
    }
    scales[g] = top / 127.0f;
    sums[g] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace

const Isa* avx512_isa() {
  static const Isa isa = {"avx512vnni", tiles<Avx512>, quantize};
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return has ? &isa : nullptr;
}

}  // namespace roundexport
#else
namespace roundexport {
const Isa* avx512_isa() { return nullptr; }
}  // namespace roundexport
#endif

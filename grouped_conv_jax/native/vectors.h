// The vectors and element types of one instruction set. Only this file knows the size of registers.
//
// Each instruction set compiles this file, and all files that include it, in its own namespace
// INSTRUCTION_SET. The linker therefore cannot confuse functions of two instruction sets. For the
// same reason these files use no function of the standard library that might not be inlined.
//
// A policy says how elements are stored, packed and multiplied:
//   Stored    the type in the caller's arrays
//   Element   the type in packed arrays; a vector has as many of them as it has sums
//   Sum       a vector of sums
//   pair      the stored elements in one Element: 2 if their products are added at once, else 1
//   uses_amx  whether AMX multiplies whole blocks of pixels (see amx.h)
//   Kernels   the policy of the register kernels that only read and write packed arrays
#ifndef GROUPED_CONV_VECTORS_H_
#define GROUPED_CONV_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "job.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 64")
#define INLINE_LAMBDA __attribute__((always_inline))

namespace grouped_conv {
namespace INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes = kVectorBytes>
using Vector = typename VectorOf<T, bytes>::type;

template <class V, class T>
INLINE V Load(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
INLINE void Store(T* to, V v) {
  memcpy(to, &v, sizeof(V));
}

// Stores the first `count` lanes. AVX-512 has an instruction for that. A loop over the lanes would
// make the compiler keep the sums in memory all the time.
template <class V, class T>
INLINE void StoreFirst(T* to, V v, int count) {
#ifdef __AVX512F__
  uint32_t mask = ~(~uint32_t{0} << (count & 31));
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)v);
    return;
  } else if constexpr (sizeof(V) == 64 && sizeof(T) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)v);
    return;
  } else if constexpr (sizeof(V) == 32 && sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)v);
    return;
  }
#endif
  if (count == sizeof(V) / sizeof(T)) {
    Store(to, v);
  } else {
    for (int i = 0; i < count; i++) to[i] = T{v[i]};
  }
}

// Returns `v` with each group of `width` lanes rotated by `by`. With width 4 and by 1, the lanes
// 0 1 2 3 | 4 5 6 7 become 1 2 3 0 | 5 6 7 4.
template <int width, int by, class V, int... i>
INLINE V RotatedLanes(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i / width * width + (i % width + by) % width)...);
}
template <int width, int by, class V>
INLINE V Rotated(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (by == 0) {
    return v;
  } else {
    return RotatedLanes<width, by>(v, std::make_integer_sequence<int, lanes>{});
  }
}

// Returns `x` in every lane. Subtracting zero, unlike adding it, keeps minus zero.
template <class V, class T>
INLINE V Broadcast(T x) {
  return x - V{};
}

template <class T>
struct Plain {
  using Kernels = Plain;
  using Stored = T;
  using Element = T;
  using Sum = Vector<T>;
  static constexpr int pair = 1;
  static constexpr bool uses_amx = false;
  static INLINE Element Packed(Stored x) { return x; }
  static INLINE Vector<T> Packed(const Stored* from) { return Load<Vector<T>>(from); }
  static INLINE Stored Rounded(Element x) { return x; }
  static INLINE void MultiplyAdd(Sum& sum, Vector<T> x, Vector<T> y) { sum += x * y; }
};
using Float32 = Plain<float>;
using Float64 = Plain<double>;

struct Bfloat16Stored {
  uint16_t bits;
};

// Loads a vector of bfloat16 bits, each in the low half of 32 bits.
INLINE Vector<uint32_t> Extended(const Bfloat16Stored* from) {
  using Half = Vector<uint16_t, kVectorBytes / 2>;
  return __builtin_convertvector(Load<Half>(from), Vector<uint32_t>);
}

INLINE float Widened(Bfloat16Stored x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// Returns the upper 16 bits of float32 bits, rounded to nearest, ties to even. A NaN stays a NaN.
template <class Bits>
INLINE Bits NarrowedBits(Bits bits) {
  Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  return (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}
INLINE Bfloat16Stored Narrowed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>(NarrowedBits(bits))};
}

// Packing widens the elements to float32.
struct Bfloat16 {
  using Kernels = Float32;
  using Stored = Bfloat16Stored;
  using Element = float;
  using Sum = Vector<float>;
  static constexpr int pair = 1;
  static constexpr bool uses_amx = false;
  static INLINE Element Packed(Stored x) { return Widened(x); }
  static INLINE Sum Packed(const Stored* from) { return (Sum)(Extended(from) << 16); }
  static INLINE Stored Rounded(float x) { return Narrowed(x); }
  static INLINE void MultiplyAdd(Sum& sum, Sum x, Sum y) { sum += x * y; }
};

#if defined(GROUPED_CONV_PAIRS) || defined(GROUPED_CONV_AMX)
// An element is a pair, and one instruction adds the two products of two pairs to a sum.
struct Bfloat16Pair {
  using Kernels = Bfloat16Pair;
  using Stored = Bfloat16Stored;
  using Element = uint32_t;
  using Sum = Vector<float>;
  static constexpr int pair = 2;
  static constexpr bool uses_amx = false;
  static INLINE Stored Rounded(float x) { return Narrowed(x); }
#ifdef GROUPED_CONV_PAIRS
  static INLINE void MultiplyAdd(Sum& sum, Vector<uint32_t> x, Vector<uint32_t> y) {
    sum = (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
#endif
};

// Pairs that AMX multiplies.
struct Bfloat16Amx : Bfloat16Pair {
  static constexpr bool uses_amx = true;
};
#endif

// The type of one sum.
template <class Policy>
using Number = std::remove_reference_t<decltype(typename Policy::Sum{}[0])>;

template <class Policy>
constexpr int kLanes = kVectorBytes / sizeof(typename Policy::Element);

// Rounds the first `count` sums to the caller's type and stores them.
template <class Policy>
INLINE void StoreSums(typename Policy::Stored* to, typename Policy::Sum sum, int count) {
  if constexpr (std::is_same_v<typename Policy::Stored, Bfloat16Stored>) {
    using Half = Vector<uint16_t, kVectorBytes / 2>;
    StoreFirst(to, __builtin_convertvector(NarrowedBits((Vector<uint32_t>)sum), Half), count);
  } else {
    StoreFirst(to, sum, count);
  }
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_VECTORS_H_

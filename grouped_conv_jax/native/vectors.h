// Vectors of one instruction set: the only file that knows how wide a register is.
//
// Each instruction set compiles this, and all that includes it, in a namespace of its own
// (INSTRUCTION_SET), so that the linker cannot take a function of one for that of another. For the
// same reason nothing of the standard library that has code is used here.
//
// A policy tells how elements are stored, packed and multiplied:
//   Stored    in the arrays of the caller
//   Element   in packed arrays: as many in a vector as there are sums
//   pair      how many stored elements, that are multiplied and added up, an Element holds
//   is_tiled  whether whole tiles are multiplied, and not vectors (see tiles.h)
#ifndef GROUPED_CONV_VECTORS_H_
#define GROUPED_CONV_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
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

// The first `count` lanes, by one instruction where there is one: sums that are looked at lane by
// lane would not stay in registers before.
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

// Lane i is lane (i + by) of the same `width` lanes: 0 1 2 3 | 4 5 6 7 is 1 2 3 0 | 5 6 7 4.
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

// The same number in every lane. (Minus zero stays what it is when zero is taken from it.)
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
  static constexpr bool is_tiled = false;
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

// A vector of them, each in 32 bits.
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

// To the nearest, of two equally near to the even one; a NaN stays one.
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

// Converted when they are packed, and computed with as 32 bits.
struct Bfloat16 {
  using Kernels = Float32;  // For what reads and writes only what is packed.
  using Stored = Bfloat16Stored;
  using Element = float;
  using Sum = Vector<float>;
  static constexpr int pair = 1;
  static constexpr bool is_tiled = false;
  static INLINE Element Packed(Stored x) { return Widened(x); }
  static INLINE Sum Packed(const Stored* from) { return (Sum)(Extended(from) << 16); }
  static INLINE Stored Rounded(float x) { return Narrowed(x); }
  static INLINE void MultiplyAdd(Sum& sum, Sum x, Sum y) { sum += x * y; }
};

#if defined(GROUPED_CONV_PAIRS) || defined(GROUPED_CONV_TILES)
// Two in an element, whose products are added up by one instruction.
struct Bfloat16Pair {
  using Kernels = Bfloat16Pair;
  using Stored = Bfloat16Stored;
  using Element = uint32_t;
  using Sum = Vector<float>;
  static constexpr int pair = 2;
  static constexpr bool is_tiled = false;
  static INLINE Stored Rounded(float x) { return Narrowed(x); }
#ifdef GROUPED_CONV_PAIRS
  static INLINE void MultiplyAdd(Sum& sum, Vector<uint32_t> x, Vector<uint32_t> y) {
    sum = (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
  }
#endif
};

// The same, multiplied as tiles.
struct Bfloat16Tile : Bfloat16Pair {
  static constexpr bool is_tiled = true;
};
#endif

template <class Policy>
constexpr int kLanes = kVectorBytes / sizeof(typename Policy::Element);

// The first `count` lanes to memory.
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

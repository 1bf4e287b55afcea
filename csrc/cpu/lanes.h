// Vectors of W floats, 4 (any processor), 8 (AVX2) or 16 (AVX-512), and what the operators share.
//
// All is inlined into functions that are compiled for one kind of processor: nothing here may be
// called from elsewhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define WARPLOOM_INLINE inline __attribute__((always_inline))
#define WARPLOOM_UNROLL _Pragma("GCC unroll 8")

namespace warploom {

template <int W>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * W)));
  typedef int32_t Integers __attribute__((vector_size(4 * W)));
};
template <int W>
using Vector = typename Lanes<W>::Vector;

template <int W>
WARPLOOM_INLINE Vector<W> load(const float* from) {
  Vector<W> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <int W>
WARPLOOM_INLINE void store(float* to, Vector<W> v) {
  std::memcpy(to, &v, sizeof v);
}

template <int W>
WARPLOOM_INLINE Vector<W> all(float x) {
  return Vector<W>{} + x;
}

template <int W>
WARPLOOM_INLINE float sum(Vector<W> v) {
  float x[W];
  store<W>(x, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// e^x, 0 below -87, infinite above 88; NaN stays NaN. Within 2 units in the last place.
// Source: the coefficients of Cephes' expf, Moshier 1992.
template <int W>
WARPLOOM_INLINE Vector<W> exp(Vector<W> x) {
  const Vector<W> least = all<W>(-87.0f), most = all<W>(88.0f), whole = all<W>(12582912.0f);
  const auto nothing = x<least, endless = x> most;
  x = nothing ? least : x;
  x = endless ? most : x;
  const Vector<W> n = (x * 1.44269504088896341f + whole) - whole;  // the nearest integer
  const Vector<W> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<W> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  using Integers = typename Lanes<W>::Integers;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector<W> power;
  std::memcpy(&power, &bits, sizeof power);
  p = endless ? all<W>(INFINITY) : p * power;
  return nothing ? Vector<W>{} : p;
}

// The halves of groups of 2 G lanes added: those of `a`, then those of `b`.
template <int W, int G, int... I>
WARPLOOM_INLINE Vector<W> fold(Vector<W> a, Vector<W> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / G * 2 * G + I % G)...) +
         __builtin_shufflevector(a, b, (I / G * 2 * G + I % G + G)...);
}

template <int W, int G>
WARPLOOM_INLINE Vector<W> fold(Vector<W> a, Vector<W> b) {
  return fold<W, G>(a, b, std::make_integer_sequence<int, W>{});
}

// The sums of 4 vectors, each in W / 4 lanes that are still to be added.
template <int W>
WARPLOOM_INLINE Vector<W> sums_of_4(Vector<W> a, Vector<W> b, Vector<W> c, Vector<W> d) {
  return fold<W, W / 4>(fold<W, W / 2>(a, b), fold<W, W / 2>(c, d));
}

// sums[r] = the sum of v[r], r < 8.
template <int W>
WARPLOOM_INLINE void sums_of_8(const Vector<W> (&v)[8], float* sums) {
  const Vector<W> low = sums_of_4<W>(v[0], v[1], v[2], v[3]);
  const Vector<W> high = sums_of_4<W>(v[4], v[5], v[6], v[7]);
  if constexpr (W == 4) {
    store<4>(sums, low);
    store<4>(sums + 4, high);
  } else {
    Vector<W> s = fold<W, W / 8>(low, high);
    if constexpr (W == 16) s = fold<16, 1>(s, s);
    std::memcpy(sums, &s, 8 * sizeof(float));
  }
}

// sums[c][r] = rows(r) . w[c], r < 8 and c < C; every row has `steps` vectors. `ahead` floats
// further the next weights lie: they are asked for on the way.
template <int W, int C, typename Rows>
WARPLOOM_INLINE void dots(const Rows& rows, const float* w, int64_t stride, int64_t steps,
                          int64_t ahead, float (*sums)[8]) {
  Vector<W> total[C][8] = {};
  for (int64_t i = 0; i < steps; ++i) {
    Vector<W> weight[C];
    WARPLOOM_UNROLL
    for (int c = 0; c < C; ++c) {
      weight[c] = load<W>(w + c * stride + i * W);
      if (ahead) __builtin_prefetch(w + c * stride + i * W + ahead);
    }
    WARPLOOM_UNROLL
    for (int r = 0; r < 8; ++r) {
      const Vector<W> x = load<W>(rows(r, i));
      WARPLOOM_UNROLL
      for (int c = 0; c < C; ++c) total[c][r] += x * weight[c];
    }
  }
  WARPLOOM_UNROLL
  for (int c = 0; c < C; ++c) sums_of_8<W>(total[c], sums[c]);
}

}  // namespace warploom

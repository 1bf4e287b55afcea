// The operators of a step of generation, float32, for vectors of W floats.
//
// Shapes are said where Python meets them: kernels/cpu.py and kernels/attention/paged.py. Each
// `part` is what one thread does.
#pragma once
#include <algorithm>
#include <vector>

#include "lanes.h"

namespace warploom {

constexpr int kStrip = 48;    // columns whose results wait until they are written row by row
constexpr int kAtOnce = 384;  // features: eight rows of them, and the weights, fit the first cache

// Groups of 8 rows as `Linear` reads them: [group][width / W][8][W], zeros where there is no row.
struct Packing {
  const float* x;
  float* packed;
  int64_t rows, width;

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end) const {
    const int64_t steps = width / W;
    for (int64_t g = begin; g < end; ++g)
      for (int64_t i = 0; i < steps; ++i)
        for (int64_t r = 0; r < 8; ++r) {
          const int64_t row = g * 8 + r;
          const Vector<W> v = row < rows ? load<W>(x + row * width + i * W) : Vector<W>{};
          store<W>(packed + ((g * steps + i) * 8 + r) * W, v);
        }
  }
};

// y = x weight^T + bias for few rows, each weight read once from memory.
struct Linear {
  const float *packed, *weight, *bias;
  float* y;
  int64_t rows, columns, width;

  int64_t groups() const { return (rows + 7) / 8; }

  template <int W, int C>
  WARPLOOM_INLINE void columns_of(int64_t column, int64_t from, int64_t steps,
                                  float (*strip)[kStrip][8], int64_t at) const {
    const float* w = weight + column * width + from * W;
    for (int64_t g = 0; g < groups(); ++g) {
      const float* first = packed + (g * (width / W) + from) * 8 * W;
      const auto row = [first](int r, int64_t i)
                           __attribute__((always_inline)) { return first + (i * 8 + r) * W; };
      float sums[C][8];
      dots<W, C>(row, w, width, steps, g ? 0 : C * width, sums);
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < 8; ++r)
          strip[g][at + c][r] = from ? strip[g][at + c][r] + sums[c][r] : sums[c][r];
    }
  }

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end, float (*strip)[kStrip][8]) const {
    constexpr int C = W == 16 ? 3 : 1;  // sums that the registers hold
    const int64_t steps = width / W, cuts = (width + kAtOnce - 1) / kAtOnce;
    const int64_t most = (steps + cuts - 1) / cuts;
    for (int64_t start = begin; start < end; start += kStrip) {
      const int64_t stop = std::min(end, start + kStrip);
      for (int64_t from = 0; from < steps; from += most) {
        const int64_t now = std::min(most, steps - from);
        int64_t column = start;
        for (; column + C <= stop; column += C)
          columns_of<W, C>(column, from, now, strip, column - start);
        for (; column < stop; ++column) columns_of<W, 1>(column, from, now, strip, column - start);
      }
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = start; n < stop; ++n)
          y[row * columns + n] = strip[row / 8][n - start][row % 8] + (bias ? bias[n] : 0.0f);
    }
  }
};

// h = x + residual, y = h / rms(h) * weight.
struct RmsNorm {
  const float *x, *residual, *weight;
  float *y, *h;
  int64_t rows, width;
  float eps;

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end) const {
    const int64_t whole = width / W * W;
    for (int64_t row = begin; row < end; ++row) {
      const float* in = x + row * width;
      if (residual) {
        const float* more = residual + row * width;
        float* total = h + row * width;
        for (int64_t i = 0; i < whole; i += W)
          store<W>(total + i, load<W>(in + i) + load<W>(more + i));
        for (int64_t i = whole; i < width; ++i) total[i] = in[i] + more[i];
        in = total;
      }
      Vector<W> squares[2] = {};
      int64_t i = 0;
      for (; i + 2 * W <= whole; i += 2 * W)
        for (int k = 0; k < 2; ++k) {
          const Vector<W> v = load<W>(in + i + k * W);
          squares[k] += v * v;
        }
      float square = 0.0f;
      for (; i < width; ++i) square += in[i] * in[i];
      square += sum<W>(squares[0] + squares[1]);
      const float scale = 1.0f / std::sqrt(square / width + eps);
      float* out = y + row * width;
      for (i = 0; i < whole; i += W)
        store<W>(out + i, load<W>(in + i) * scale * load<W>(weight + i));
      for (; i < width; ++i) out[i] = in[i] * scale * weight[i];
    }
  }
};

// y = gate / (1 + e^-gate) * up; a row has its gates first.
struct SwiGlu {
  const float* gate_up;
  float* y;
  int64_t width;

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const float *gate = gate_up + row * 2 * width, *up = gate + width;
      float* out = y + row * width;
      for (int64_t i = 0; i < width; i += W) {
        const int64_t n = std::min<int64_t>(W, width - i);
        Vector<W> g = {}, u = {};
        std::memcpy(&g, gate + i, n * sizeof(float));
        std::memcpy(&u, up + i, n * sizeof(float));
        const Vector<W> v = g / (exp<W>(-g) + 1.0f) * u;
        std::memcpy(out + i, &v, n * sizeof(float));
      }
    }
  }
};

// Heads rotated in halves: (a, b) to (a cos - b sin, b cos + a sin).
struct Rotation {
  const float *x, *cos, *sin;
  float* y;
  int64_t heads, half, stride;  // floats from token to token of x

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end) const {
    for (int64_t token = begin; token < end; ++token) {
      const float *c = cos + token * half, *s = sin + token * half;
      for (int64_t head = 0; head < heads; ++head) {
        const float* in = x + token * stride + head * 2 * half;
        float* out = y + (token * heads + head) * 2 * half;
        for (int64_t i = 0; i < half; ++i) {
          out[i] = in[i] * c[i] - in[i + half] * s[i];
          out[i + half] = in[i + half] * c[i] + in[i] * s[i];
        }
      }
    }
  }
};

// One query of each sequence over its keys in pages, the new key and value written first.
struct Decode {
  const float *q, *k, *v, *sinks;
  float *k_pages, *v_pages, *out;
  const int32_t *tables, *lengths;  // [sequences, table_stride], [sequences]
  int64_t heads, groups, page, table_stride, q_stride, k_stride, v_stride, width, value_width;
  int64_t left;  // keys before its own that a query sees; -1 for all
  float scale, softcap;

  int64_t shared() const { return heads / groups; }

  // The rows of keys `first` to `stop` of a sequence in the flattened pages.
  WARPLOOM_INLINE void find(int64_t n, int64_t first, int64_t stop, int64_t* rows) const {
    const int32_t* table = tables + n * table_stride;
    for (int64_t at = first / page; first < stop; ++at)
      for (const int64_t end = std::min(stop, (at + 1) * page); first < end; ++first)
        *rows++ = table[at] * page + first - at * page;
  }

  // Ask for a row of the cache; no processor sees the pattern of pages by itself.
  WARPLOOM_INLINE static void ask(const float* from, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i);
  }

  template <int W, int C>
  WARPLOOM_INLINE void scores(const float* const (&keys)[8], const float* query, float* to,
                              int64_t stride) const {
    const auto key = [&keys](int r, int64_t i)
                         __attribute__((always_inline)) { return keys[r] + i * W; };
    float sums[C][8];
    dots<W, C>(key, query, width, width / W, 0, sums);
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < 8; ++r) to[c * stride + r] = sums[c][r] * scale;
  }

  // Scores to weights, in place; answers one over their sum. `padded` is a multiple of W.
  template <int W>
  WARPLOOM_INLINE float weigh(float* x, int64_t count, int64_t padded, float sink) const {
    if (softcap > 0)
      for (int64_t i = 0; i < count; ++i) x[i] = softcap * std::tanh(x[i] / softcap);
    std::fill(x + count, x + padded, -INFINITY);
    float most = sink;
    for (int64_t i = 0; i < count; ++i) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    Vector<W> total = {};
    for (int64_t i = 0; i < padded; i += W) {
      const Vector<W> e = exp<W>(load<W>(x + i) - most);
      store<W>(x + i, e);
      total += e;
    }
    return 1.0f / (sum<W>(total) + (sink == most ? 1.0f : std::exp(sink - most)));
  }

  // Values of `B` vectors from `at` on, weighted, for `C` heads.
  template <int W, int C, int B>
  WARPLOOM_INLINE void mix(const int64_t* rows, const float* values, int64_t count,
                           const float* weights, int64_t stride, const float* shares,
                           float* to) const {
    Vector<W> total[C][B] = {};
    for (int64_t j = 0; j < count; ++j) {
      const float* value = values + rows[j] * groups * value_width;
      WARPLOOM_UNROLL
      for (int b = 0; b < B; ++b) {
        const Vector<W> x = load<W>(value + b * W);
        WARPLOOM_UNROLL
        for (int c = 0; c < C; ++c) total[c][b] += x * weights[c * stride + j];
      }
    }
    for (int c = 0; c < C; ++c)
      for (int b = 0; b < B; ++b) store<W>(to + c * value_width + b * W, total[c][b] * shares[c]);
  }

  template <int W, int C>
  WARPLOOM_INLINE void mix_all(const int64_t* rows, const float* values, int64_t count,
                               const float* weights, int64_t stride, const float* shares,
                               float* to) const {
    int64_t at = 0;
    for (; at + 4 * W <= value_width; at += 4 * W)
      mix<W, C, 4>(rows, values + at, count, weights, stride, shares, to + at);
    for (; at < value_width; at += W)
      mix<W, C, 1>(rows, values + at, count, weights, stride, shares, to + at);
  }

  template <int W>
  WARPLOOM_INLINE void part(int64_t begin, int64_t end, std::vector<float>& scratch,
                            std::vector<int64_t>& places) const {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, g = item % groups, h = shared();
      const int64_t first = left < 0 ? 0 : std::max<int64_t>(lengths[n] - 1 - left, 0);
      const int64_t count = lengths[n] - first, padded = (count + 15) / 16 * 16;
      float *keys = k_pages + g * width, *values = v_pages + g * value_width;
      places.resize(count);
      scratch.resize(h * padded + h);
      int64_t* rows = places.data();
      find(n, first, lengths[n], rows);
      std::memcpy(keys + rows[count - 1] * groups * width, k + n * k_stride + g * width,
                  width * sizeof(float));
      std::memcpy(values + rows[count - 1] * groups * value_width,
                  v + n * v_stride + g * value_width, value_width * sizeof(float));
      float *x = scratch.data(), *shares = x + h * padded;
      const float* query = q + n * q_stride + g * h * width;
      for (int64_t j = 0; j < count; j += 8) {
        const float* held[8];
        for (int64_t r = 0; r < 8; ++r) {
          const int64_t last = count - 1, at = rows[std::min(j + r, last)];
          held[r] = keys + at * groups * width;
          ask(values + at * groups * value_width, value_width);  // they are read next
          ask(keys + rows[std::min(j + r + 8, last)] * groups * width, width);
        }
        int64_t c = 0;
        for (; c + 3 <= h; c += 3)
          scores<W, 3>(held, query + c * width, x + c * padded + j, padded);
        for (; c < h; ++c) scores<W, 1>(held, query + c * width, x + c * padded + j, padded);
      }
      for (int64_t c = 0; c < h; ++c)
        shares[c] = weigh<W>(x + c * padded, count, padded, sinks ? sinks[g * h + c] : -INFINITY);
      float* to = out + (n * heads + g * h) * value_width;
      int64_t c = 0;
      for (; c + 3 <= h; c += 3)
        mix_all<W, 3>(rows, values, count, x + c * padded, padded, shares + c,
                      to + c * value_width);
      for (; c < h; ++c)
        mix_all<W, 1>(rows, values, count, x + c * padded, padded, shares + c,
                      to + c * value_width);
    }
  }
};

}  // namespace warploom

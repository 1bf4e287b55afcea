// rms_norm with the residual addition, forward and backward; kernels/norm/rms.py has the formulas.
//
// Bound by memory. A row lies in the registers of a group of threads, so that every byte is moved
// once: to width 16384 (float32: 8192). Wider rows are walked over
// twice, the second time out of the second-level cache for the most part.
//
// Backward: a grid that fills the device strides over the rows; each thread keeps its columns of
// dweight in float32 registers, the groups of a block add theirs up in shared memory, and a second
// kernel adds the blocks' shares in a fixed order: the same inputs give the same bits.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common.cuh"

namespace warploom {
namespace {

constexpr int MOST = 512;  // threads of a block: they may use 128 registers each
constexpr int FORWARD_USUAL = 128, BACKWARD_USUAL = 256;

struct Forward {
  const void *x, *residual, *weight;
  void *y, *h;
  float* rstd;
  int64_t tokens, width, x_stride, residual_stride;
  float eps;
  int weight_type, lanes;
};

struct Backward {
  const void *dy, *dh, *h, *weight;
  const float* rstd;
  void* dx;
  float* shares;
  int64_t tokens, width, dy_stride, dh_stride, h_stride;
  int weight_type, lanes;
};

struct Shares {
  const float* shares;
  void* dweight;
  int64_t parts, width;
  int weight_type;
};

template <typename T>
__device__ const T* row_of(const void* rows, int64_t row, int64_t stride) {
  return static_cast<const T*>(rows) + row * stride;
}

template <typename T>
__device__ T* row_of(void* rows, int64_t row, int64_t stride) {
  return static_cast<T*>(rows) + row * stride;
}

// h = x + residual, rounded.
template <typename T, int SIZE>
__device__ Pack<T, SIZE> sum_of(const Pack<T, SIZE>& x, const Pack<T, SIZE>& residual) {
  Floats<SIZE> sum = widened(x);
  const Floats<SIZE> other = widened(residual);
#pragma unroll
  for (int e = 0; e < SIZE; ++e) sum.at[e] += other.at[e];
  return narrowed<T>(sum);
}

template <int SIZE>
__device__ float dot(const Floats<SIZE>& a, const Floats<SIZE>& b) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < SIZE; ++e) sum += a.at[e] * b.at[e];
  return sum;
}

// y = h * rstd * gain.
template <typename T, int SIZE>
__device__ Pack<T, SIZE> scaled(const Pack<T, SIZE>& h, float rstd, const Floats<SIZE>& gain) {
  Floats<SIZE> y = widened(h);
#pragma unroll
  for (int e = 0; e < SIZE; ++e) y.at[e] *= rstd * gain.at[e];
  return narrowed<T>(y);
}

// dy * normal, normal = h * rstd: dweight is its sum over the rows, slope its mean with gain.
template <typename T, int SIZE>
__device__ Floats<SIZE> product_of(const Pack<T, SIZE>& dy, const Pack<T, SIZE>& h, float rstd) {
  Floats<SIZE> product = widened(dy);
  const Floats<SIZE> sum = widened(h);
#pragma unroll
  for (int e = 0; e < SIZE; ++e) product.at[e] *= sum.at[e] * rstd;
  return product;
}

// dx = rstd * (dy * gain - normal * slope) + dh.
template <typename T, int SIZE>
__device__ Pack<T, SIZE> gradient_of(const Pack<T, SIZE>& dy, const Pack<T, SIZE>& h,
                                     const Pack<T, SIZE>& dh, float rstd, float slope,
                                     const Floats<SIZE>& gain) {
  Floats<SIZE> dx = widened(dy);
  const Floats<SIZE> sum = widened(h), above = widened(dh);
#pragma unroll
  for (int e = 0; e < SIZE; ++e)
    dx.at[e] = (dx.at[e] * gain.at[e] - sum.at[e] * rstd * slope) * rstd + above.at[e];
  return narrowed<T>(dx);
}

// T is the type of the rows, W that of the weight.
template <typename T, typename W, bool FUSED, int PIECES, int ROWS>
__global__ void __launch_bounds__(MOST, 1) forward_kernel(const Forward a) {
  __shared__ float sums[2][WARP];
  constexpr int SIZE = 16 / sizeof(T);
  const int lane = int(threadIdx.x) % a.lanes, group = int(threadIdx.x) / a.lanes;
  const int groups = int(blockDim.x) / a.lanes, width = int(a.width);
  const int64_t first = int64_t(blockIdx.x) * groups * ROWS + group;

  Pack<T> h[ROWS][PIECES] = {}, residual[ROWS][PIECES] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r * groups;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = (p * a.lanes + lane) * SIZE;
      if (at >= width || row >= a.tokens) continue;
      h[r][p] = read<ONCE>(row_of<T>(a.x, row, a.x_stride) + at);
      if (FUSED) residual[r][p] = read<ONCE>(row_of<T>(a.residual, row, a.residual_stride) + at);
    }
  }

  float rstd[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r * groups;
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = (p * a.lanes + lane) * SIZE;
      if (FUSED) h[r][p] = sum_of(h[r][p], residual[r][p]);
      if (FUSED && at < width && row < a.tokens) write(row_of<T>(a.h, row, a.width) + at, h[r][p]);
      sum += dot(widened(h[r][p]), widened(h[r][p]));
    }
    rstd[r] = rsqrtf(row_sum(sum, a.lanes, sums, r) / float(width) + a.eps);
    if (lane == 0 && row < a.tokens) a.rstd[row] = rstd[r];
  }

#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int at = (p * a.lanes + lane) * SIZE;
    if (at >= width) continue;
    const auto gain = widened(read<AGAIN, W, SIZE>(static_cast<const W*>(a.weight) + at));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = first + r * groups;
      if (row < a.tokens) write(row_of<T>(a.y, row, a.width) + at, scaled(h[r][p], rstd[r], gain));
    }
  }
}

template <typename T, typename W, bool FUSED, int PIECES, int ROWS>
__global__ void __launch_bounds__(MOST, 1) backward_kernel(const Backward a) {
  constexpr int SIZE = 16 / sizeof(T);
  __shared__ float sums[2][WARP];
  __shared__ float folded[BACKWARD_USUAL * PIECES * SIZE];
  const int lane = int(threadIdx.x) % a.lanes, group = int(threadIdx.x) / a.lanes;
  const int groups = int(blockDim.x) / a.lanes, width = int(a.width);
  const int64_t tile = int64_t(groups) * ROWS;
  const W* weight = static_cast<const W*>(a.weight);

  Floats<SIZE> share[PIECES] = {};
  int turn = 0;
  for (int64_t start = blockIdx.x * tile; start < a.tokens; start += gridDim.x * tile) {
    Pack<T> dy[ROWS][PIECES] = {}, h[ROWS][PIECES] = {}, dh[ROWS][PIECES] = {};
    float rstd[ROWS] = {}, slope[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = start + r * groups + group;
      if (row < a.tokens) rstd[r] = a.rstd[row];
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const int at = (p * a.lanes + lane) * SIZE;
        if (at >= width || row >= a.tokens) continue;
        dy[r][p] = read<ONCE>(row_of<T>(a.dy, row, a.dy_stride) + at);
        h[r][p] = read<ONCE>(row_of<T>(a.h, row, a.h_stride) + at);
        if (FUSED) dh[r][p] = read<ONCE>(row_of<T>(a.dh, row, a.dh_stride) + at);
      }
    }

#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = (p * a.lanes + lane) * SIZE;
      if (at >= width) continue;
      const auto gain = widened(read<AGAIN, W, SIZE>(weight + at));
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const auto product = product_of(dy[r][p], h[r][p], rstd[r]);
        slope[r] += dot(product, gain);
#pragma unroll
        for (int e = 0; e < SIZE; ++e) share[p].at[e] += product.at[e];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      slope[r] = row_sum(slope[r], a.lanes, sums, turn++) / float(width);

#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = (p * a.lanes + lane) * SIZE;
      if (at >= width) continue;
      const auto gain = widened(read<AGAIN, W, SIZE>(weight + at));
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = start + r * groups + group;
        forget(dy[r][p]);
        forget(h[r][p]);
        if (row < a.tokens)
          write(row_of<T>(a.dx, row, a.width) + at,
                gradient_of(dy[r][p], h[r][p], dh[r][p], rstd[r], slope[r], gain));
      }
    }
  }

  // The groups' shares, in the order of the groups; a block of one group has nothing to add.
  float* shares = a.shares + int64_t(blockIdx.x) * a.width;
  float* own = groups == 1 ? shares : folded + group * a.lanes * PIECES * SIZE;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int at = (p * a.lanes + lane) * SIZE;
#pragma unroll
    for (int e = 0; e < SIZE; ++e)
      if (at < width) own[at + e] = share[p].at[e];
  }
  if (groups == 1) return;
  __syncthreads();
  for (int at = int(threadIdx.x); at < width; at += int(blockDim.x)) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += folded[g * a.lanes * PIECES * SIZE + at];
    shares[at] = total;
  }
}

// The weight of any type, in the kernels that walk.
template <int SIZE>
__device__ Floats<SIZE> gain_at(const void* weight, int type, int64_t at) {
  return with_type(type, [=](auto zero) {
    using W = decltype(zero);
    return widened(read<AGAIN, W, SIZE>(static_cast<const W*>(weight) + at));
  });
}

// A block takes a row and walks over it twice, the second time over the h that it has written.
template <typename T, int SIZE>
__global__ void __launch_bounds__(MOST, 1) forward_walk_kernel(const Forward a) {
  __shared__ float sums[2][WARP];
  const int64_t row = blockIdx.x, first = int64_t(threadIdx.x) * SIZE, step = a.lanes * SIZE;
  const T *x = row_of<T>(a.x, row, a.x_stride),
          *residual = row_of<T>(a.residual, row, a.residual_stride);
  T *h = row_of<T>(a.h, row, a.width), *y = row_of<T>(a.y, row, a.width);

  float sum = 0.0f;
  for (int64_t at = first; at < a.width; at += step) {
    auto value = read<AGAIN, T, SIZE>(x + at);
    if (a.residual) {
      value = sum_of(value, read<ONCE, T, SIZE>(residual + at));
      write(h + at, value);
    }
    sum += dot(widened(value), widened(value));
  }
  const float rstd = rsqrtf(row_sum(sum, a.lanes, sums, 0) / float(a.width) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;

  const T* again = a.residual ? h : x;
  for (int64_t at = first; at < a.width; at += step)
    write(y + at, scaled(read<AGAIN, T, SIZE>(again + at), rstd,
                         gain_at<SIZE>(a.weight, a.weight_type, at)));
}

// A block takes every gridDim-th row and walks over it twice. Its share of dweight is in memory; a
// column of it is always the same thread's.
template <typename T, int SIZE>
__global__ void __launch_bounds__(MOST, 1) backward_walk_kernel(const Backward a) {
  __shared__ float sums[2][WARP];
  const int64_t first = int64_t(threadIdx.x) * SIZE, step = a.lanes * SIZE;
  float* shares = a.shares + int64_t(blockIdx.x) * a.width;

  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.tokens; row += gridDim.x) {
    const T *dy = row_of<T>(a.dy, row, a.dy_stride), *h = row_of<T>(a.h, row, a.h_stride),
            *dh = row_of<T>(a.dh, row, a.dh_stride);
    T* dx = row_of<T>(a.dx, row, a.width);
    const float rstd = a.rstd[row];

    float slope = 0.0f;
    for (int64_t at = first; at < a.width; at += step) {
      const auto product =
          product_of(read<AGAIN, T, SIZE>(dy + at), read<AGAIN, T, SIZE>(h + at), rstd);
      slope += dot(product, gain_at<SIZE>(a.weight, a.weight_type, at));
#pragma unroll
      for (int e = 0; e < SIZE; ++e) {
        float& share = shares[at + e];
        share = row == blockIdx.x ? product.at[e] : share + product.at[e];
      }
    }
    slope = row_sum(slope, a.lanes, sums, turn++) / float(a.width);

    for (int64_t at = first; at < a.width; at += step) {
      Pack<T, SIZE> above = {};
      if (a.dh) above = read<ONCE, T, SIZE>(dh + at);
      write(dx + at, gradient_of(read<AGAIN, T, SIZE>(dy + at), read<AGAIN, T, SIZE>(h + at), above,
                                 rstd, slope, gain_at<SIZE>(a.weight, a.weight_type, at)));
    }
  }
}

// A block adds up 32 columns: row y of it every 32nd share, then row 0 the rows' sums.
__global__ void __launch_bounds__(WARP* WARP) shares_kernel(const Shares a) {
  __shared__ float sums[WARP][WARP];
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const int64_t at = int64_t(blockIdx.x) * WARP + x;
  float total = 0.0f;
  if (at < a.width) {
#pragma unroll 4
    for (int64_t part = y; part < a.parts; part += WARP) total += a.shares[part * a.width + at];
  }
  sums[y][x] = total;
  __syncthreads();
  if (y != 0 || at >= a.width) return;
  total = 0.0f;
  for (int i = 0; i < WARP; ++i) total += sums[i][x];
  with_type(a.weight_type, [=](auto zero) {
    using W = decltype(zero);
    static_cast<W*>(a.dweight)[at] = narrow<W>(total);
  });
}

// Call `use` with T, W and FUSED as types; W is that of the weight, which is T or float.
template <typename F>
int with_kind(int type, int weight_type, bool fused, F use) {
  return with_type(type, [=](auto t) {
    const auto with_weight = [=](auto w) {
      return fused ? use(t, w, std::true_type{}) : use(t, w, std::false_type{});
    };
    if constexpr (sizeof(t) == 2)
      if (weight_type == WARPLOOM_FLOAT32) return with_weight(float{});
    return with_weight(t);
  });
}

int bad_sizes(int64_t tokens, int64_t width, int type, int weight_type) {
  if (tokens < 0 || width < 1)
    return fail(BAD_ARGUMENT, "tokens must be at least 0 and width at least 1, got %lld and %lld",
                (long long)tokens, (long long)width);
  if (!is_type(type))
    return fail(BAD_ARGUMENT, "a type must be 0 (float16), 1 (bfloat16) or 2 (float32), got %d",
                type);
  if (weight_type != type && weight_type != WARPLOOM_FLOAT32)
    return fail(BAD_ARGUMENT,
                "the weight's type must be that of the rows (%d) or 2 (float32), got %d", type,
                weight_type);
  return 0;
}

struct Argument {
  const char* name;
  const void* pointer;
  int type;
};

// Every pointer must be there and lie at a multiple of its element's bytes.
int bad_pointers(std::initializer_list<Argument> arguments) {
  for (const Argument& a : arguments)
    if (!a.pointer || reinterpret_cast<uintptr_t>(a.pointer) % bytes(a.type))
      return fail(BAD_ARGUMENT, "%s must be the address of elements of %d bytes, got %p", a.name,
                  bytes(a.type), a.pointer);
  return 0;
}

int pack_size(int type) { return 16 / bytes(type); }

Plan backward_plan(int64_t width, int size) { return plan(width, size, MOST, BACKWARD_USUAL); }

}  // namespace
}  // namespace warploom

using namespace warploom;

const char* warploom_last_error() { return last_error; }

int warploom_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y,
                              void* h, float* rstd, int64_t tokens, int64_t width, int64_t x_stride,
                              int64_t residual_stride, float eps, int type, int weight_type,
                              int device, void* stream) {
  if (int code = bad_sizes(tokens, width, type, weight_type)) return code;
  if (!tokens) return 0;
  const bool fused = residual || h;
  if (int code = bad_pointers({{"x", x, type},
                               {"weight", weight, weight_type},
                               {"y", y, type},
                               {"rstd", rstd, WARPLOOM_FLOAT32},
                               {"residual", fused ? residual : x, type},
                               {"h", fused ? h : x, type}}))
    return code;
  if (int code = use_device(device)) return code;

  int size = pack_size(type);
  if (!packed(x, x_stride, size) || !packed(y, width, size) || !packed(weight, 0, size) ||
      (fused && (!packed(residual, residual_stride, size) || !packed(h, width, size))))
    size = 1;
  const Plan p = plan(width, size, MOST, FORWARD_USUAL);
  const Forward a{x,     residual, weight,          y,   h,           rstd,   tokens,
                  width, x_stride, residual_stride, eps, weight_type, p.lanes};
  return with_kind(type, weight_type, fused, [&](auto t, auto w, auto f) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr bool F = f;
    auto kernel =
        p.pieces == 1 ? forward_kernel<T, W, F, 1, SLOTS> : forward_kernel<T, W, F, SLOTS, 1>;
    if (p.walked)
      kernel = size == 1 ? forward_walk_kernel<T, 1> : forward_walk_kernel<T, 16 / sizeof(T)>;
    return launch(kernel, p.tiles(tokens), p.block(), stream, a);
  });
}

int64_t warploom_rms_norm_parts(int64_t tokens, int64_t width, int type, int processors) {
  const int size = pack_size(type);
  const Plan p = backward_plan(width, width % size ? 1 : size);
  const int64_t resident = int64_t(processors) * (MOST / p.block());
  return std::max(std::min(resident, p.tiles(tokens)), int64_t(1));
}

int warploom_rms_norm_backward(const void* dy, const void* dh, const void* h, const void* weight,
                               const float* rstd, void* dx, void* dweight, float* shares,
                               int64_t tokens, int64_t width, int64_t dy_stride, int64_t dh_stride,
                               int64_t h_stride, int64_t parts, int type, int weight_type,
                               int dweight_type, int device, void* stream) {
  if (int code = bad_sizes(tokens, width, type, weight_type)) return code;
  if (parts < 1 || !is_type(dweight_type))
    return fail(BAD_ARGUMENT,
                "parts must be at least 1 and dweight's type 0, 1 or 2, got %lld and %d",
                (long long)parts, dweight_type);
  if (int code =
          bad_pointers({{"dweight", dweight, dweight_type}, {"shares", shares, WARPLOOM_FLOAT32}}))
    return code;
  if (tokens)
    if (int code = bad_pointers({{"dy", dy, type},
                                 {"dh", dh ? dh : dy, type},
                                 {"h", h, type},
                                 {"weight", weight, weight_type},
                                 {"rstd", rstd, WARPLOOM_FLOAT32},
                                 {"dx", dx, type}}))
      return code;
  if (int code = use_device(device)) return code;

  int size = pack_size(type);
  if (!packed(dy, dy_stride, size) || !packed(h, h_stride, size) || !packed(dx, width, size) ||
      !packed(weight, 0, size) || (dh && !packed(dh, dh_stride, size)))
    size = 1;
  const Plan p = backward_plan(width, size);
  const int64_t grid = std::min(parts, p.tiles(tokens));
  const Backward a{dy,     dh,    h,         weight,    rstd,     dx,          shares,
                   tokens, width, dy_stride, dh_stride, h_stride, weight_type, p.lanes};
  const auto run = [&](auto t, auto w, auto f) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr bool F = f;
    auto kernel =
        p.pieces == 1 ? backward_kernel<T, W, F, 1, SLOTS> : backward_kernel<T, W, F, SLOTS, 1>;
    if (p.walked)
      kernel = size == 1 ? backward_walk_kernel<T, 1> : backward_walk_kernel<T, 16 / sizeof(T)>;
    return launch(kernel, grid, p.block(), stream, a);
  };
  if (int code = tokens ? with_kind(type, weight_type, dh, run) : 0) return code;
  const Shares b{shares, dweight, grid, width, dweight_type};
  return launch(shares_kernel, (width + WARP - 1) / WARP, dim3(WARP, WARP), stream, b);
}

// What the operators share: errors, element types, packs of 16 bytes, how a row is cut, sums over a
// row, launches.
//
// Nothing here or in an operator needs nvcc to be understood: tests/csrc compiles the same files
// with g++ and runs every thread of every block on the CPU. So a kernel reads and writes through
// `read` and `write`, sums through `row_sum`, and is started by `launch`.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "warploom.h"

namespace warploom {

constexpr int WARP = 32;

// Errors ----------------------------------------------------------------------------------------

inline thread_local char last_error[512] = "";

// Keep the sentence and answer `code`.
__attribute__((format(printf, 2, 3))) inline int fail(int code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return code;
}

constexpr int BAD_ARGUMENT = -1;

// Element types ---------------------------------------------------------------------------------

__host__ __device__ inline float wide(float x) { return x; }
__host__ __device__ inline float wide(__half x) { return __half2float(x); }
__host__ __device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__host__ __device__ T narrow(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
}

// Call `use` with a value of the type that `type` stands for.
template <typename F>
__host__ __device__ auto with_type(int type, F use) {
  if (type == WARPLOOM_FLOAT16) return use(__half{});
  if (type == WARPLOOM_BFLOAT16) return use(__nv_bfloat16{});
  return use(float{});
}

constexpr int bytes(int type) { return type == WARPLOOM_FLOAT32 ? 4 : 2; }
constexpr bool is_type(int type) { return type >= WARPLOOM_FLOAT16 && type <= WARPLOOM_FLOAT32; }

// Packs ------------------------------------------------------------------------------------------

// Elements that a thread moves at a time, as words: a 16-bit variable would take a register of its
// own. 16 bytes of T set the number; packs of another type with as many elements take one access of
// 8 bytes, or two of 16. A pack of one element is that element.
template <typename T, int SIZE = 16 / sizeof(T)>
struct alignas(SIZE * sizeof(T) < 16 ? SIZE * sizeof(T) : 16) Pack {
  uint32_t word[SIZE * sizeof(T) / 4];
};

template <typename T>
struct Pack<T, 1> {
  T one;
};

template <int SIZE>
struct Floats {
  float at[SIZE];
};

template <typename To, typename From>
__host__ __device__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

template <typename T, int SIZE>
__host__ __device__ Floats<SIZE> widened(const Pack<T, SIZE>& pack) {
  Floats<SIZE> result;
  if constexpr (SIZE == 1) {
    result.at[0] = wide(pack.one);
  } else {
#pragma unroll
    for (int e = 0; e < SIZE; e += 4 / sizeof(T)) {
      if constexpr (sizeof(T) == 4) {
        result.at[e] = bits<float>(pack.word[e]);
      } else {
        float2 pair;
        if constexpr (std::is_same_v<T, __half>)
          pair = __half22float2(bits<__half2>(pack.word[e / 2]));
        else
          pair = __bfloat1622float2(bits<__nv_bfloat162>(pack.word[e / 2]));
        result.at[e] = pair.x;
        result.at[e + 1] = pair.y;
      }
    }
  }
  return result;
}

template <typename T, int SIZE>
__host__ __device__ Pack<T, SIZE> narrowed(const Floats<SIZE>& x) {
  Pack<T, SIZE> result;
  if constexpr (SIZE == 1) {
    result.one = narrow<T>(x.at[0]);
  } else {
#pragma unroll
    for (int e = 0; e < SIZE; e += 4 / sizeof(T)) {
      if constexpr (sizeof(T) == 4)
        result.word[e] = bits<uint32_t>(x.at[e]);
      else if constexpr (std::is_same_v<T, __half>)
        result.word[e / 2] = bits<uint32_t>(__floats2half2_rn(x.at[e], x.at[e + 1]));
      else
        result.word[e / 2] = bits<uint32_t>(__floats2bfloat162_rn(x.at[e], x.at[e + 1]));
    }
  }
  return result;
}

// What is read ONCE leaves the caches to what is read again, such as the weight.
enum Use { AGAIN, ONCE };

template <Use USE, typename T, int SIZE = 16 / sizeof(T)>
__device__ Pack<T, SIZE> read(const T* from) {
  Pack<T, SIZE> pack;
  if constexpr (SIZE == 1) {
    pack.one = *from;
  } else if constexpr (sizeof(pack) == 8) {
    const auto raw = reinterpret_cast<const uint2*>(from);
    reinterpret_cast<uint2&>(pack) = USE == ONCE ? __ldcs(raw) : *raw;
  } else {
    static_assert(sizeof(pack) % 16 == 0);
    const auto raw = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 16); ++i)
      reinterpret_cast<uint4*>(&pack)[i] = USE == ONCE ? __ldcs(raw + i) : raw[i];
  }
  return pack;
}

template <typename T, int SIZE>
__device__ void write(T* to, const Pack<T, SIZE>& pack) {
  if constexpr (SIZE == 1) {
    *to = pack.one;
  } else {
    static_assert(sizeof(pack) == 16);
    *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4&>(pack);
  }
}

// Let the compiler not keep what it has computed from a pack: that takes twice the registers.
template <typename T, int SIZE>
__device__ void forget([[maybe_unused]] Pack<T, SIZE>& pack) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (uint32_t& word : pack.word) asm volatile("" : "+r"(word));
#endif
}

// Whether rows can be moved in packs of 16 bytes: each begins at a multiple of them.
inline bool packed(const void* pointer, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % size == 0;
}

// How a row is cut -------------------------------------------------------------------------------

// A row lies in the registers of `lanes` threads: pack i of it with lane i % lanes, as piece
// i / lanes. `groups` groups of lanes make a block, and a group takes `rows` rows at a time, so
// that a thread has pieces * rows = SLOTS packs in flight. With `walked` a row does not fit, or its
// elements must be moved one by one: a block's lanes walk over it.
struct Plan {
  bool walked;
  int lanes, groups, pieces, rows;

  int block() const { return lanes * groups; }
  int64_t tiles(int64_t tokens) const {
    const int64_t tile = int64_t(groups) * rows;
    return tokens / tile + (tokens % tile != 0);
  }
};

constexpr int SLOTS = 4;

// Cut rows of `width` into packs of `size` elements (1: moved one by one). `most` is the largest
// block that the kernel can have, `usual` the one that is filled with groups.
inline Plan plan(int64_t width, int size, int most, int usual) {
  const int64_t packs = (width + size - 1) / size;
  const int pieces = packs > WARP ? SLOTS : 1;
  const int64_t needed = (packs + pieces - 1) / pieces;
  const int warps = int(std::min<int64_t>(needed, most) + WARP - 1) / WARP;
  if (size == 1 || needed > most) return {true, warps * WARP, 1, SLOTS, 1};
  int lanes = 1;
  while (lanes < needed && lanes < WARP) lanes *= 2;
  if (needed > WARP) lanes = warps * WARP;
  return {false, lanes, lanes < usual ? usual / lanes : 1, pieces, SLOTS / pieces};
}

// Sums ------------------------------------------------------------------------------------------

// Add `value` over the lanes of a row; each lane gets the same bits. Every thread of the block must
// call it, with `turn` counting the calls: two sets of `shared` in turn need one barrier a call.
__device__ inline float row_sum(float value, int lanes, float (&shared)[2][WARP], int turn) {
  for (int offset = (lanes < WARP ? lanes : WARP) / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(~0u, value, offset);
  if (lanes <= WARP) return value;
  float* sums = shared[turn % 2];
  const int warp = int(threadIdx.x) / WARP, warps = lanes / WARP;
  if (threadIdx.x % WARP == 0) sums[warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int w = warp / warps * warps, end = w + warps; w < end; ++w) total += sums[w];
  return total;
}

// Launches --------------------------------------------------------------------------------------

#ifndef WARPLOOM_EMULATED
inline int failed(cudaError_t code, const char* what, long long value) {
  if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice)
    return fail(code, "needs a CUDA device and a driver for CUDA %d, none is found here",
                CUDART_VERSION / 1000);
  if (code == cudaErrorNoKernelImageForDevice)
    return fail(code, "needs compute capability 9.0 or 10.0, this device has another");
  return fail(code, "%s %lld failed: %s (%s)", what, value, cudaGetErrorString(code),
              cudaGetErrorName(code));
}

// The runtime that is linked into this library may have another device current than the caller's.
inline int use_device(int device) {
  const cudaError_t code = cudaSetDevice(device);
  return code == cudaSuccess ? 0 : failed(code, "making current device", device);
}

// Start `grid` blocks; a kernel takes one structure, so that what it needs has names.
template <typename A>
int launch(void (*kernel)(A), int64_t grid, dim3 block, void* stream, const A& arguments) {
  if (grid > 0x7fffffff)
    return fail(BAD_ARGUMENT, "a device takes 2^31 - 1 blocks, these sizes need %lld",
                (long long)grid);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, arguments);
  return code == cudaSuccess ? 0 : failed(code, "a launch with a grid of", grid);
}
#endif

}  // namespace warploom

// The runner's program for rms_norm: checks against a plain kernel in double, then timings.
//
// A check draws inputs (some rows are strided, some pointers lie only at their elements), fills the
// outputs and scratch with NaN between guard bands, calls the library, and compares every element
// with what one thread a row computes in double from the same rounded inputs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "warploom.h"

namespace {

constexpr float EPS = 1e-6f;
constexpr int GUARD = 256;  // bytes on either side of an output

void must(cudaError_t code) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "csrc/run: %s\n", cudaGetErrorString(code));
  exit(1);
}

void must(int code) {
  if (!code) return;
  fprintf(stderr, "csrc/run: %s\n", warploom_last_error());
  exit(1);
}

int bytes(int type) { return type == WARPLOOM_FLOAT32 ? 4 : 2; }

__host__ __device__ double get(const void* p, int64_t i, int type) {
  if (type == WARPLOOM_FLOAT16) return __half2float(static_cast<const __half*>(p)[i]);
  if (type == WARPLOOM_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

__device__ void put(void* p, int64_t i, int type, float x) {
  if (type == WARPLOOM_FLOAT16) static_cast<__half*>(p)[i] = __float2half_rn(x);
  if (type == WARPLOOM_BFLOAT16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  if (type == WARPLOOM_FLOAT32) static_cast<float*>(p)[i] = x;
}

// Numbers between -1 and 1 by a hash of their place.
__global__ void draw(void* p, int64_t count, int type, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t z = (uint64_t(seed) << 40) + i * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    put(p, i, type, float((z >> 40) & 0xffffff) / 8388608.0f - 1.0f);
  }
}

// Memory of a tensor whose first element lies `shift` elements after a multiple of 256 bytes.
struct Tensor {
  int64_t rows, width, stride;
  int type;
  int64_t size, shift;
  char* base = nullptr;

  Tensor(int64_t rows, int64_t width, int type, int64_t gap = 0, int64_t shift = 0)
      : rows(rows),
        width(width),
        stride(width + gap),
        type(type),
        size(std::max<int64_t>(rows * stride, 1) * bytes(type)),
        shift(shift * bytes(type)) {
    must(cudaMalloc(&base, size + 3 * GUARD));
    must(cudaMemset(base, 0xff, size + 3 * GUARD));  // NaN in every type
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(base); }
  void* at() const { return base + GUARD + shift; }

  Tensor& drawn(uint32_t seed) {
    draw<<<512, 256>>>(at(), rows * stride, type, seed);
    must(cudaGetLastError());
    return *this;
  }
  std::vector<char> host() const {
    std::vector<char> all(size + 3 * GUARD);
    must(cudaMemcpy(all.data(), base, all.size(), cudaMemcpyDeviceToHost));
    return all;
  }
};

struct Case {
  int64_t tokens, width;
  int type, weight_type;
  bool fused, shifted, strided;
};

struct Truth {
  const void *x, *residual, *weight, *dy, *dh;
  double *y, *dx, *dweight;
  Case c;
  int64_t x_stride, residual_stride, dy_stride, dh_stride;
};

__device__ double sum_at(const Truth& t, int64_t row, int64_t i) {
  const double x = get(t.x, row * t.x_stride + i, t.c.type);
  if (!t.c.fused) return x;
  char rounded[4];
  put(rounded, 0, t.c.type,
      float(x) + float(get(t.residual, row * t.residual_stride + i, t.c.type)));
  return get(rounded, 0, t.c.type);
}

__global__ void truth_kernel(Truth t) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, width = t.c.width;
  if (row >= t.c.tokens) return;
  double square = 0, slope = 0;
  for (int64_t i = 0; i < width; ++i) square += sum_at(t, row, i) * sum_at(t, row, i);
  const double rstd = 1 / sqrt(square / width + double(EPS));
  for (int64_t i = 0; i < width; ++i)
    slope += get(t.dy, row * t.dy_stride + i, t.c.type) * get(t.weight, i, t.c.weight_type) *
             sum_at(t, row, i) * rstd / width;
  for (int64_t i = 0; i < width; ++i) {
    const double normal = sum_at(t, row, i) * rstd, gain = get(t.weight, i, t.c.weight_type);
    const double dy = get(t.dy, row * t.dy_stride + i, t.c.type);
    t.y[row * width + i] = normal * gain;
    t.dx[row * width + i] = rstd * (dy * gain - normal * slope) +
                            (t.c.fused ? get(t.dh, row * t.dh_stride + i, t.c.type) : 0);
    atomicAdd(&t.dweight[i], dy * normal);
  }
}

// The largest error over what the type allows; inf when a guard band has changed.
double error(const char* name, const Tensor& got, const double* truth, bool* failed) {
  std::vector<double> want(got.rows * got.width);
  must(cudaMemcpy(want.data(), truth, want.size() * sizeof(double), cudaMemcpyDeviceToHost));
  const std::vector<char> all = got.host();
  const int64_t begin = GUARD + got.shift;
  double top = 0, worst = 0;
  for (double w : want) top = std::max(top, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double off = std::abs(get(all.data() + begin, i, got.type) - want[i]);
    worst = std::max(worst, std::isnan(off) ? INFINITY : off);
  }
  for (size_t i = 0; i < all.size(); ++i)
    if ((int64_t(i) < begin || int64_t(i) >= begin + got.size) && all[i] != char(0xff))
      worst = INFINITY;
  const double unit = got.type == WARPLOOM_FLOAT32   ? 1e-5
                      : got.type == WARPLOOM_FLOAT16 ? 0x1p-11
                                                     : 0x1p-8;
  if (worst <= unit * top + 1e-6) return worst;
  printf("  %s: error %.3g, allowed %.3g\n", name, worst, unit * top + 1e-6);
  *failed = true;
  return worst;
}

bool check(const Case& c, int processors) {
  const int64_t shift = c.shifted ? 1 : 0, gap = c.strided ? 3 : 0;
  Tensor x(c.tokens, c.width, c.type, gap, shift),
      residual(c.tokens, c.width, c.type, 2 * gap, shift);
  Tensor weight(1, c.width, c.weight_type, 0, shift), y(c.tokens, c.width, c.type, 0, shift);
  Tensor h(c.tokens, c.width, c.type, 0, shift), rstd(1, c.tokens, WARPLOOM_FLOAT32);
  Tensor dy(c.tokens, c.width, c.type, gap, shift), dh(c.tokens, c.width, c.type, gap, shift);
  Tensor dx(c.tokens, c.width, c.type, 0, shift), dweight(1, c.width, c.weight_type, 0, shift);
  const int64_t parts = warploom_rms_norm_parts(c.tokens, c.width, c.type, processors);
  Tensor shares(parts, c.width, WARPLOOM_FLOAT32), again(1, c.width, c.weight_type, 0, shift);
  x.drawn(1), residual.drawn(2), weight.drawn(3), dy.drawn(4), dh.drawn(5);

  must(warploom_rms_norm_forward(x.at(), c.fused ? residual.at() : nullptr, weight.at(), y.at(),
                                 c.fused ? h.at() : nullptr, (float*)rstd.at(), c.tokens, c.width,
                                 x.stride, residual.stride, EPS, c.type, c.weight_type, 0,
                                 nullptr));
  for (Tensor* to : {&again, &dweight})
    must(warploom_rms_norm_backward(dy.at(), c.fused ? dh.at() : nullptr, c.fused ? h.at() : x.at(),
                                    weight.at(), (float*)rstd.at(), dx.at(), to->at(),
                                    (float*)shares.at(), c.tokens, c.width, dy.stride, dh.stride,
                                    c.fused ? h.stride : x.stride, parts, c.type, c.weight_type,
                                    c.weight_type, 0, nullptr));

  double* truth;
  must(cudaMalloc(&truth, (2 * c.tokens + 1) * c.width * sizeof(double)));
  must(cudaMemset(truth, 0, (2 * c.tokens + 1) * c.width * sizeof(double)));
  const Truth t{x.at(),
                residual.at(),
                weight.at(),
                dy.at(),
                dh.at(),
                truth,
                truth + c.tokens * c.width,
                truth + 2 * c.tokens * c.width,
                c,
                x.stride,
                residual.stride,
                dy.stride,
                dh.stride};
  if (c.tokens) truth_kernel<<<unsigned((c.tokens + 127) / 128), 128>>>(t);
  must(cudaDeviceSynchronize());

  bool failed = false;
  error("y", y, t.y, &failed);
  error("dx", dx, t.dx, &failed);
  error("dweight", dweight, t.dweight, &failed);
  if (again.host() != dweight.host()) failed = true, printf("  dweight: two calls differ\n");
  must(cudaFree(truth));
  if (failed)
    printf("FAILED: tokens %lld, width %lld, type %d, weight type %d%s%s%s\n", (long long)c.tokens,
           (long long)c.width, c.type, c.weight_type, c.fused ? ", residual" : "",
           c.shifted ? ", misaligned" : "", c.strided ? ", strided" : "");
  return !failed;
}

// The median of the time of `run`, in milliseconds, the caches written over before each.
template <typename F>
double median_ms(F run) {
  static char* cold = nullptr;
  constexpr size_t COLD = 512u << 20;
  if (!cold) must(cudaMalloc(&cold, COLD));
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times(25);
  for (float& time : times) {
    must(cudaMemsetAsync(cold, 0, COLD));
    must(cudaEventRecord(begin));
    run();
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    must(cudaEventElapsedTime(&time, begin, end));
  }
  must(cudaEventDestroy(begin));
  must(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void time_all(int processors) {
  const size_t half = size_t(2) << 30;
  char* memory;
  must(cudaMalloc(&memory, 2 * half));
  const double copy =
      2.0 * half / 1e6 / median_ms([&] {
        must(cudaMemcpyAsync(memory + half, memory, half, cudaMemcpyDeviceToDevice));
      });
  must(cudaFree(memory));
  printf("copy of 2 GiB: %.0f GB/s\n", copy);
  printf("%-9s %9s %6s %9s %9s %7s %8s\n", "", "tokens", "width", "residual", "ms", "GB/s",
         "of copy");
  const int type = WARPLOOM_BFLOAT16;
  for (int64_t width : {64, 128, 2048, 4096, 5120, 8192, 16384, 32768})
    for (bool fused : {false, true}) {
      const int64_t tokens = (int64_t(1) << 26) / width;
      Tensor x(tokens, width, type), residual(tokens, width, type), weight(1, width, type);
      Tensor y(tokens, width, type), h(tokens, width, type), rstd(1, tokens, WARPLOOM_FLOAT32);
      Tensor dweight(1, width, type);
      const int64_t parts = warploom_rms_norm_parts(tokens, width, type, processors);
      Tensor shares(parts, width, WARPLOOM_FLOAT32);
      x.drawn(1), residual.drawn(2), weight.drawn(3);
      const double forward = median_ms([&] {
        must(warploom_rms_norm_forward(x.at(), fused ? residual.at() : nullptr, weight.at(), y.at(),
                                       fused ? h.at() : nullptr, (float*)rstd.at(), tokens, width,
                                       width, width, EPS, type, type, 0, nullptr));
      });
      const double backward = median_ms([&] {
        must(warploom_rms_norm_backward(residual.at(), fused ? h.at() : nullptr, x.at(),
                                        weight.at(), (float*)rstd.at(), y.at(), dweight.at(),
                                        (float*)shares.at(), tokens, width, width, width, width,
                                        parts, type, type, type, 0, nullptr));
      });
      const auto row = [&](const char* name, double ms, int moved) {
        const double rate = double(moved) * tokens * width * 2 / 1e6 / ms;
        printf("%-9s %9lld %6lld %9s %9.4f %7.0f %7.1f%%\n", name, (long long)tokens,
               (long long)width, fused ? "yes" : "no", ms, rate, 100 * rate / copy);
      };
      row("forward", forward, fused ? 4 : 2);
      row("backward", backward, fused ? 4 : 3);
    }
}

}  // namespace

int main(int argc, char** argv) {
  int count = 0;
  cudaDeviceProp device;
  if (cudaGetDeviceCount(&count) != cudaSuccess || !count ||
      cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    fprintf(stderr,
            "csrc/run needs a GPU of compute capability 9.0 or 10.0, this machine has none\n");
    return 2;
  }
  if (device.minor != 0 || (device.major != 9 && device.major != 10)) {
    fprintf(stderr, "csrc/run needs compute capability 9.0 or 10.0, %s has %d.%d\n", device.name,
            device.major, device.minor);
    return 2;
  }
  printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  int cases = 0, failed = 0;
  for (int type : {WARPLOOM_FLOAT16, WARPLOOM_BFLOAT16, WARPLOOM_FLOAT32})
    for (int weight_type : {type, int(WARPLOOM_FLOAT32)})
      for (int64_t width :
           {1, 3, 8, 64, 65, 128, 264, 1000, 1032, 4096, 5120, 8192, 16384, 16392, 40000})
        for (int64_t tokens : {0, 1, 5, 301})
          for (int form = 0; form < 8; ++form) {
            ++cases;
            failed += !check(
                {tokens, width, type, weight_type, bool(form & 1), bool(form & 2), bool(form & 4)},
                form % 2 ? 1 : device.multiProcessorCount);  // 1: blocks stride
          }
  printf("%d of %d checks passed\n", cases - failed, cases);
  if (!(argc > 1 && !strcmp(argv[1], "--check"))) time_all(device.multiProcessorCount);
  return failed != 0;
}

// The Python module warploom._cpu: pointers as integers. Each operator is compiled for vectors of
// 4, 8 and 16 floats; the caller names one that `lanes` lists. Sizes, types and pointers are
// checked in Python (kernels/cpu.py).
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "operators.h"

#if defined(__x86_64__)
#define WARPLOOM_FOR_8 __attribute__((target("avx2,fma")))
#define WARPLOOM_FOR_16 \
  __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")))
#else
#define WARPLOOM_FOR_8
#define WARPLOOM_FOR_16
#endif

namespace py = pybind11;
using Address = uintptr_t;
using namespace warploom;

namespace {

constexpr int64_t kWorthIt = 1 << 16;  // operations that are worth a second thread

template <typename T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<int> lanes() {
#if defined(__x86_64__)
  std::vector<int> found{4};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(8);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    found.push_back(16);
  return found;
#else
  return {4};
#endif
}

// `part` of an operator, for one kind of processor: the only functions that are not inlined.
template <typename Operator, typename... Rest>
void part_4(const Operator& op, Rest&&... rest) {
  op.template part<4>(rest...);
}
template <typename Operator, typename... Rest>
WARPLOOM_FOR_8 void part_8(const Operator& op, Rest&&... rest) {
  op.template part<8>(rest...);
}
template <typename Operator, typename... Rest>
WARPLOOM_FOR_16 void part_16(const Operator& op, Rest&&... rest) {
  op.template part<16>(rest...);
}

template <typename Operator, typename... Rest>
void part(int lanes, const Operator& op, Rest&&... rest) {
  if (lanes == 16)
    part_16(op, rest...);
  else if (lanes == 8)
    part_8(op, rest...);
  else
    part_4(op, rest...);
}

// Gives every thread its share of `count` items; of little work the caller's thread does all.
template <typename Work>
void share(int64_t count, int64_t operations, const Work& work) {
  if (operations < kWorthIt || count < 2) return work(int64_t{0}, count);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    work(count * thread / threads, count * (thread + 1) / threads);
  }
}

float* scratch(std::vector<float>& kept, size_t floats) {
  if (kept.size() < floats + 16) kept.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

void linear(int lanes, Address x, Address weight, Address bias, Address y, int64_t rows,
            int64_t columns, int64_t width) {
  static thread_local std::vector<float> kept;
  const int64_t groups = (rows + 7) / 8;
  float* packed = scratch(kept, groups * 8 * width);
  part(lanes, Packing{at(x), packed, rows, width}, 0, groups);
  const Linear op{packed, at(weight), at(bias), at(y), rows, columns, width};
  share(columns, rows * columns * width, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> own;
    part(lanes, op, begin, end,
         reinterpret_cast<float (*)[kStrip][8]>(scratch(own, groups * kStrip * 8)));
  });
}

void rms_norm(int lanes, Address x, Address residual, Address weight, Address y, Address h,
              int64_t rows, int64_t width, float eps) {
  const RmsNorm op{at(x), at(residual), at(weight), at(y), at(h), rows, width, eps};
  share(rows, rows * width, [&](int64_t begin, int64_t end) { part(lanes, op, begin, end); });
}

void swiglu(int lanes, Address gate_up, Address y, int64_t rows, int64_t width) {
  const SwiGlu op{at(gate_up), at(y), width};
  share(rows, rows * width * 4, [&](int64_t begin, int64_t end) { part(lanes, op, begin, end); });
}

void rotate(int lanes, Address x, Address cos, Address sin, Address y, int64_t tokens,
            int64_t heads, int64_t half, int64_t stride) {
  const Rotation op{at(x), at(cos), at(sin), at(y), heads, half, stride};
  share(tokens, tokens * heads * half,
        [&](int64_t begin, int64_t end) { part(lanes, op, begin, end); });
}

void decode(int lanes, Address q, Address k, Address v, Address sinks, Address k_pages,
            Address v_pages, Address out, Address tables, Address lengths, int64_t sequences,
            int64_t keys, int64_t heads, int64_t groups, int64_t page, int64_t table_stride,
            int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t width,
            int64_t value_width, int64_t left, float scale, float softcap) {
  Decode op;
  op.q = at(q), op.k = at(k), op.v = at(v), op.sinks = at(sinks), op.out = at(out);
  op.k_pages = at(k_pages), op.v_pages = at(v_pages);
  op.tables = at<const int32_t>(tables), op.lengths = at<const int32_t>(lengths);
  op.heads = heads, op.groups = groups, op.page = page, op.table_stride = table_stride;
  op.q_stride = q_stride, op.k_stride = k_stride, op.v_stride = v_stride;
  op.width = width, op.value_width = value_width;
  op.left = left, op.scale = scale, op.softcap = softcap;
  share(sequences * groups, keys * heads * (width + value_width), [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> scratch;
    static thread_local std::vector<int64_t> places;
    part(lanes, op, begin, end, scratch, places);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "operators of a step of generation on a CPU; see csrc/cpu/operators.h";
  const py::call_guard<py::gil_scoped_release> released;
  module.def("lanes", lanes);
  module.def("linear", linear, released);
  module.def("rms_norm", rms_norm);
  module.def("swiglu", swiglu);
  module.def("rotate", rotate);
  module.def("decode", decode, released);
}

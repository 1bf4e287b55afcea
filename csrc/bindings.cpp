// The Python module warploom._csrc: the functions of warploom.h, pointers as integers, the GIL
// released. Sizes, types and pointers are checked below; sentences for users are made in Python.
#include <pybind11/pybind11.h>

#include "warploom.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

int rms_norm_forward(Address x, Address residual, Address weight, Address y, Address h,
                     Address rstd, int64_t tokens, int64_t width, int64_t x_stride,
                     int64_t residual_stride, float eps, int type, int weight_type, int device,
                     Address stream) {
  return warploom_rms_norm_forward(at(x), at(residual), at(weight), at(y), at(h), at<float>(rstd),
                                   tokens, width, x_stride, residual_stride, eps, type, weight_type,
                                   device, at(stream));
}

int rms_norm_backward(Address dy, Address dh, Address h, Address weight, Address rstd, Address dx,
                      Address dweight, Address shares, int64_t tokens, int64_t width,
                      int64_t dy_stride, int64_t dh_stride, int64_t h_stride, int64_t parts,
                      int type, int weight_type, int dweight_type, int device, Address stream) {
  return warploom_rms_norm_backward(at(dy), at(dh), at(h), at(weight), at<float>(rstd), at(dx),
                                    at(dweight), at<float>(shares), tokens, width, dy_stride,
                                    dh_stride, h_stride, parts, type, weight_type, dweight_type,
                                    device, at(stream));
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
  module.doc() = "CUDA C++ operators of warploom; see csrc/warploom.h";
  const py::call_guard<py::gil_scoped_release> released;
  module.def("source_hash", [] { return WARPLOOM_SOURCE_HASH; });
  module.def("last_error", warploom_last_error);
  module.def("rms_norm_forward", rms_norm_forward, released);
  module.def("rms_norm_parts", warploom_rms_norm_parts);
  module.def("rms_norm_backward", rms_norm_backward, released);
}

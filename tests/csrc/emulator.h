// A CUDA device on the CPU, for the kernels of csrc: g++ reads this file first (-include).
//
// Blocks run one after the other; the threads of a block are fibers. A fiber runs until it waits
// for its warp (shuffle), a warp until it waits for the block (__syncthreads); every other block
// runs in reverse order, so that a missing barrier shows. Who waits for what never comes is an
// error; g++'s sanitizers find misaligned packs and indices outside of arrays. Only what the
// kernels use is here.
#pragma once
#define WARPLOOM_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace emulator {

struct Fiber {
  ucontext_t context;  // where it begins; it goes on at `jump`, which costs no system call
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  jmp_buf jump;
  uint3 at{};
  bool begun = false, done = false, waits = false, block_wide = false;
  float given = 0;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* running = nullptr;
inline std::function<void()> body;

[[noreturn]] inline void stop(const char* why) {
  fprintf(stderr, "emulator: %s\n", why);
  abort();
}

inline void yield() {
  if (!_setjmp(running->jump)) _longjmp(scheduler, 1);
}

// A fiber is a thread of one block after the other.
inline void enter() {
  for (;;) {
    body();
    running->done = true;
    yield();
  }
}

inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.jump, 1);
  fiber.begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = 1 << 16;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Wait until all of the warp, or of the block, are here.
inline void wait(bool block_wide) {
  running->waits = true;
  running->block_wide = block_wide;
  yield();
}

// Let those go on whose warp or block has come together; false when nobody can.
inline bool release(size_t begin, size_t end, bool block_wide) {
  for (size_t i = begin; i < end; ++i)
    if (!fibers[i].waits || fibers[i].block_wide != block_wide) return false;
  for (size_t i = begin; i < end; ++i) fibers[i].waits = false;
  return true;
}

inline void run_block(dim3 block, bool reversed) {
  const size_t count = size_t(block.x) * block.y;
  if (count % 32 || count > 1024) stop("a block must be warps, at most 32");
  if (fibers.empty()) fibers = std::vector<Fiber>(1024);
  for (size_t i = 0; i < count; ++i) {
    fibers[i].at = {unsigned(i % block.x), unsigned(i / block.x), 0};
    fibers[i].done = fibers[i].waits = false;
  }
  const size_t warps = count / 32;
  for (;;) {
    for (size_t n = 0; n < warps; ++n) {  // a warp runs as far ahead of the others as it can
      const size_t first = 32 * (reversed ? warps - 1 - n : n);
      do {
        for (size_t i = 0; i < 32; ++i) {
          Fiber& fiber = fibers[first + (reversed ? 31 - i : i)];
          if (!fiber.done && !fiber.waits) resume(fiber);
        }
      } while (release(first, first + 32, false));
    }
    size_t done = 0;
    for (size_t i = 0; i < count; ++i) done += fibers[i].done;
    if (done == count) return;
    if (!release(0, count, true)) stop("threads wait for others that do not come");
  }
}

}  // namespace emulator

// Read by kernels. The names are those of CUDA.
#define threadIdx (emulator::running->at)
inline uint3 blockIdx;
inline dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::wait(true); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  emulator::Fiber* self = emulator::running;
  self->given = value;
  emulator::wait(false);
  const float got = emulator::fibers[size_t(self - emulator::fibers.data()) ^ mask].given;
  emulator::wait(false);  // nobody gives the next value before all have taken this one
  return got;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// Packs of rows that were read: tells which way a kernel went. -fsanitize=alignment looks at each.
extern "C" {
__attribute__((visibility("default"))) inline long emulated_packs = 0;
}

template <typename V>
V __ldcs(const V* from) {
  ++emulated_packs;
  return *from;
}

namespace warploom {

inline int use_device(int) { return 0; }

template <typename A>
int launch(void (*kernel)(A), int64_t grid, dim3 block, void*, const A& arguments) {
  if (grid < 1 || grid > 0x7fffffff) emulator::stop("a grid must be 1 to 2^31 - 1 blocks");
  gridDim = dim3(unsigned(grid));
  blockDim = block;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx = {b, 0, 0};
    emulator::body = [&] { kernel(arguments); };
    emulator::run_block(block, b % 2);
  }
  return 0;
}

}  // namespace warploom

// Stands in for the header of the MACA SDK: the part of MACA C++ that generated kernels use, on an emulated machine.
//
// Kernels are compiled apart from the machine, with instrumented memory accesses (see sb_machine.cpp).
#pragma once
#include <math.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "sb_machine.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("sb_shared")))
#define SB_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(sb_dynamic_shared())

extern char __start_sb_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_sb_shared[] __attribute__((weak, visibility("hidden")));

namespace sb {

// A vector of clang's, without its operators: generated code uses elements only, as all compilers can.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
  __forceinline__ T& operator[](int i) { return element[i]; }
  __forceinline__ const T& operator[](int i) const { return element[i]; }
};
typedef Vector<int, 4> I32x4;
typedef Vector<float, 4> F32x4;
typedef Vector<double, 4> F64x4;

template <sb_mma_kind kind, size_t bytes, class X, class C>
__forceinline__ C mma(X x, X y, C c, int line) {
  static_assert(sizeof(X) == bytes, "a lane's part of X and Y has another size");
  uint64_t rows = 0, columns = 0;
  __builtin_memcpy(&rows, &x, bytes);
  __builtin_memcpy(&columns, &y, bytes);
  sb_mma(kind, rows, columns, &c, line);
  return c;
}

__forceinline__ I32x4 mma_i8(int x, int y, I32x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_I8, 4>(x, y, c, line);
}
template <class X>
__forceinline__ F32x4 mma_f16(X x, X y, F32x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_F16, 8>(x, y, c, line);
}
template <class X>
__forceinline__ F32x4 mma_bf16(X x, X y, F32x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_BF16, 8>(x, y, c, line);
}
__forceinline__ F32x4 mma_tf32(Vector<float, 2> x, Vector<float, 2> y, F32x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_TF32, 8>(x, y, c, line);
}
__forceinline__ F32x4 mma_f32(float x, float y, F32x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_F32, 4>(x, y, c, line);
}
__forceinline__ F64x4 mma_f64(double x, double y, F64x4 c, int line = __builtin_LINE()) {
  return mma<SB_MMA_F64, 8>(x, y, c, line);
}

#define SB_UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("undefined")))

template <class... A, size_t... I>
SB_UNCHECKED void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
SB_UNCHECKED void body(const void* kernel, void** arguments) {
  void (*typed)(A...) = reinterpret_cast<void (*)(A...)>(const_cast<void*>(kernel));
  call(typed, arguments, std::make_index_sequence<sizeof...(A)>{});
}

template <class T>
constexpr bool writable = false;
template <class T>
constexpr bool writable<T*> = true;
template <class T>
constexpr bool writable<const T*> = false;

template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
                   int order) {
  static constexpr bool kinds[] = {writable<std::remove_cv_t<A>>..., false};
  return sb_run(body<A...>, reinterpret_cast<const void*>(kernel), grid, block, shared, arguments, kinds, sizeof...(A),
                order, __start_sb_shared, __stop_sb_shared);
}

}  // namespace sb

#define __NATIVE_VECTOR__(count, type) sb::Vector<type, count>
#define __builtin_mxc_mma_16x16x16i8 sb::mma_i8
#define __builtin_mxc_mma_16x16x16f16 sb::mma_f16
#define __builtin_mxc_mma_16x16x16bf16 sb::mma_bf16
#define __builtin_mxc_mma_16x16x8tf32 sb::mma_tf32
#define __builtin_mxc_mma_16x16x4f32 sb::mma_f32
#define __builtin_mxc_mma_16x16x4f64 sb::mma_f64

#define threadIdx (sb_thread_index())
#define blockIdx (sb_block_index())
#define blockDim (sb_block_size())
#define gridDim (sb_grid_size())
#define warpSize 64

__forceinline__ int __lane_id() { return sb_lane(); }
__forceinline__ void __syncthreads(int line = __builtin_LINE()) { sb_barrier(line); }
__forceinline__ void __syncwarp(unsigned long long mask, int line = __builtin_LINE()) { sb_wave_barrier(mask, line); }
__forceinline__ unsigned long long __ballot_sync(unsigned long long mask, int predicate, int line = __builtin_LINE()) {
  return sb_ballot(mask, predicate, line);
}
__forceinline__ int __popc(unsigned bits) { return __builtin_popcount(bits); }
__forceinline__ int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned long long mask, T value, int distance, int width = 64,
                                  int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a lane shuffles 4 bytes");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = sb_shuffle_xor(mask, bits, distance, width, line);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

#define SB_CHECK(condition, message) ((condition) ? (void)0 : sb_fail(message, __LINE__))

// Gives a kernel the one launch signature: grid, block, dynamic shared bytes, arguments by address, thread order.
#define SB_LAUNCHER(name)                                                                                        \
  extern "C" __attribute__((visibility("default"))) const char* sb_launch_##name(                                \
      const unsigned* grid, const unsigned* block, unsigned shared, void** arguments, int order) {               \
    return sb::launch(name, grid, block, shared, arguments, order);                                              \
  }

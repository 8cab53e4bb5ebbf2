// What the tests share: buffers that behave like device memory, expectations, and a run under many schedules.
#pragma once
#include <chrono>
#include <cstdio>
#include <string>

#include "gpu_ops.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

using diffusion_runtime::BFloat16;
using diffusion_runtime::Float16;
using diffusion_runtime::launch;
using diffusion_runtime::to_float;

// Exactly as long as asked (the address sanitizer sees its end), 256-byte aligned, NaN until written.
template <class T>
struct Buffer {
  T* data;
  size_t size;
  explicit Buffer(size_t n) : size(n) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, n ? n * sizeof(T) : 1)) std::abort();
    data = static_cast<T*>(std::memset(p, 0xFF, n * sizeof(T)));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T& operator[](size_t i) { return data[i]; }
};

// In the address build, reading these elements is an error.
template <class T>
void forbid(T* first, size_t count) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(first, count * sizeof(T));
#else
  (void)first, (void)count;
#endif
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
inline Float16 from_float<Float16>(float x) {
  return __float2half(x);
}

inline int failures = 0;

// `where` says more, and is called only after a failure.
template <class F>
void expect(bool good, const char* what, F where) {
  if (!good && failures++ < 8) std::printf("FAILED %s: %s\n", what, std::string(where()).c_str());
}

inline std::string compare(double got, double expected) {
  return std::to_string(got) + ", expected " + std::to_string(expected);
}

inline std::string describe(const cuda_on_cpu::Schedule& s) {
  using cuda_on_cpu::Order;
  if (s.order == Order::random) return "random " + std::to_string(s.seed);
  return s.order == Order::in_order ? "in order" : "reversed";
}

// Runs `test` under every schedule; a kernel that reports an error fails the test. The thread sanitizer reports a race
// under any schedule, and is slow: one will do.
template <class F>
void under_schedules(int num_random, const char* what, F test) {
  const auto start = std::chrono::steady_clock::now();
  const auto test_one = [&] {
    try {
      test(describe(cuda_on_cpu::schedule));
    } catch (const cuda_on_cpu::Error& e) {
      expect(false, what, [&] { return describe(cuda_on_cpu::schedule) + ": " + e.what(); });
    }
  };
  if (cuda_on_cpu::watches_threads)
    test_one();
  else
    cuda_on_cpu::for_each_schedule(num_random, test_one);
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  std::printf("%-58s %6.0f ms\n", what, spent.count());
}

inline int finish(const char* test) {
  if (failures)
    std::printf("%s: %d failures\n", test, failures);
  else
    std::printf("%s: all good\n", test);
  return failures != 0;
}

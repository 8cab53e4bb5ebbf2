// What is known of a launch while it runs: its blocks, their warps and threads, and how they are to take turns.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs now

namespace cuda_on_cpu {

enum class Order { in_order, reversed, random };

struct Schedule {
  Order order = Order::in_order;
  uint64_t seed = 0;        // random only: even seeds interleave finely, odd seeds let one warp run far ahead
  int resident_blocks = 1;  // blocks that are interleaved with each other
};
inline Schedule schedule;

// The schedules a test should try: both extremes, then `num_random` seeded ones with up to four blocks in flight.
template <class F>
void for_each_schedule(int num_random, F run) {
  std::vector<Schedule> all = {{Order::in_order, 0, 1}, {Order::reversed, 0, 1}};
  for (int i = 0; i < num_random; i++) all.push_back({Order::random, uint64_t(i), 1 + i % 4});
  for (const Schedule& s : all) schedule = s, run();
  schedule = {};
}

// What launches did since the last reset; a test may hold a kernel to it.
struct Counters {
  uint64_t barriers, collectives, atomics, async_copies, matrix_loads, matrix_load_conflicts, matrix_products;
  uint64_t tile_copies, warpgroup_products;  // the latter by each of a warpgroup's four warps
};
inline Counters counters{};

inline int num_multiprocessors = 3;  // what a launcher is told

struct Place {  // a line of the kernel
  const char* file;
  int line;
  static constexpr Place current(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
};
#define CALLER cuda_on_cpu::Place here = cuda_on_cpu::Place::current()

struct Block;
struct Warp;
using Fence = std::shared_ptr<Clock>;  // what a thread had done when it fenced

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  WatchedStack stack;
  void* context = nullptr;  // where it stopped
  Block* block = nullptr;   // null: the main one, which launched the kernel
  Warp* warp = nullptr;
  unsigned lane = 0;
  dim3 index;
  bool done = false;
  // the meeting it waits for, and what it brings there
  const char* waits_for = nullptr;
  Place place{};
  const void* operation = nullptr;
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  // its last fence, and those that others published where it has since done an atomic
  Fence fence;
  std::vector<Fence> seen;
  // asynchronous copies issued and not yet performed, and where each committed group of them ends
  std::vector<AsyncCopy> copies;
  std::vector<size_t> groups;
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned exists = 0, ready = 0, meeting = 0;  // masks of lanes
  uint64_t priority = 0;
  unsigned phase = 0;
  Clock clocks[2];
};

struct Barrier {  // __syncthreads, or a barrier of some threads by its number
  std::vector<Fiber*> waiting;
  unsigned arrived = 0, phase = 0;
  Clock clocks[2];
};

struct Block {
  dim3 index;
  unsigned live = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier, numbered[16];
  char* shared = nullptr;
  std::map<const void*, std::shared_ptr<void>> objects;  // what an operation keeps behind an address or a thread
};

struct TileCopy {  // given to the copy engine, not yet performed
  Block* block;
  Place place;
  std::function<void()> perform;
};

struct Launch {
  Fiber main;
  std::function<void()> body;
  size_t shared_bytes = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // in flight
  std::vector<TileCopy> tile_copies;
  std::vector<WatchedStack> retired;  // kept to the end: a new fiber could be taken for the old one it replaces
  std::string error;
  uint64_t random = 1;
  Clock ends;
  std::map<const void*, std::vector<Fence>> published;  // by the address of the atomic that followed the fence
};
inline Launch* launch_state = nullptr;
inline Fiber* current = nullptr;

inline uint64_t next_random() {
  uint64_t z = launch_state->random += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

inline std::string name(const dim3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}
inline std::string name(Place p) { return std::string(p.file) + ":" + std::to_string(p.line); }
inline std::string name(const char* text) { return text; }
inline std::string name(unsigned number) { return std::to_string(number); }

}  // namespace cuda_on_cpu

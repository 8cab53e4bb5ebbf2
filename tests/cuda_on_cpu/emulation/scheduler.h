// A grid of CUDA threads on one CPU thread. Each is a fiber; one runs at a time and gives way only where CUDA threads
// meet (barriers, warp collectives) and at atomics, so a run is deterministic. `schedule` decides who goes next.
#pragma once
#include <algorithm>
#include <cstring>

#include "state.h"

namespace cuda_on_cpu {

UNWATCHED inline void entered() {
  current->stack.entered(launch_state->main.stack);
  threadIdx = current->index;
  if (current->block) blockIdx = current->block->index;
}

UNWATCHED inline void switch_to(Fiber& to) {
  Fiber& from = *current;
  if (&from == &to) return;
  current = &to;
  from.stack.leave_for(to.stack, from.done);
  swap_stacks(&from.context, to.context);
  entered();
}

// Ends the launch: `run` throws, the fibers are abandoned where they are.
template <class... Words>
[[noreturn]] void fail(Place here, Words... words) {
  Quiet quiet;
  std::string& e = launch_state->error;
  e = "block " + name(current->block->index) + " thread " + name(current->index) + ": " + name(here) + ": ";
  ((e += name(words)), ...);
  switch_to(launch_state->main);
  std::abort();
}

inline void perform_tile_copy() {
  std::vector<TileCopy>& all = launch_state->tile_copies;
  const size_t i = schedule.order == Order::in_order ? 0 : next_random() % all.size();
  const std::function<void()> perform = std::move(all[i].perform);
  all.erase(all.begin() + i);
  perform();
}

// The next to run: of the warps that can, the one of highest priority; of its lanes, as the order says.
inline Fiber& pick() {
  Launch& l = *launch_state;
  if (schedule.order == Order::random && !l.tile_copies.empty() && next_random() % 8 == 0) perform_tile_copy();
  Warp* best = nullptr;
  for (auto& block : l.blocks)
    for (Warp& w : block->warps)
      if (w.ready && (!best || w.priority > best->priority)) best = &w;
  if (!best) return l.main;
  if (schedule.order == Order::in_order) return best->lanes[__builtin_ctz(best->ready)];
  if (schedule.order == Order::reversed) return best->lanes[31 - __builtin_clz(best->ready)];
  if (schedule.seed % 2 == 0 || next_random() % 64 == 0) best->priority = next_random();
  const unsigned turn = next_random() % 32, turned = best->ready >> turn | uint64_t(best->ready) << (32 - turn);
  return best->lanes[(__builtin_ctz(turned) + turn) % 32];
}

inline void wait(const char* what, Place here) {
  current->waits_for = what, current->place = here;
  current->warp->ready &= ~(1u << current->lane);
  switch_to(pick());
}

inline void wake(Fiber& f) { f.warp->ready |= 1u << f.lane; }

// At atomics: now and then everyone else goes first.
inline void maybe_give_way() {
  if (schedule.order != Order::random || next_random() % 2) return;
  current->warp->priority >>= 32;
  switch_to(pick());
}

inline Fiber& end_fiber() {
  Quiet quiet;
  Launch& l = *launch_state;
  l.ends.release();
  current->done = true;
  current->warp->ready &= ~(1u << current->lane);
  if (--current->block->live) return pick();
  for (const TileCopy& copy : l.tile_copies)
    if (copy.block == current->block) l.error = name(copy.place) + ": the block ended before this copy arrived";
  return l.main;
}

UNWATCHED inline void fiber_main() {
  entered();
  launch_state->body();
  switch_to(end_fiber());
}

inline void start_block(dim3 index, uint64_t turn) {
  Launch& l = *launch_state;
  l.blocks.push_back(std::make_unique<Block>());
  Block& b = *l.blocks.back();
  b.index = index;
  b.live = blockDim.x * blockDim.y * blockDim.z;
  b.fibers.resize(b.live);
  b.warps.resize((b.live + 31) / 32);
  // Exactly the bytes asked for, so that the address sanitizer sees the end; all ones is NaN in every float type.
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, std::max<size_t>(l.shared_bytes, 1))) throw Error("no memory for a block");
  b.shared = static_cast<char*>(std::memset(shared, 0xFF, l.shared_bytes));
  for (unsigned i = 0; i < b.live; i++) {
    Fiber& f = b.fibers[i];
    Warp& w = b.warps[i / 32];
    if (i % 32 == 0) {
      w.lanes = &f;
      w.priority = schedule.order == Order::random     ? next_random()
                   : schedule.order == Order::in_order ? ~(turn * 64 + i / 32)
                                                       : turn * 64 + i / 32;
    }
    w.exists |= 1u << i % 32, w.ready |= 1u << i % 32;
    f.block = &b, f.warp = &w, f.lane = i % 32;
    f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    f.stack.low = new_stack(), f.stack.bytes = stack_bytes;
    f.stack.create();
    f.context = first_context(f.stack.low, fiber_main);
  }
}

inline void end_block(Block& b) {
  Launch& l = *launch_state;
  for (Fiber& f : b.fibers) {
    if (f.done) l.retired.push_back(f.stack);
    free_stack(f.stack.low);
    if (!watches_threads || f.done) continue;
    l.main.stack.leave_for(f.stack, false);  // abandoned after an error: the sanitizer hears of its end
    l.ends.release();
    f.stack.leave_for(l.main.stack, false);
  }
  std::free(b.shared);
}

// Everyone in flight, grouped by what they wait for.
inline std::string deadlock() {
  std::string text = "deadlock:";
  for (auto& b : launch_state->blocks) {
    std::map<std::string, std::vector<Fiber*>> groups;
    for (Fiber& f : b->fibers)
      groups[f.done ? "returned" : "wait at " + name(f.place) + " in " + f.waits_for].push_back(&f);
    text += " block " + name(b->index) + ":";
    for (auto& [what, who] : groups)
      text += " " + std::to_string(who.size()) + " threads " + what + ", the first " + name(who[0]->index) + ";";
  }
  return text;
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  if (launch_state) throw Error("a kernel cannot launch a kernel");
  Quiet quiet;
  Launch l;
  launch_state = &l, current = &l.main, gridDim = grid, blockDim = block;
  l.body = std::move(body), l.shared_bytes = shared_bytes, l.random = schedule.seed;
  l.main.stack.adopt();
  const size_t num_blocks = size_t(grid.x) * grid.y * grid.z;
  std::vector<size_t> order(num_blocks);
  for (size_t i = 0; i < num_blocks; i++) order[i] = schedule.order == Order::reversed ? num_blocks - 1 - i : i;
  if (schedule.order == Order::random)
    for (size_t i = num_blocks; i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
  size_t started = 0;
  while (l.error.empty() && (started < num_blocks || !l.blocks.empty())) {
    for (; started < num_blocks && int(l.blocks.size()) < schedule.resident_blocks; started++) {
      size_t i = order[started];
      start_block(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), i);
    }
    Fiber& next = pick();
    if (&next != &l.main)
      switch_to(next);  // comes back when a block has ended or nobody can go on
    else if (!l.tile_copies.empty())
      perform_tile_copy();
    else
      l.error = deadlock();
    auto ended = [](auto& b) { return b->live == 0 && (end_block(*b), true); };
    l.blocks.erase(std::remove_if(l.blocks.begin(), l.blocks.end(), ended), l.blocks.end());
  }
  for (auto& b : l.blocks) end_block(*b);
  l.ends.acquire();
  for (WatchedStack& s : l.retired) s.destroy();
  launch_state = nullptr, current = nullptr;
  if (!l.error.empty()) throw Error(l.error);
}

}  // namespace cuda_on_cpu

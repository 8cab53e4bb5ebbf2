// Where CUDA threads meet: warp collectives, __syncthreads, atomics; and the checks of what they touch.
#pragma once
#include <type_traits>

#include "scheduler.h"

namespace cuda_on_cpu {

// Once every lane of `mask` has called, one of them runs compute(in, out): arrays of pointers by lane, null outside.
template <class Out, class In, class F>
Out collective(const char* what, unsigned mask, const In& in, Place here, F compute) {
  static const char operation = 0;  // its address tells one F from another
  Quiet quiet;
  Fiber& me = *current;
  Warp& w = *me.warp;
  Out out{};
  mask &= w.exists;
  if (!(mask >> me.lane & 1)) fail(here, what, ": the mask does not name the calling lane");
  me.operation = &operation, me.mask = mask, me.in = &in, me.out = &out, me.place = here;
  w.meeting |= 1u << me.lane;
  if ((w.meeting & mask) != mask) return wait(what, here), out;
  const In* ins[32] = {};
  Out* outs[32] = {};
  for (unsigned l = 0; l < 32; l++) {
    Fiber& f = w.lanes[l];
    if (!(mask >> l & 1)) continue;
    if (f.operation != &operation || f.mask != mask || f.place.line != here.line)
      fail(here, what, ": lane ", l, " of the mask is at ", f.place);
    ins[l] = static_cast<const In*>(f.in), outs[l] = static_cast<Out*>(f.out);
  }
  compute(ins, outs);
  counters.collectives++;
  w.meeting &= ~mask, w.ready |= mask, w.phase++;
  switch_to(pick());
  return out;
}

// Until `count` threads have come to the barrier; who does not wait goes on at once. Two clocks take turns, so that the
// next round does not order this one.
inline void meet(Barrier& b, const char* what, size_t count, bool waits, Place here) {
  Quiet quiet;
  if (waits && !b.waiting.empty() && b.waiting[0]->place.line != here.line)
    fail(here, what, ": another thread of the block is at ", b.waiting[0]->place);
  Clock& clock = b.clocks[b.phase & 1];
  clock.release();
  if (waits) b.waiting.push_back(current);
  if (++b.arrived < count) {
    if (waits) wait(what, here);
  } else {
    for (Fiber* f : b.waiting) wake(*f);
    b.waiting.clear(), b.arrived = 0, b.phase++, counters.barriers++;
    if (waits) switch_to(pick());
  }
  if (waits) clock.acquire();
}

// __syncthreads. It needs every thread of the block: where some have returned, the rest wait for ever, a deadlock.
inline void block_barrier(Place here) {
  meet(current->block->barrier, "__syncthreads", current->block->fibers.size(), true, here);
}

// Memory is ordered from one thread to another by a fence, an atomic, an atomic at the same address, a fence.
inline void fence() {
  if (!watches_threads) return;
  Quiet quiet;
  for (Fence& other : current->seen) other->acquire();
  current->seen.clear();
  current->fence = std::make_shared<Clock>();
  current->fence->release();
}

template <class T, class F>
T atomic(T* p, F next) {
  Quiet quiet;
  maybe_give_way();
  if (watches_threads) {
    std::vector<Fence>& fences = launch_state->published[p];
    current->seen.insert(current->seen.end(), fences.begin(), fences.end());
    if (current->fence) fences.push_back(current->fence);
  }
  const T old = *p;
  *p = next(old), counters.atomics++;
  maybe_give_way();
  return old;
}

template <class T>
T& shared_memory(Place here) {
  static_assert(std::is_trivially_default_constructible<T>::value, "nobody constructs shared memory");
  if (sizeof(T) > launch_state->shared_bytes) fail(here, "more shared memory is used than the launch asked for");
  return *reinterpret_cast<T*>(current->block->shared);
}

inline void check_aligned(const void* p, unsigned bytes, Place here) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(here, "the address is no multiple of ", bytes);
}

}  // namespace cuda_on_cpu

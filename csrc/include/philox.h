// The random numbers of every backend: Philox4x32-10 (Salmon et al., SC 2011), keyed by the logical place of a draw.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace diffusion_runtime {

// What a draw is for; two kinds at one place and step are independent.
enum DrawKind : uint32_t { kDrawToken = 0, kDrawNoise = 2 };  // 1 is the order of positions, in torch only

// Two independent numbers in [0, 1), each a multiple of 2^-53.
struct Uniforms {
  double first, second;
};

HOST_DEVICE double uniform_of_words(uint32_t low, uint32_t high) {
  const uint64_t bits = (uint64_t{high} << 32 | low) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// key = seed, counter = (position, step, kind, 0).
HOST_DEVICE Uniforms philox_uniforms(uint64_t seed, uint32_t position, uint32_t step, uint32_t kind) {
  uint32_t c0 = position, c1 = step, c2 = kind, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {uniform_of_words(c0, c1), uniform_of_words(c2, c3)};
}

}  // namespace diffusion_runtime

"""What is broken in commit_step, one place at a time: (file, what, the text, what stands there instead)."""

from __future__ import annotations

TEST = "commit"
KERNEL, RULES, STEP = "csrc/cuda/commit.cu", "csrc/include/commit_rules.h", "csrc/include/commit_step.h"

MUTATIONS = [
    (KERNEL, "nothing", "", ""),
    (KERNEL, "no barrier before a tile is stored", "    __syncthreads();  // the tile before has been read\n", ""),
    (
        KERNEL,
        "no barrier before a tile is read",
        "    __syncthreads();\n    const int count",
        "    const int count",
    ),
    (KERNEL, "no barrier before the last is read", "  __syncthreads();\n  const int last", "  const int last"),
    (
        KERNEL,
        "the last position is not counted",
        "min(kThreads, int(s.length) - first)",
        "min(kThreads, int(s.length) - first - 1)",
    ),
    (KERNEL, "positions that are not masked count", "!shared.masked[i] || ", ""),
    (KERNEL, "places in a tile count from 0", "shared.score[i], first + i, score", "shared.score[i], i, score"),
    (KERNEL, "the sum counts the position itself", "found.sum_before)", "found.sum_before + score)"),
    (KERNEL, "the number counts from 0", "bound, found.before + 1, score", "bound, found.before, score"),
    (
        KERNEL,
        "the last is one too few",
        "atomicMax(&shared.last, found.before + 1)",
        "atomicMax(&shared.last, found.before)",
    ),
    (KERNEL, "the smallest instead of the largest", "atomicMax", "atomicMin"),
    (KERNEL, "one position more", "found.before < last", "found.before <= last"),
    (
        KERNEL,
        "only masked positions go to the barriers",
        "= standing(s, row, place, masked, score, shared);",
        "= masked ? standing(s, row, place, masked, score, shared) : Standing{0, 0};",
    ),
    (KERNEL, "the mask is not stored", "s.commit_mask[row * s.length + place] = committed", "(void)committed"),
    (KERNEL, "nothing must be committed", "s.rule == CommitRule::Quota ? 0 : 1", "0"),
    (KERNEL, "the quota is at least one", "s.rule == CommitRule::Quota ? 0 : 1", "1"),
    (RULES, "ties go to the higher place", "place_a < place_b", "place_a > place_b"),
    (RULES, "NaN comes first", "return b != b;", "return a != a;"),
    (RULES, "entropies are sorted like confidences", "EntropyBound ? a < b : a > b", "EntropyBound ? a > b : a > b"),
    (RULES, "above the threshold only", "score >= bound", "score > bound"),
    (RULES, "a factor of n", "(number + 1) * (1 -", "(number) * (1 -"),
    (RULES, "a factor that may be met", "score)) < bound", "score)) <= bound"),
    (RULES, "an entropy bound that must not be met", "sum_before <= bound", "sum_before < bound"),
    (RULES, "the noise is that of the tokens", "kDrawNoise).first", "kDrawToken).first"),
    (RULES, "the second uniform", "kDrawNoise).first", "kDrawNoise).second"),
    (STEP, "positions that are not masked are renoised", "vocab == 0 || !masked_here", "vocab == 0"),
    (STEP, "the position is not used", "position.values != nullptr ? position.at(row, place) : place", "place"),
    (STEP, "one row's bound for all", "bounds[row * bound_stride]", "bounds[0]"),
    (STEP, "the batch stride is not used", "values[row * batch_stride +", "values["),
    (KERNEL, "entropies are summed in float32", "double sum_before;", "float sum_before;"),
    (RULES, "a factor in float32", "(1 - static_cast<double>(score))", "(1 - score)"),
    (
        RULES,
        "-0 is ordered apart from 0",
        "if (a == b ||",
        "if (a == 0 && b == 0 && 1 / a != 1 / b) return 1 / a < 1 / b;\n  if (a == b ||",
    ),
    (STEP, "a batch stride is cut to 32 bits", "row * batch_stride +", "row * int(batch_stride) +"),
    (STEP, "one step for a row", "step.at(row, place)", "step.at(row, 0)"),
]

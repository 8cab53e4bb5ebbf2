"""What is broken in attention for every GPU, one place at a time: (file, what, the text, what stands there instead)."""

from __future__ import annotations

TEST = "attention"
HOST, KERNEL = "csrc/cuda/attention.cu", "csrc/cuda/attention_kernel.cuh"
PRODUCTS, GRID = "csrc/cuda/attention_products.cuh", "csrc/cuda/attention_grid.cuh"
CHUNKS = "csrc/cuda/attention_chunks.cuh"

MUTATIONS = [
    (KERNEL, "nothing", "", ""),
    # ordering
    (KERNEL, "blocks are multiplied before they are there", "async_copy_wait<1>();", "async_copy_wait<2>();"),
    (
        KERNEL,
        "a stage is not waited for by all",
        "    async_copy_wait<1>();\n    __syncthreads();",
        "    async_copy_wait<1>();",
    ),
    (KERNEL, "a stage is copied into while it is read", "    __syncthreads();  // the next", "    // the next"),
    (KERNEL, "one stage for all", "shared.value[i % 2]);\n  };", "shared.value[0]);\n  };"),
    (PRODUCTS, "weights are read before all are written", "= weights[i];\n  __syncwarp();", "= weights[i];"),
    (CHUNKS, "no fence before the ticket", "    __threadfence();\n    is_last", "    is_last"),
    (CHUNKS, "the ticket is not handed back", "    if (is_last) *ticket = 0;\n", ""),
    # what is read
    (KERNEL, "keys behind the block's are read", "min(t.seen.high - b.position, b.count)", "t.seen.high - b.position"),
    (KERNEL, "values that nobody sees are multiplied", "r < low || r >= high", "r >= high"),
    (KERNEL, "elements behind the head are read", "first + e < size ? from", "first < size ? from"),
    (KERNEL, "queries behind the head are read", "if (first + e < p.a.head_dim) vector", "vector"),
    (KERNEL, "queries behind the last are read", "t.first + r < t.rows && first", "first"),
    (KERNEL, "the first page of all", "+ row / p.a.page_size]", "+ 0 * row]"),
    (KERNEL, "rows of the first page", "row %= p.a.page_size;", "row %= 1;"),
    (KERNEL, "the first real key is not looked for", "row += t.s.first_key;", "row += 0;"),
    (KERNEL, "the keys of the first head", "+ t.kv_head * from.head;", ";"),
    (KERNEL, "the prefix of the first sequence", "b.prefix ? t.sequence : t.s.batch;", "t.s.batch;"),
    (HOST, "all rows count as aligned", "return dim % kSize == 0 &&", "return true ||"),
    # the products
    (
        PRODUCTS,
        "halves of the keys change places",
        "n * 8 + matrix / 2 * 8 + row, k * 2 + matrix % 2",
        "n * 8 + matrix % 2 * 8 + row, k * 2 + matrix / 2",
    ),
    (PRODUCTS, "the same queries for every warp", "place<T, kDim>(first + lane % 16", "place<T, kDim>(lane % 16"),
    (PRODUCTS, "the first of four products of queries", "k * 2 + lane / 16));", "lane / 16));"),
    (PRODUCTS, "weights of other keys", "weights[k * 8 + 2 * i]", "weights[2 * i]"),
    (PRODUCTS, "the first columns for both warpgroups", "column / 8 + n + matrix / 2", "n + matrix / 2"),
    (
        PRODUCTS,
        "float32: one element of four",
        "for (int e = 0; e < 4; ++e)\n            scores",
        "for (int e = 0; e < 1; ++e)\n            scores",
    ),
    (
        PRODUCTS,
        "float32: a key is left out",
        "for (int k = 0; k < kKeys; ++k) {\n    const float weight",
        "for (int k = 1; k < kKeys; ++k) {\n    const float weight",
    ),
    # scores
    (KERNEL, "the sign of the scale is lost", "if (p.negated) {", "if (false) {"),
    (KERNEL, "a scale of 0 keeps the queries", " && !p.zero) {", ") {"),
    (KERNEL, "a mask on scores that are not scaled", "a.softcap > 0 ? 1 : p.size;", "1;"),
    (KERNEL, "a softcapped score is scaled again", "a.softcap > 0 ? 1 : p.size;", "p.size;"),
    (KERNEL, "a mask of the first sequence", "element_of(t, p, a.mask_batch, a", "element_of(t, p, 0, a"),
    (KERNEL, "a mask's padding is not skipped", "(t.s.first_key + b.row + first) * a", "(b.row + first) * a"),
    (KERNEL, "a mask is read behind its end", "if (first + column < b.count) scores", "scores"),
    (KERNEL, "a bool mask is turned round", "[at] ? score : -INFINITY;", "[at] ? -INFINITY : score;"),
    (GRID, "masked scores are scaled twice", "a.softcap > 0 || a.mask_type != MaskType::None ? 1", "a.softcap > 0 ? 1"),
    # the sums
    (KERNEL, "sums are not rescaled", "    rows.rescale_sums(sums);\n", ""),
    (KERNEL, "chunks are one", "if (i > 0 && b.number / kChunk != number / kChunk)", "if (false)"),
    (KERNEL, "the last chunk is left out", "    add_chunk(total, part, sums, memory, false);\n", ""),
    (
        KERNEL,
        "every block of threads is a whole tile",
        "      limit_to_chunk<Sizes::kKeys, Sizes::kChunk>(t, blockIdx.y);\n",
        "",
    ),
    (
        KERNEL,
        "rows that see nothing are nobody's",
        "if (chunks.count() > 0 ? !chunks.has(blockIdx.y) : blockIdx.y > 0) return;",
        "if (!chunks.has(blockIdx.y)) return;",
    ),
    # what is written
    (KERNEL, "values behind the head are written", "if (at < p.a.value_dim) out", "out"),
    (KERNEL, "rows behind the last are written", "    if (rows.row[r] >= t.rows) continue;\n", ""),
    (KERNEL, "the sum is not divided by", "fmaf(sums[i + j], inverse, 0)", "sums[i + j]"),
    (KERNEL, "a logsumexp in powers of two", "part.largest[r] * float(kLn2)", "part.largest[r]"),
]

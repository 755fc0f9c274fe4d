// Factored tables: LUT product sums by tensor cores.
//
//   out[m, n] = Σ_k (Σ_p u[p][x[m, k]]·v[p][w[n, k]] + by_row[x[m, k]] + by_column[w[n, k]])      u uint8, v int8
//
// A pass takes SLOTS of the p's, 8 or 4, through all k's; what fills up the last pass is zeros; the sums stay in registers.
// A warp owns 16·FRAGMENTS columns n (lanes) and 8·ROWS rows m (output pixels); the warps of a block share their lanes and
// differ in their pixels. One mma.m16n8k32 adds, to 16 lanes × 8 pixels, a product of depth 32:
//
//     thread t of a quad         t = 0        1       2       3     0       1       2       3
//     depth                      0 … 3     4 … 7   8 … 11  …                              … 31
//     8 slots of 4 k's           k0: 0–3   k1: 0–3  k2      k3      k0: 4–7  k1: 4–7  k2      k3
//     4 slots of 8 k's           k0: 0–3   k1: 0–3  k2      k3      k4: 0–3  k5: 0–3  k6      k7
//
// A thread's k's are its own, so that b, the pixels' operand, is one 64-bit read (of 4 slots two of 32 bits) of the code's
// features from a table in shared memory, without conflicts: all threads that read together have copies of their own.
//
//     code a:   u[0..7][a]  u[0..7][a]  …  16 copies (of 4 slots 32): a line of 128 bytes        32 KiB a pass
//
// a, the lanes' operand, is packed in that order and comes through shared memory, by cp.async into one of two stages while
// the other is multiplied; one barrier a stage. A stage is 32 k's: an octet (packing.cuh) for each thread of a quad, whose
// t'th walks through the t'th quarter of all octets. Octets and channels that fill up are masked in v's features: whatever
// u says, they add 0.
//
//   w_packed:  [group][pass][stage][16 lanes][mma][thread of the warp] 16 bytes: of lanes g and g + 8, then both again
//
// by_row and by_column are sums over k that no tensor core need add, and begin the sums: for each lane its own, and for
// each padded pixel that over its channels (of which a sum then takes its taps). As slots they would take up to five
// (digits of int32), each as dear as a rank; so they cost a byte per code of x and w once.
// All sums are modulo 2^32: whatever wraps on the way, the result is right if it fits.
// Splits of the stages (grid.y) add to out, which `factored_pack` has cleared: exact in any order.
#pragma once

#include "packing.cuh"

constexpr int WARP = 32;
constexpr int THREADS = 256;                         // most threads a block: 255 registers each
constexpr int FRAGMENT_LANES = 16;                   // of one mma
constexpr int FRAGMENT_PIXELS = 8;
constexpr int STAGE_OCTETS = 4;                      // one for each thread of a quad
constexpr int LINE_BYTES = 128;                      // all banks
constexpr int TABLE_BYTES = CODES * LINE_BYTES;      // 32 KiB
constexpr int SLOT_VECTORS = WARP;                   // 16 bytes each of w_packed: 16 lanes, a stage, a slot
#if __CUDA_ARCH__ >= 1000
constexpr int UNROLLED_STEPS = 1;  // more do not fit the registers with that compiler
#else
constexpr int UNROLLED_STEPS = 2;
#endif
static_assert(OCTET == 8 && STAGE_OCTETS == 4, "an mma's depth is 8 slots of 4 k's or 4 slots of 8");

// Stages of a pass.
__device__ inline int stages_of(const Packed& packed) { return ceil_div(packed.stages, STAGE_OCTETS); }

// ---- what is PTX on a GPU -------------------------------------------------------------------------------------------

// sums[f][i] += a[f]·b[i] for fragments of signed a (16 × 32) and unsigned b (32 × 8), as mma.m16n8k32 lays them out.
// sm_75 has tensor cores that take a quarter of it at a time, with the same fragments: faster than its dp4a.
template <int FRAGMENTS, int ROWS>
__device__ inline void multiply(int (&sums)[FRAGMENTS][ROWS][4], const unsigned (&a)[FRAGMENTS][4],
                                const unsigned (&b)[ROWS][2]) {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            int(&c)[4] = sums[f][i];
#if __CUDA_ARCH__ >= 800
            asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                         : "r"(a[f][0]), "r"(a[f][1]), "r"(a[f][2]), "r"(a[f][3]), "r"(b[i][0]), "r"(b[i][1]));
#else
            // Quarters: lanes g or g + 8, the lower or the upper half of the depth.
#pragma unroll
            for (int q = 0; q < 4; ++q)
                asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                             : "+r"(c[q % 2 * 2]), "+r"(c[q % 2 * 2 + 1])
                             : "r"(a[f][q]), "r"(b[i][q / 2]));
#endif
        }
#else
    cuda_on_host::mma_m16n8k32(sums, a, b);
#endif
}

// 16 bytes from global to shared memory, there after wait_for_copies.
__device__ inline void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
#elif defined(__CUDA_ARCH__)
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#else
    cuda_on_host::copy_async<16>(to, from);
#endif
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#elif !defined(__CUDA_ARCH__)
    cuda_on_host::wait_for_copies();
#endif
}

// ---- operands -------------------------------------------------------------------------------------------------------

// Four slots of v for the weight that lane n has at a channel of an octet, zeros where there is none.
__device__ inline unsigned features(const code* w, const signed char* v, const Geometry& g, const Walk& walk, int n,
                                    int channel, int terms) {
    if (n >= g.lanes || channel >= walk.channels_left()) return 0;
    const code weight = w[n * g.w_lane + (walk.octet * OCTET + channel) * g.w_channel + walk.r * g.w_row +
                          walk.s * g.w_col];
    unsigned word = 0;
#pragma unroll
    for (int p = 0; p < 4; ++p)
        if (p < terms) word |= unsigned(code(v[p * CODES + weight])) << p * 8;
    return word;
}

// 16 bytes of w_packed, with `slots` slots a pass; `at` is their index in it.
__device__ inline uint4 packed_fragment(const code* w, const signed char* v, const Geometry& g, const Packed& packed,
                                        int at, int terms, int slots) {
    const int thread = at % WARP, step = at / WARP % slots, tile = at / (WARP * slots) % packed.tiles;
    const int stages = stages_of(packed), stage = at / (WARP * slots * packed.tiles) % stages;
    const int pass = at / (WARP * slots * packed.tiles * stages) % ceil_div(terms, slots);
    const int group = at / (WARP * slots * packed.tiles * stages) / ceil_div(terms, slots);
    const Walk walk(g, packed, thread % 4 * stages + stage);  // past the last octet no channels are left
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int lane = tile * FRAGMENT_LANES + thread / 4 + i % 2 * 8;
        const int p = pass * slots + (slots == 8 ? i / 2 * 4 : 0), channel = slots == 8 ? step : step * 2 + i / 2;
        words[i] = features(w + group * g.w_group, v + p * CODES, g, walk, lane, channel, terms - p);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// A warp's sum over the k's of a lane.
__device__ inline void sum_lane(const code* w, const int* by_column, int* by_lane, const Geometry& g, int job) {
    w += job / g.lanes * g.w_group + job % g.lanes * g.w_lane;
    unsigned sum = 0;
    for (int k = threadIdx.x % WARP; k < g.channels * g.taps(); k += WARP) {
        const int tap = k % g.taps();
        sum += unsigned(by_column[w[k / g.taps() * g.w_channel + tap / g.kernel_w * g.w_row + tap % g.kernel_w * g.w_col]]);
    }
#pragma unroll
    for (int by = WARP / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, by);
    if (threadIdx.x % WARP == 0) by_lane[job] = int(sum);
}

// A thread's sum over the channels of a padded pixel.
__device__ inline void sum_pixel(const code* x, const int* by_row, int* by_pixel, const Geometry& g,
                                 const Packed& packed, int job) {
    const int pixels = packed.plane / OCTET;
    const int col = job % packed.width - g.pad_w, row = job / packed.width % packed.height - g.pad_h;
    const bool inside = row >= 0 && row < g.height && col >= 0 && col < g.width;
    x += job / pixels * g.x_group;
    x += inside ? job % pixels / (packed.width * packed.height) * g.x_image + row * g.x_row + col * g.x_col : 0;
    unsigned sum = 0;
    for (int c = 0; c < g.channels; ++c) sum += unsigned(by_row[inside ? x[c * g.x_channel] : g.pad_code]);
    by_pixel[job] = int(sum);
}

// How many blocks of `factored_pack` have jobs of each kind, in this order.
struct PackBlocks {
    int octets, fragments, lanes, pixels, zeros;
};

// A thread's job is 8 codes of x, 16 bytes of w, the sum of a pixel or a zero in out; a warp's the sum of a lane.
__device__ inline void factored_pack(const code* x, const code* w, const signed char* v, const int* by_column,
                                     const int* by_row, uint2* x_packed, uint4* w_packed, int* by_lane, int* by_pixel,
                                     int* out, const Geometry& g, const PackBlocks& blocks, int terms,
                                     int slots) {
    const Packed packed(g, FRAGMENT_LANES);
    const int pixels = packed.plane / OCTET;
    int block = blockIdx.x;
    const auto job = [&] { return block * PACK_THREADS + int(threadIdx.x); };
    if (block < blocks.octets) {
        if (job() < g.groups * packed.octets * pixels) x_packed[job()] = packed_octet(x, g, packed, job());
    } else if ((block -= blocks.octets) < blocks.fragments) {
        const int of_group = ceil_div(terms, slots) * slots * stages_of(packed) * packed.tiles * SLOT_VECTORS;
        if (job() < g.groups * of_group) w_packed[job()] = packed_fragment(w, v, g, packed, job(), terms, slots);
    } else if ((block -= blocks.fragments) < blocks.lanes) {
        if (job() / WARP < g.groups * g.lanes) sum_lane(w, by_column, by_lane, g, job() / WARP);
    } else if ((block -= blocks.lanes) < blocks.pixels) {
        if (job() < g.groups * pixels) sum_pixel(x, by_row, by_pixel, g, packed, job());
    } else {
        block -= blocks.pixels;
        const int pixel = job() % g.pixels(), lane = job() / g.pixels() % g.lanes, group = job() / g.pixels() / g.lanes;
        if (group < g.groups) out[group * g.out_group + lane * g.out_lane + g.out_at(pixel)] = 0;
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// A pass's table. Threads write copies in turns of their own: 16 or 32 different ones at a time.
template <int SLOTS>
__device__ void fill_table(char* table, const code* u, int terms) {
    constexpr int COPIES = LINE_BYTES / SLOTS;
#pragma unroll 1
    for (int a = threadIdx.x; a < CODES; a += blockDim.x) {
        unsigned words[2] = {0, 0};
#pragma unroll
        for (int p = 0; p < SLOTS; ++p)
            if (p < terms) words[p / 4] |= unsigned(u[p * CODES + a]) << p % 4 * 8;
#pragma unroll 4
        for (int i = 0; i < COPIES; ++i) {
            char* to = table + a * LINE_BYTES + (i + a) % COPIES * SLOTS;
            if constexpr (SLOTS == 8)
                *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
            else
                *reinterpret_cast<unsigned*>(to) = words[0];
        }
    }
}

// Add the products of half a stage, from a fragment's 16 bytes a thread at `stage` on. `codes` are four of this thread's
// octets each, one a pixel fragment.
template <int SLOTS, int FRAGMENTS, int ROWS>
__device__ void multiply_half(int (&sums)[FRAGMENTS][ROWS][4], const char* table, const char* stage,
                              const unsigned (&codes)[ROWS]) {
    const unsigned thread = threadIdx.x % WARP, copy = thread * SLOTS % LINE_BYTES;
#pragma unroll UNROLLED_STEPS
    for (int step = 0; step < SLOTS / 2; ++step) {
        unsigned a[FRAGMENTS][4], b[ROWS][2];
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
            const uint4 lanes = *reinterpret_cast<const uint4*>(stage + ((f * SLOTS + step) * WARP + thread) * 16);
            a[f][0] = lanes.x, a[f][1] = lanes.y, a[f][2] = lanes.z, a[f][3] = lanes.w;
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            // One dp4a: code·LINE_BYTES + copy.
            if constexpr (SLOTS == 8) {
                const unsigned at = __dp4a(codes[i], unsigned(LINE_BYTES) << step * 8, copy);
                const uint2 pixel = *reinterpret_cast<const uint2*>(table + at);
                b[i][0] = pixel.x, b[i][1] = pixel.y;
            } else {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const unsigned at = __dp4a(codes[i], unsigned(LINE_BYTES) << (step * 2 + k) * 8, copy);
                    b[i][k] = *reinterpret_cast<const unsigned*>(table + at);
                }
            }
        }
        multiply(sums, a, b);
    }
}

// Add the products of SLOTS slots. x_at and w_at are where the group's octets and the pass's fragments lie: packed
// operands are far below 4 GiB, and 32-bit offsets from the parameters spare registers.
template <int SLOTS, int FRAGMENTS, int ROWS>
__device__ void pass(int (&sums)[FRAGMENTS][ROWS][4], char* shared, const code* x, unsigned x_at,
                     const int (&row_at)[ROWS], const uint4* w, unsigned w_at, int first_tile, const code* u, int terms,
                     int begin, int end, const Geometry& g, const Packed& packed) {
    constexpr int VECTORS = SLOTS * SLOT_VECTORS, STAGE_BYTES = FRAGMENTS * VECTORS * 16;  // of 16 lanes; of all
    char* stages = shared + TABLE_BYTES;
    int half = 0;  // where the stage lies that is being multiplied
    const auto fetch = [&](int stage, int to) {
#pragma unroll 1
        for (int at = threadIdx.x; at < FRAGMENTS * VECTORS; at += blockDim.x) {
            const int tile = min(first_tile + at / VECTORS, packed.tiles - 1);  // past the last one: not written
            copy_async(stages + to + at * 16, w + (w_at + (stage * packed.tiles + tile) * VECTORS + at % VECTORS));
        }
    };
    // Past the last octet that one's codes are read, and multiplied by zeros.
    int octet = threadIdx.x % STAGE_OCTETS * stages_of(packed) + begin;
    Walk walk(g, packed, min(octet, packed.stages - 1));
    x_at += walk.shift();
    // Halves of this thread's octets, each read again while the other is multiplied: that spares registers.
    unsigned low[ROWS], high[ROWS];
    const auto read = [&](unsigned(&codes)[ROWS], unsigned from) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) codes[i] = *reinterpret_cast<const unsigned*>(x + (from + row_at[i]));
    };
    read(low, x_at), read(high, x_at + OCTET / 2);
    __syncthreads();  // the pass before has been read
    fetch(begin, half);
    fill_table<SLOTS>(shared, u, terms);
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage, half ^= STAGE_BYTES) {
        wait_for_copies();
        __syncthreads();
        if (stage + 1 < end) fetch(stage + 1, half ^ STAGE_BYTES);
        if (++octet < packed.stages) x_at += walk.next();
        multiply_half<SLOTS>(sums, shared, stages + half, low);
        read(low, x_at);
        multiply_half<SLOTS>(sums, shared, stages + half + VECTORS / 2 * 16, high);
        read(high, x_at + OCTET / 2);
    }
}

// grid.x runs over the pixel tiles of a lane tile (fastest: blocks that run together share its weights), lane tiles and
// groups; grid.y over the splits. by_pixel is read where there is a by_row.
template <int SLOTS, int FRAGMENTS, int ROWS>
__device__ void factored(const code* x, const uint4* w, const code* u, const int* by_lane, const int* by_pixel, int* out,
                         const Geometry& g, int terms, int has_by_row) {
    constexpr int PIXELS = ROWS * FRAGMENT_PIXELS;
    extern __shared__ __align__(16) char shared[];
    const Packed packed(g, FRAGMENT_LANES);
    const int thread = threadIdx.x % WARP, quad = thread / 4, of_quad = thread % 4;
    const int pixel_tiles = ceil_div(g.pixels(), int(blockDim.x) / WARP * PIXELS);
    const int lane_tiles = ceil_div(packed.tiles, FRAGMENTS), job = blockIdx.x / pixel_tiles;
    const int group = job / lane_tiles, first_tile = job % lane_tiles * FRAGMENTS;
    const int warp = threadIdx.x / WARP, first_lane = first_tile * FRAGMENT_LANES + quad;
    const int first_pixel = (blockIdx.x % pixel_tiles * (blockDim.x / WARP) + warp) * PIXELS;

    // What takes divisions is worked out once a pixel, and handed over where the table will be.
    int row_at[ROWS], sums[FRAGMENTS][ROWS][4];
    int2* of_pixels = reinterpret_cast<int2*>(shared) + warp * PIXELS;
    for (int i = thread; i < PIXELS; i += WARP) {
        of_pixels[i].x = packed.row_at(g, min(first_pixel + i, g.pixels() - 1));  // past the last one: not written
        unsigned start = 0;
        if (has_by_row && blockIdx.y == 0) {
            const int* from = by_pixel + (group * packed.plane + of_pixels[i].x) / OCTET;
            for (int r = 0; r < g.kernel_h; ++r)
                for (int s = 0; s < g.kernel_w; ++s) start += unsigned(from[r * g.dil_h * packed.width + s * g.dil_w]);
        }
        of_pixels[i].y = int(start);
    }
    __syncwarp();
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int lane = group * g.lanes + min(first_lane + f * FRAGMENT_LANES + j / 2 * 8, g.lanes - 1);
            const unsigned start = blockIdx.y == 0 ? by_lane[lane] : 0;
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                sums[f][i][j] = int(start + unsigned(of_pixels[i * FRAGMENT_PIXELS + of_quad * 2 + j % 2].y));
        }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) row_at[i] = of_pixels[i * FRAGMENT_PIXELS + quad].x;

    const int stages = stages_of(packed), pass_vectors = SLOTS * stages * packed.tiles * SLOT_VECTORS;
    const int begin = int(int64(stages) * blockIdx.y / gridDim.y);
    const int end = int(int64(stages) * (blockIdx.y + 1) / gridDim.y);
    const unsigned x_at = group * packed.octets * packed.plane;
    unsigned w_at = group * ceil_div(terms, SLOTS) * pass_vectors;
#pragma unroll 1
    for (; terms > 0; terms -= SLOTS, u += SLOTS * CODES, w_at += pass_vectors)
        pass<SLOTS>(sums, shared, x, x_at, row_at, w, w_at, first_tile, u, terms, begin, end, g, packed);

    __syncthreads();  // the last pass has been read
    int64* out_at = reinterpret_cast<int64*>(shared) + warp * PIXELS;
    for (int i = thread; i < PIXELS; i += WARP)
        out_at[i] = first_pixel + i < g.pixels() ? group * g.out_group + g.out_at(first_pixel + i) : -1;
    __syncwarp();
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int lane = first_lane + f * FRAGMENT_LANES + h * 8;
            int* of_lane = out + lane * g.out_lane;
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int64 at = out_at[i * FRAGMENT_PIXELS + of_quad * 2 + j];
                    if (lane >= g.lanes || at < 0) continue;
                    if (gridDim.y == 1)
                        of_lane[at] = sums[f][i][h * 2 + j];
                    else
                        atomicAdd(of_lane + at, sums[f][i][h * 2 + j]);
                }
        }
}

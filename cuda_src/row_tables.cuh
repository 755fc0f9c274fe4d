// Row tables: LUT product sums without a random gather.
//
//   out[m, n] = bias + Σ_k table[w[n, k]][x[m, k]]
//
// A block owns LANES columns n (a lane tile) and up to THREADS·ROWS rows m (output pixels). For a stage of STEPS k's it
// builds the products of every code with its weights in shared memory, then each thread reads the products of its own
// rows, one 16-byte slot a (row, k), and adds them to sums in registers. Two stages alternate: while the warps add one,
// the next is built; one barrier a stage.
//
//   stage:  a line of 128 bytes a code, a slot of 16 bytes a k, LANES entries a slot
//
//            slot 0         slot 1             …   slot 7
//     a = 0  T[w[0..7,k0]]  T[w[0..7,k0+1]]        T[w[0..7,k0+7]]     entry n of slot s: table[w[n, k0+s]][a]
//     a = 1  …
//     …
//     a = 255
//
// Conflict-free: at step s a thread reads slot s ^ (thread & 7), so the 8 threads of each phase of a 16-byte read cover
// all 8 slots, whatever their codes are. The order of the k's differs by thread, their sum does not.
// Packed sums: a pair of steps gives two entries of each column; one byte permutation pairs them, one dp2a adds both.
//
// Operands are packed first (`pack_operands`): x as packing.cuh has it, w as [group][lane tile][k / 8][8 k's][LANES].
// Channels that fill up the last 8 are masked: their slots hold zeros, whatever the table says of any code.
// Splits of the k's (grid.y) write partial sums out_split apart, which `reduce_splits` adds in a fixed order.
#pragma once

#include "packing.cuh"

constexpr int THREADS = 384;                          // most threads a block: 168 registers each, for 10 rows
constexpr int STEPS = OCTET;                          // k's a stage
constexpr int SLOT_BYTES = 16;                        // entries of one (code, k): a 128-bit read
constexpr int LINE_BYTES = STEPS * SLOT_BYTES;        // 128
constexpr int STAGE_BYTES = CODES * LINE_BYTES;       // 32 KiB
constexpr int SHARED_BYTES = 2 * STAGE_BYTES;         // one stage being added, one being built
constexpr int LANES_INT16 = SLOT_BYTES / 2;           // columns a tile, by type of entry
constexpr int LANES_INT32 = SLOT_BYTES / 4;
constexpr int BUILD_CODES = 4;                        // codes a thread builds at once
static_assert(STEPS == 8 && SLOT_BYTES == 16 && BUILD_CODES == 4, "packing and permutations are written for these");

template <typename Entry>
constexpr int LANES = SLOT_BYTES / int(sizeof(Entry));

// One job packs 8 channels of one padded pixel, or the weights of one k for one lane tile.
template <int LANES_>
__device__ void pack_operands(const code* x, const code* w, uint2* x_packed, code* w_packed, const Geometry& g,
                              int x_jobs, int w_jobs) {
    const Packed packed(g, LANES_);
    for (int64 at = int64(blockIdx.x) * blockDim.x + threadIdx.x; at < int64(x_jobs) + w_jobs;
         at += int64(gridDim.x) * blockDim.x) {
        if (at < x_jobs) {
            x_packed[at] = packed_octet(x, g, packed, int(at));
        } else {
            const int job = int(at - x_jobs), c = job % STEPS, stage = job / STEPS % packed.stages;
            const int tile = job / (STEPS * packed.stages) % packed.tiles;
            const int group = job / (STEPS * packed.stages) / packed.tiles;
            const Walk walk(g, packed, stage);
            const code* from = w + group * g.w_group + (walk.octet * STEPS + c) * g.w_channel + walk.r * g.w_row +
                               walk.s * g.w_col;
#pragma unroll
            for (int n = 0; n < LANES_; ++n) {
                const int lane = tile * LANES_ + n;
                const bool real = c < walk.channels_left() && lane < g.lanes;
                w_packed[job * int64(LANES_) + n] = real ? from[lane * g.w_lane] : 0;
            }
        }
    }
}

// The products of BUILD_CODES codes with the weights of one k, one slot a code.
__device__ inline void products(uint4 (&slots)[BUILD_CODES], const short* table, uint2 weights, int first) {
    uint2 rows[LANES_INT16];
#pragma unroll
    for (int n = 0; n < LANES_INT16; ++n) {
        const unsigned weight = ((n < 4 ? weights.x : weights.y) >> n % 4 * 8) & 0xFF;
        rows[n] = __ldg(reinterpret_cast<const uint2*>(table + weight * CODES + first));
    }
#pragma unroll
    for (int j = 0; j < BUILD_CODES; ++j) {
        unsigned words[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const uint2 even = rows[2 * p], odd = rows[2 * p + 1];
            words[p] = __byte_perm(j < 2 ? even.x : even.y, j < 2 ? odd.x : odd.y, j % 2 ? 0x7632 : 0x5410);
        }
        slots[j] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__device__ inline void products(uint4 (&slots)[BUILD_CODES], const int* table, unsigned weights, int first) {
    uint4 rows[LANES_INT32];
#pragma unroll
    for (int n = 0; n < LANES_INT32; ++n)
        rows[n] = __ldg(reinterpret_cast<const uint4*>(table + (weights >> n * 8 & 0xFF) * CODES + first));
    slots[0] = make_uint4(rows[0].x, rows[1].x, rows[2].x, rows[3].x);
    slots[1] = make_uint4(rows[0].y, rows[1].y, rows[2].y, rows[3].y);
    slots[2] = make_uint4(rows[0].z, rows[1].z, rows[2].z, rows[3].z);
    slots[3] = make_uint4(rows[0].w, rows[1].w, rows[2].w, rows[3].w);
}

// The weights of one k of a lane tile, as they are packed.
template <typename Entry>
struct Weights;
template <>
struct Weights<short> {
    typedef uint2 type;
};
template <>
struct Weights<int> {
    typedef unsigned type;
};

// Fill a stage: thread t builds slot t % 8 of every (threads / 8)-th group of codes, a line of 8 slots by 8 threads.
template <typename Entry>
__device__ void build(char* stage, const Entry* table, typename Weights<Entry>::type weights, bool real) {
#pragma unroll 1
    for (int first = threadIdx.x / STEPS * BUILD_CODES; first < CODES; first += blockDim.x / STEPS * BUILD_CODES) {
        uint4 slots[BUILD_CODES] = {};
        if (real) products(slots, table, weights, first);
#pragma unroll
        for (int j = 0; j < BUILD_CODES; ++j)
            *reinterpret_cast<uint4*>(stage + (first + j) * LINE_BYTES + threadIdx.x % STEPS * SLOT_BYTES) = slots[j];
    }
}

// Add both entries of two slots to every column's sum.
__device__ inline void add_pair(int (&sums)[LANES_INT16], uint4 p, uint4 q) {
    const unsigned ps[4] = {p.x, p.y, p.z, p.w}, qs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[2 * i] = __dp2a_lo(int(__byte_perm(ps[i], qs[i], 0x5410)), 0x0101, sums[2 * i]);
        sums[2 * i + 1] = __dp2a_lo(int(__byte_perm(ps[i], qs[i], 0x7632)), 0x0101, sums[2 * i + 1]);
    }
}

__device__ inline void add_pair(int (&sums)[LANES_INT32], uint4 p, uint4 q) {
    sums[0] += int(p.x) + int(q.x);
    sums[1] += int(p.y) + int(q.y);
    sums[2] += int(p.z) + int(q.z);
    sums[3] += int(p.w) + int(q.w);
}

// grid.x runs over the row tiles of a lane tile (fastest: blocks that run together share its weights), lane tiles and
// groups; grid.y over the splits.
template <typename Entry, int ROWS>
__device__ void row_tables(const code* x, const code* w, const Entry* table, int* out, const Geometry& g) {
    typedef typename Weights<Entry>::type WeightsOfK;
    extern __shared__ __align__(16) char stages[];
    const Packed packed(g, LANES<Entry>);
    const int turn = threadIdx.x % STEPS, row_tiles = ceil_div(g.pixels(), int(blockDim.x) * ROWS);
    const int job = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * blockDim.x * ROWS + threadIdx.x;
    const int begin = int(int64(packed.stages) * blockIdx.y / gridDim.y);
    const int end = int(int64(packed.stages) * (blockIdx.y + 1) / gridDim.y);
    // The packed operands are far below 4 GiB: 32-bit offsets from the parameters spare registers.
    Walk walk(g, packed, begin);
    unsigned x_at = job / packed.tiles * packed.octets * packed.plane + walk.shift();
    unsigned w_at = (job * packed.stages + begin) * STEPS + turn;
    const WeightsOfK* w_of_k = reinterpret_cast<const WeightsOfK*>(w);
    WeightsOfK weights = w_of_k[w_at];
    build(stages, table, weights, turn < walk.channels_left());

    // Rows past the last one read its codes and are not written.
    int row_at[ROWS], sums[ROWS][LANES<Entry>];
    uint2 codes[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        row_at[i] = packed.row_at(g, min(first_row + i * int(blockDim.x), g.pixels() - 1));
        codes[i] = *reinterpret_cast<const uint2*>(x + (x_at + row_at[i]));
#pragma unroll
        for (int n = 0; n < LANES<Entry>; ++n) sums[i][n] = blockIdx.y == 0 ? g.bias : 0;
    }
    if (end - begin > 1) weights = w_of_k[w_at += STEPS];
    __syncthreads();
    unsigned half = 0;  // where the stage lies that is being added
    for (int left = end - begin; left > 0; --left, half ^= STAGE_BYTES) {
        const unsigned first_slot = half + turn * SLOT_BYTES;
        const bool more = left > 1;
        if (more) x_at += walk.next();
        // Even warps build first, odd ones add first: one kind's loads of the table hide behind the other's sums.
#pragma unroll 1
        for (int job_of_two = 0; job_of_two < 2; ++job_of_two) {
            if ((threadIdx.x / 32 + job_of_two) % 2 == 0) {
                if (more) {
                    build(stages + (half ^ STAGE_BYTES), table, weights, turn < walk.channels_left());
                    if (left > 2) weights = w_of_k[w_at += STEPS];
                }
                continue;
            }
            // Byte s from here on holds the code of step s: that of k = s ^ turn.
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                codes[i] = make_uint2(__byte_perm(codes[i].x, codes[i].y, 0x3210 ^ turn * 0x1111),
                                      __byte_perm(codes[i].x, codes[i].y, 0x7654 ^ turn * 0x1111));
            // Not unrolled: two steps of all rows are what the registers hold.
#pragma unroll 1
            for (int s = 0; s < STEPS; s += 2) {
                if (s == STEPS / 2)
#pragma unroll
                    for (int i = 0; i < ROWS; ++i) codes[i].x = codes[i].y;
                const unsigned p_slot = first_slot ^ s * SLOT_BYTES, q_slot = p_slot ^ SLOT_BYTES;
                const unsigned p_scale = unsigned(LINE_BYTES) << s % 4 * 8, q_scale = p_scale << 8;
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    // One dp4a: code·LINE_BYTES + slot.
                    const unsigned p_at = __dp4a(codes[i].x, p_scale, p_slot);
                    const unsigned q_at = __dp4a(codes[i].x, q_scale, q_slot);
                    add_pair(sums[i], *reinterpret_cast<const uint4*>(stages + p_at),
                             *reinterpret_cast<const uint4*>(stages + q_at));
                }
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) codes[i] = *reinterpret_cast<const uint2*>(x + (x_at + row_at[i]));
        }
        __syncthreads();
    }
    const int first_lane = blockIdx.x / row_tiles % packed.tiles * LANES<Entry>, lanes = g.lanes - first_lane;
    out += blockIdx.y * g.out_split + blockIdx.x / row_tiles / packed.tiles * g.out_group + first_lane * g.out_lane;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int pixel = first_row + i * int(blockDim.x);
        if (pixel >= g.pixels()) return;
        int* to = out + g.out_at(pixel);
#pragma unroll
        for (int n = 0; n < LANES<Entry>; ++n, to += g.out_lane)
            if (n < lanes) *to = sums[i][n];
    }
}

// out[i] = Σ_z partial[z·count + i], in the order of z.
__device__ inline void reduce_splits(const int* partial, int* out, int64 count, int splits) {
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64(gridDim.x) * blockDim.x) {
        int sum = 0;
        for (int z = 0; z < splits; ++z) sum += partial[z * count + i];
        out[i] = sum;
    }
}

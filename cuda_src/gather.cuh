// Plain gather: a look-up a product, for problems too small to pay for row tables.
//
// A block computes GATHER_ROWS output pixels (threadIdx.x) for GATHER_LANES columns; its GATHER_PARTS warps (threadIdx.y)
// share the channels out and their sums meet in shared memory, in a fixed order. A thread reads each code of x once for
// all columns, and the codes of w, the same for the whole warp, by broadcast; a warp's look-ups of one weight fall into
// one row of 512 or 1,024 bytes, which the cache keeps. Operands have any strides; positions outside x hold pad_code.
#pragma once

#include "lut.cuh"

constexpr int GATHER_ROWS = 32;
constexpr int GATHER_PARTS = 8;
constexpr int GATHER_LANES = 8;

// grid.x runs over the row tiles of a lane tile, lane tiles and groups.
template <typename Entry>
__device__ void gather(const code* x, const code* w, const Entry* table, int* out, const Geometry& g) {
    __shared__ int partial[GATHER_PARTS][GATHER_LANES][GATHER_ROWS];
    const int row_tiles = ceil_div(g.pixels(), GATHER_ROWS), lane_tiles = ceil_div(g.lanes, GATHER_LANES);
    const int job = blockIdx.x / row_tiles, group = job / lane_tiles, first_lane = job % lane_tiles * GATHER_LANES;
    const int pixel = blockIdx.x % row_tiles * GATHER_ROWS + threadIdx.x, real = min(pixel, g.pixels() - 1);
    const int top = real / g.out_w % g.out_h * g.step_h - g.pad_h, left = real % g.out_w * g.step_w - g.pad_w;
    const code* x_at = x + real / (g.out_h * g.out_w) * g.x_image + group * g.x_group;
    const code* w_at[GATHER_LANES];  // columns past the last one repeat it and are not written
#pragma unroll
    for (int n = 0; n < GATHER_LANES; ++n)
        w_at[n] = w + group * g.w_group + min(first_lane + n, g.lanes - 1) * g.w_lane;

    int sums[GATHER_LANES] = {};
    for (int c = threadIdx.y; c < g.channels; c += GATHER_PARTS)
        for (int r = 0; r < g.kernel_h; ++r)
#pragma unroll 1
            for (int s = 0; s < g.kernel_w; ++s) {
                const int row = top + r * g.dil_h, col = left + s * g.dil_w;
                const bool inside = row >= 0 && row < g.height && col >= 0 && col < g.width;
                const code a = inside ? x_at[c * g.x_channel + row * g.x_row + col * g.x_col] : code(g.pad_code);
                const int64 tap = c * g.w_channel + r * g.w_row + s * g.w_col;
#pragma unroll
                for (int n = 0; n < GATHER_LANES; ++n) sums[n] += __ldg(table + w_at[n][tap] * CODES + a);
            }
#pragma unroll
    for (int n = 0; n < GATHER_LANES; ++n) partial[threadIdx.y][n][threadIdx.x] = sums[n];
    __syncthreads();
    if (pixel >= g.pixels()) return;
    for (int n = threadIdx.y; n < GATHER_LANES && first_lane + n < g.lanes; n += GATHER_PARTS) {
        int sum = g.bias;
        for (int part = 0; part < GATHER_PARTS; ++part) sum += partial[part][n][threadIdx.x];
        out[group * g.out_group + (first_lane + n) * g.out_lane + g.out_at(pixel)] = sum;
    }
}

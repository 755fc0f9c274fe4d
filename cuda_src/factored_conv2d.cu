// Grouped 2-D convolution by a factored table, implicit GEMM, int32:
//
//   out[b, o, i, j] = Σ_{c,r,s} T[x[b, c, i·step_h − pad_h + r·dil_h, j·step_w − pad_w + s·dil_w], w[o, c, r, s]]
//   T[a, w] = Σ_p u[p][a]·v[p][w] + by_row[a] + by_column[w]
//
// over the channels c of o's group; positions outside x hold pad_code. x and w have any strides, so NCHW and channels_last
// alike. `pack` brings the operands into the layout of factored.cuh, a byte a code of x, and adds up by_row and by_column;
// `tileLxR_slotsS` computes, L lanes and R output pixels a warp, S slots a pass. The host picks.

#include "factored.cuh"

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    factored_conv2d_pack(const code* x, const code* w, const signed char* v, const int* by_column, const int* by_row,
                         uint2* x_packed, uint4* w_packed, int* by_lane, int* by_pixel, int* out, const Geometry g,
                         const PackBlocks blocks, int terms, int slots) {
    factored_pack(x, w, v, by_column, by_row, x_packed, w_packed, by_lane, by_pixel, out, g, blocks, terms,
                  slots);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_conv2d_tile64x64_slots8(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                     const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<8, 4, 8>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_conv2d_tile64x56_slots4(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                     const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<4, 4, 7>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_conv2d_tile32x32_slots8(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                     const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<8, 2, 4>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_conv2d_tile32x32_slots4(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                     const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<4, 2, 4>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

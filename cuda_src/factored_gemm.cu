// Matrix product by a factored table, int32:
//
//   out[b, m, n] = Σ_k (Σ_p u[p][x[b, m, k]]·v[p][w[b, n, k]] + by_row[x[b, m, k]] + by_column[w[b, n, k]])
//
// The rows of x are the pixels of a 1×1 convolution, K its channels, the batch its groups. `pack` brings the operands into
// the layout of factored.cuh and adds up by_row and by_column, `tileLxR_slotsS` computes, L lanes and R pixels a warp,
// S slots a pass. The host picks.

#include "factored.cuh"

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    factored_gemm_pack(const code* x, const code* w, const signed char* v, const int* by_column, const int* by_row,
                       uint2* x_packed, uint4* w_packed, int* by_lane, int* by_pixel, int* out, const Geometry g,
                       const PackBlocks blocks, int terms, int slots) {
    factored_pack(x, w, v, by_column, by_row, x_packed, w_packed, by_lane, by_pixel, out, g, blocks, terms,
                  slots);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_gemm_tile64x64_slots8(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                   const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<8, 4, 8>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_gemm_tile64x56_slots4(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                   const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<4, 4, 7>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_gemm_tile32x32_slots8(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                   const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<8, 2, 4>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    factored_gemm_tile32x32_slots4(const code* x_packed, const uint4* w_packed, const code* u, const int* by_lane,
                                   const int* by_pixel, int* out, const Geometry g, int terms, int has_by_row) {
    factored<4, 2, 4>(x_packed, w_packed, u, by_lane, by_pixel, out, g, terms, has_by_row);
}

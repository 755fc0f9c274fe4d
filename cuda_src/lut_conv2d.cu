// Grouped 2-D convolution by look-up table, implicit GEMM, int32:
//
//   out[b, o, i, j] = Σ_{c,r,s} table[w[o, c, r, s]][x[b, c, i·step_h − pad_h + r·dil_h, j·step_w − pad_w + s·dil_w]]
//
// over the channels c of o's group; positions outside x hold pad_code. x and w have any strides, so NCHW and channels_last
// alike. Large convolutions go through row tables (row_tables.cuh): `pack` brings the operands into their layout, a byte a
// code, not k² times that; `rowsR` computes, R output pixels a thread, and where the k's are split `reduce` adds the
// partial sums. Small ones go through the plain gather (gather.cuh). The host picks.
// `int16` kernels take tables with their offset taken out, `int32` ones those that span more than 16 bits.

#include "gather.cuh"
#include "row_tables.cuh"

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_conv2d_pack_int16(const code* x, const code* w, uint2* x_packed, code* w_packed, const Geometry g, int x_jobs,
                          int w_jobs) {
    pack_operands<LANES_INT16>(x, w, x_packed, w_packed, g, x_jobs, w_jobs);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_conv2d_rows10_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 10>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_conv2d_rows5_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 5>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_conv2d_rows2_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 2>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_conv2d_gather_int16(const code* x, const code* w, const short* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_conv2d_pack_int32(const code* x, const code* w, uint2* x_packed, code* w_packed, const Geometry g, int x_jobs,
                          int w_jobs) {
    pack_operands<LANES_INT32>(x, w, x_packed, w_packed, g, x_jobs, w_jobs);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_conv2d_rows10_int32(const code* x_packed, const code* w_packed, const int* table, int* out, const Geometry g) {
    row_tables<int, 10>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_conv2d_gather_int32(const code* x, const code* w, const int* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_conv2d_reduce(const int* partial, int* out, int64 count, int splits) {
    reduce_splits(partial, out, count, splits);
}

// Matrix product by look-up table: out[b, m, n] = Σ_k table[w[b, n, k]][x[b, m, k]], int32.
//
// The rows of x are the pixels of a 1×1 convolution, K its channels, the batch its groups. Large products go through row
// tables (row_tables.cuh): `pack` brings the operands into their layout, `rowsR` computes, R rows a thread, and where the
// K's are split `reduce` adds the partial sums. Small ones go through the plain gather (gather.cuh). The host picks.
// `int16` kernels take tables with their offset taken out, `int32` ones those that span more than 16 bits.

#include "gather.cuh"
#include "row_tables.cuh"

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_gemm_pack_int16(const code* x, const code* w, uint2* x_packed, code* w_packed, const Geometry g, int x_jobs,
                        int w_jobs) {
    pack_operands<LANES_INT16>(x, w, x_packed, w_packed, g, x_jobs, w_jobs);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_gemm_rows10_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 10>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_gemm_rows5_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 5>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_gemm_rows2_int16(const code* x_packed, const code* w_packed, const short* table, int* out, const Geometry g) {
    row_tables<short, 2>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_gemm_gather_int16(const code* x, const code* w, const short* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_gemm_pack_int32(const code* x, const code* w, uint2* x_packed, code* w_packed, const Geometry g, int x_jobs,
                        int w_jobs) {
    pack_operands<LANES_INT32>(x, w, x_packed, w_packed, g, x_jobs, w_jobs);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lut_gemm_rows10_int32(const code* x_packed, const code* w_packed, const int* table, int* out, const Geometry g) {
    row_tables<int, 10>(x_packed, w_packed, table, out, g);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_gemm_gather_int32(const code* x, const code* w, const int* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    lut_gemm_reduce(const int* partial, int* out, int64 count, int splits) {
    reduce_splits(partial, out, count, splits);
}

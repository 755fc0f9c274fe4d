// Products of fragments, and copies, by the very functions that the factored kernels call; test_products.py lays the
// fragments out.

#include "factored.cuh"

constexpr int A_FRAGMENTS = 2, B_FRAGMENTS = 3;

extern "C" __global__ void products(const uint4* a, const uint2* b, int4* c) {
    unsigned as[A_FRAGMENTS][4], bs[B_FRAGMENTS][2];
    int cs[A_FRAGMENTS][B_FRAGMENTS][4];
    for (int i = 0; i < A_FRAGMENTS; ++i) {
        const uint4 some = a[i * WARP + threadIdx.x];
        as[i][0] = some.x, as[i][1] = some.y, as[i][2] = some.z, as[i][3] = some.w;
    }
    for (int j = 0; j < B_FRAGMENTS; ++j) {
        const uint2 some = b[j * WARP + threadIdx.x];
        bs[j][0] = some.x, bs[j][1] = some.y;
    }
    for (int i = 0; i < A_FRAGMENTS; ++i)
        for (int j = 0; j < B_FRAGMENTS; ++j) {
            const int4 some = c[(i * B_FRAGMENTS + j) * WARP + threadIdx.x];
            cs[i][j][0] = some.x, cs[i][j][1] = some.y, cs[i][j][2] = some.z, cs[i][j][3] = some.w;
        }
    for (int times = 0; times < 2; ++times) multiply(cs, as, bs);
    for (int i = 0; i < A_FRAGMENTS; ++i)
        for (int j = 0; j < B_FRAGMENTS; ++j)
            c[(i * B_FRAGMENTS + j) * WARP + threadIdx.x] =
                make_int4(cs[i][j][0], cs[i][j][1], cs[i][j][2], cs[i][j][3]);
}

// What is there before a copy is waited for, and after it.
extern "C" __global__ void copies(const char* from, uint4* before, uint4* after) {
    __shared__ uint4 stage[WARP];
    stage[threadIdx.x] = make_uint4(0, 0, 0, 0);
    copy_async(stage + threadIdx.x, from + threadIdx.x * 16);
    before[threadIdx.x] = stage[threadIdx.x];
    wait_for_copies();
    after[threadIdx.x] = stage[threadIdx.x];
}

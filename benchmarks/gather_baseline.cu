// The look-up kernel as published emulators write it, to be compared with: a 16×16 tile of the output a block, one output a
// thread, codes staged in shared memory, the table read through the read-only cache.
//
//   out[m, n] = Σ_k table[x[m, k]][w[n, k]]

constexpr int TILE = 16;

extern "C" __global__ void __launch_bounds__(TILE* TILE)
    gather_baseline(const unsigned char* x, const unsigned char* w, const int* table, int* out, int rows, int columns,
                    int depth) {
    __shared__ unsigned char x_tile[TILE][TILE], w_tile[TILE][TILE];
    const long long row = (long long)blockIdx.x * TILE + threadIdx.y;
    const long long column = (long long)blockIdx.y * TILE + threadIdx.x;
    const long long w_row = (long long)blockIdx.y * TILE + threadIdx.y;
    int sum = 0;
    for (int first = 0; first < depth; first += TILE) {
        const int k = first + threadIdx.x;
        x_tile[threadIdx.y][threadIdx.x] = row < rows && k < depth ? x[row * depth + k] : 0;
        w_tile[threadIdx.y][threadIdx.x] = w_row < columns && k < depth ? w[w_row * depth + k] : 0;
        __syncthreads();
        for (int i = 0; i < TILE && first + i < depth; ++i)
            sum += __ldg(table + x_tile[threadIdx.y][i] * 256 + w_tile[threadIdx.x][i]);
        __syncthreads();
    }
    if (row < rows && column < columns) out[row * columns + column] = sum;
}

// Kernels that reverse 32 numbers, y[t] = x[31 - t], each with a line that a fault can stand in for: what follows
// `wrong:`. test_sanitizers.py runs them as they stand and with every fault in its place.

#define t int(threadIdx.x)

// ---- AddressSanitizer and UndefinedBehaviorSanitizer ----

extern "C" __global__ void reads_behind_a_tensor(const int* x, int* y) {
    y[t] = x[31 - t];  // wrong: y[t] = x[32 - t];
}

extern "C" __global__ void reads_before_a_tensor(const int* x, int* y) {
    y[t] = x[31 - t];  // wrong: y[t] = x[30 - t];
}

extern "C" __global__ void writes_behind_a_tensor(const int* x, int* y) {
    y[31 - t] = x[t];  // wrong: y[32 - t] = x[t];
}

extern "C" __global__ void indexes_behind_static_shared(const int* x, int* y) {
    __shared__ int s[32];
    s[t] = x[t];
    __syncthreads();
    y[t] = s[31 - t];  // wrong: y[t] = s[32 - t];
}

extern "C" __global__ void points_behind_static_shared(const int* x, int* y) {
    __shared__ int s[32];
    s[t] = x[t];
    __syncthreads();
    const int* from = s;
    for (int i = t; i < 31; ++i) ++from;  // wrong: for (int i = t; i < 32; ++i) ++from;
    y[t] = *from;
}

extern "C" __global__ void reads_behind_dynamic_shared(const int* x, int* y) {
    extern __shared__ int s[];
    s[t] = x[t];
    __syncthreads();
    y[t] = s[31 - t];  // wrong: y[t] = s[32 - t];
}

extern "C" __global__ void writes_behind_dynamic_shared(const int* x, int* y) {
    extern __shared__ int s[];
    s[31 - t] = x[t];  // wrong: s[32 - t] = x[t];
    __syncthreads();
    y[t] = s[t];
}

extern "C" __global__ void reads_shared_that_nobody_wrote(const int* x, int* y) {
    extern __shared__ int s[];
    s[t] = 31 - t;  // wrong:
    __syncthreads();
    y[t] = x[s[t]];
}

extern "C" __global__ void reads_a_misaligned_vector(const int* x, int* y) {
    const int* at = x + 30 - t / 2 * 2;  // wrong: const int* at = x + 29 - t % 30 / 2 * 2;
    const int2 pair = __ldg(reinterpret_cast<const int2*>(at));
    y[t] = t % 2 ? pair.x : pair.y;
}

extern "C" __global__ void writes_a_misaligned_vector(const int* x, int* y) {
    if (t % 2) return;
    int* to = y + t;  // wrong: int* to = y + t % 30 + 1;
    *reinterpret_cast<int2*>(to) = make_int2(x[31 - t], x[30 - t]);
}

extern "C" __global__ void shifts_too_far(const int* x, int* y) {
    y[t] = x[31 - t] << t / 32;  // wrong: y[t] = x[31 - t] << t + 1;
}

// ---- ThreadSanitizer ----

extern "C" __global__ void misses_a_syncthreads(const int* x, int* y) {
    __shared__ int s[32];
    s[t] = x[t];
    __syncthreads();  // wrong:
    y[t] = s[31 - t];
}

extern "C" __global__ void misses_a_syncthreads_before_reuse(const int* x, int* y) {
    extern __shared__ int s[];
    for (int round = 0; round < 2; ++round) {
        s[t] = x[t] + round;
        __syncthreads();
        y[t] = s[31 - t] - round;
        __syncthreads();  // wrong:
    }
}

extern "C" __global__ void misses_a_syncwarp(const int* x, int* y) {
    __shared__ int s[32];
    s[t] = x[t];
    __syncwarp();  // wrong:
    y[t] = s[31 - t];
}

// For two warps.
extern "C" __global__ void misses_a_syncthreads_between_warps(const int* x, int* y) {
    __shared__ int s[32];
    if (t < 32) s[t] = x[t];
    for (int i = 0; i < 9; ++i) __syncwarp();  // orders the lanes of a warp, and nothing else
    __syncthreads();  // wrong:
    if (t >= 32) y[t - 32] = s[63 - t];
}

extern "C" __global__ void sums_without_atomics(const int* x, int* y) {
    __shared__ int sum;
    if (t == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, x[t]);  // wrong: sum += x[t];
    __syncthreads();
    y[t] = x[31 - t] + sum - sum;
}

extern "C" __global__ void writes_where_others_write(const int* x, int* y) {
    y[t] = x[31 - t];  // wrong: y[t / 2] = x[31 - t];
}

// ---- no fault ----

#undef t

// x[i] += by, one block after the other.
extern "C" __global__ void add(int* x, int n, int by) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += by;
}

extern "C" __global__ void move_by_one(const int* from, int* to) {
    const int value = from[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = value;
}

extern "C" __global__ void load_vector(const int4* x, int* y) { *y = x->w; }

extern "C" __global__ void trap(const int* x) {
    if (x[threadIdx.x] < 0) __trap();
    __syncthreads();
}

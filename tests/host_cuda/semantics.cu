// Small kernels whose results test_shim.py knows: CUDA C++ as NVRTC takes it.

constexpr unsigned FULL = 0xFFFFFFFF;

__device__ int thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ int block_number() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
__device__ int threads() { return blockDim.x * blockDim.y * blockDim.z; }

// ---- geometry and arguments ----

extern "C" __global__ void geometry(int4* out) {
    const uint3 t = threadIdx;
    const dim3 b = blockIdx;
    out[block_number() * threads() + thread_number()] = make_int4(t.x | t.y << 8 | t.z << 16, b.x, b.y, b.z);
}

struct Inner {
    unsigned char byte;
    short2 pair;
};
struct Arguments {
    long long wide;
    int narrow;
    Inner inner;
    float real;
    uint4 vector;
};

extern "C" __global__ void scalars(bool yes, signed char a, unsigned char b, short c, unsigned short d, int e,
                                   unsigned f, long long g, unsigned long long h, float i, double j, double* out) {
    const double all[] = {double(yes), double(a), double(b), double(c), double(d), double(e),
                          double(f),   double(g), double(h), double(i), j};
    for (int at = 0; at < 11; ++at) out[at] = all[at];
}

extern "C" __global__ void __launch_bounds__(32)
structure(const Arguments arguments, int scale, double *__restrict__ const out) {
    const double all[] = {double(arguments.wide), double(arguments.narrow), double(arguments.inner.byte),
                          double(arguments.inner.pair.x), double(arguments.inner.pair.y), arguments.real,
                          double(arguments.vector.x), double(arguments.vector.w)};
    for (int at = 0; at < 8; ++at) out[at] = scale * all[at];
}

extern "C" __global__ void nothing() {}

#if __CUDA_ARCH__ >= 900
extern "C" __global__ void hopper(int* x) { asm volatile("st.global.u32 [%0], 1;" ::"l"(x)); }
#endif

// ---- vectors and memory ----

#define LAYOUT(T) *out++ = make_int2(sizeof(T), alignof(T))
#define LAYOUTS(T) LAYOUT(T##2), LAYOUT(T##3), LAYOUT(T##4)

extern "C" __global__ void layouts(int2* out) {
    LAYOUTS(char), LAYOUTS(uchar), LAYOUTS(short), LAYOUTS(ushort), LAYOUTS(int), LAYOUTS(uint), LAYOUTS(float);
    LAYOUT(longlong2), LAYOUT(ulonglong2), LAYOUT(double2);
}

extern "C" __global__ void makers(int* out) {
    const char3 c = make_char3(1, -2, 3);
    const ushort4 s = make_ushort4(4, 5, 6, 65535);
    const uint2 u = make_uint2(7, 8);
    const float4 f = make_float4(9, 10, 11, 12);
    const longlong2 l = make_longlong2(13, -14);
    const int all[] = {c.x, c.y, c.z, s.x, s.y, s.z, s.w, int(u.x), int(u.y), int(f.x), int(f.w), int(l.x), int(l.y)};
    for (int at = 0; at < 13; ++at) out[at] = all[at];
}

extern "C" __global__ void copies(const uint4* from, uint4* to) {
    to[0] = __ldg(from), to[1] = __ldca(from + 1), to[2] = __ldcg(from + 2);
    to[3] = __ldcs(from + 3), to[4] = __ldcv(from + 4), to[5] = __ldlu(from + 5);
    __stcg(to + 6, from[6]), __stcs(to + 7, from[7]), __stwb(to + 8, from[8]), __stwt(to + 9, from[9]);
}

__constant__ int squares[4] = {0, 1, 4, 9};
__device__ int calls;

extern "C" __global__ void globals(int* out) {
    atomicAdd(&calls, squares[threadIdx.x]);
    __syncthreads();
    *out = calls;
}

template <typename T>
__device__ void atomics(T* cells, T* olds) {
    const int me = block_number() * threads() + thread_number();
    olds[me] = atomicAdd(&cells[0], 1);
    atomicAdd(&cells[1], T(-me));
    atomicMax(&cells[2], T(me));
    atomicMin(&cells[3], T(-me));
    atomicOr(&cells[4], T(1) << me % 31);
    atomicAnd(&cells[5], ~(T(1) << me % 31));
    atomicXor(&cells[6], T(me));
    T seen = 0, expected;
    do {
        expected = seen;
        seen = atomicCAS(&cells[7], expected, expected + 3);
    } while (seen != expected);
    atomicExch(&cells[8], T(me));
}

extern "C" __global__ void atomics_int(int* cells, int* olds) {
    atomics(cells, olds);
    atomicSub(&cells[9], 2);
}
extern "C" __global__ void atomics_long(unsigned long long* cells, unsigned long long* olds) { atomics(cells, olds); }
extern "C" __global__ void atomics_float(float* sum, double* also) {
    atomicAdd(sum, 1);
    atomicAdd(also, 0.5);
}

// ---- shared memory and barriers ----

extern "C" __global__ void reverse_static(const int* x, int* y) {
    __shared__ alignas(16) int tile[1024];
    const int first = block_number() * threads();
    tile[thread_number()] = x[first + thread_number()];
    __syncthreads();
    y[first + thread_number()] = tile[threads() - 1 - thread_number()];
}

template <typename T>
__device__ void reverse_dynamic(const T* x, T* y) {
    extern __shared__ __align__(16) char raw[];
    T* tile = reinterpret_cast<T*>(raw);
    const int first = block_number() * threads();
    tile[thread_number()] = x[first + thread_number()];
    __syncthreads();
    y[first + thread_number()] = tile[threads() - 1 - thread_number()];
}

extern "C" __global__ void reverse_short(const short* x, short* y) { reverse_dynamic(x, y); }
extern "C" __global__ void reverse_long(const long long* x, long long* y) { reverse_dynamic(x, y); }

// More declarations: extern arrays that are not shared, two dimensions, at namespace scope, over two lines.
extern __shared__ volatile unsigned char everywhere[];
extern "C" __global__ void transpose(const int* x, int* y) {
    extern __shared__ int
        tile[][4];
    if (__LINE__ != 141) __trap();  // this very line
    tile[threadIdx.y][threadIdx.x] = x[thread_number()];
    __syncthreads();
    y[thread_number()] = tile[threadIdx.x][threadIdx.y];
    __syncthreads();
    everywhere[thread_number()] = 1;
    __syncthreads();
    y[thread_number()] += everywhere[threads() - 1 - thread_number()] * 100;
}

extern "C" __global__ void poison(int* out) {
    extern __shared__ int words[];
    out[block_number() * threads() + thread_number()] = words[thread_number()];
    words[thread_number()] = 1;
}

// A sum by halving: a barrier a level.
extern "C" __global__ void tree_sum(const int* x, int* sums) {
    __shared__ int partial[512];
    partial[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int width = blockDim.x / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// Threads return one after the other, and the barrier waits for the rest only.
extern "C" __global__ void leaving(int* out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int round = 0; round < blockDim.x; ++round) {
        if (round == threadIdx.x) {
            out[blockIdx.x * blockDim.x + threadIdx.x] = count;
            return;
        }
        __syncthreads();
        if (threadIdx.x == blockDim.x - 1) ++count;
        __syncthreads();
    }
}

extern "C" __global__ void votes(const int* x, int* out) {
    int* to = out + 4 * (block_number() * threads() + thread_number());
    const int mine = x[block_number() * threads() + thread_number()];
    to[0] = __syncthreads_count(mine);
    to[1] = __syncthreads_or(mine);
    to[2] = __syncthreads_and(mine);
    to[3] = __syncthreads_count(!mine);
}

// ---- warps ----

template <typename T>
__device__ void shuffles(const T* x, T* out, int by, int width) {
    const T mine = x[threadIdx.x];
    T* to = out + 4 * threadIdx.x;
    to[0] = __shfl_sync(FULL, mine, by, width);
    to[1] = __shfl_up_sync(FULL, mine, by, width);
    to[2] = __shfl_down_sync(FULL, mine, by, width);
    to[3] = __shfl_xor_sync(FULL, mine, by, width);
}

extern "C" __global__ void shuffles_int(const int* x, int* out, int by, int width) { shuffles(x, out, by, width); }
extern "C" __global__ void shuffles_float(const float* x, float* out, int by, int width) {
    shuffles(x, out, by, width);
}
extern "C" __global__ void shuffles_long(const long long* x, long long* out, int by, int width) {
    shuffles(x, out, by, width);
}

// Parts of a warp go ways of their own, and meet again.
extern "C" __global__ void parts(const int* x, int* out) {
    const unsigned lane = threadIdx.x % warpSize, low = 0xFFFF, odd = 0xAAAAAAAA;
    const int mine = x[threadIdx.x];
    int sum = 0;
    if (lane < 16)
        for (int by = 8; by > 0; by /= 2) sum += __shfl_xor_sync(low, mine + sum, by);
    else
        sum = __popc(__ballot_sync(~low, mine > 0));
    sum += __shfl_sync(FULL, mine, 3);
    if (lane % 2) sum += 1000 * __any_sync(odd, mine == 5) + 2000 * __all_sync(odd, mine != 5);
    out[threadIdx.x] = sum + 4000 * __all_sync(FULL, 1) + 8000 * __any_sync(FULL, 0);
}

extern "C" __global__ void ballots(const int* x, unsigned* out) {
    out[threadIdx.x] = __ballot_sync(FULL, x[threadIdx.x]);
}

// Lanes from `first` on return; of the others each reads the one above.
extern "C" __global__ void absent(const int* x, int* out, int first) {
    if (threadIdx.x >= first) return;
    out[threadIdx.x] = __shfl_sync(FULL, x[threadIdx.x], threadIdx.x + 1);
}

extern "C" __global__ void syncwarp(const int* x, int* out) {
    __shared__ volatile int tile[64];
    for (int round = 0; round < 8; ++round) {
        tile[threadIdx.x] = x[threadIdx.x] + round;
        __syncwarp();
        out[threadIdx.x] = tile[threadIdx.x ^ 1];
        __syncwarp();
    }
}

extern "C" __global__ void wrong_mask() { __syncwarp(1u << (threadIdx.x + 1) % warpSize); }

// ---- traps, output and time ----

extern "C" __global__ void traps(int block, int thread) {
    if (blockIdx.x == block && threadIdx.x == thread) __trap();
    __syncthreads();
}

extern "C" __global__ void asserts(const int* x) {
    assert(x != nullptr);
    assert(x[threadIdx.x] < 3);
}

extern "C" __global__ void prints() { printf("thread %d of %u\n", thread_number(), blockDim.x); }

extern "C" __global__ void clocks(long long* out) {
    const long long before = clock64();
    __nanosleep(10);
    __threadfence_block(), __threadfence(), __threadfence_system();
    *out = clock64() - before;
}

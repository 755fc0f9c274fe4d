// CUDA C++ on the CPU: the language's words, its built-in functions, and a launch, for g++ -std=c++20.
//
//   CUDA                          here
//   thread                        a pthread, started once a launch; each walks over all blocks of the grid
//   block                         all pthreads at once; blocks run one after the other, x fastest: every pthread has
//                                 finished with one before any begins the next
//   __syncthreads                 a barrier of atomics (ThreadSanitizer sees them, and so a missing one) that waits for
//                                 the threads that have not returned from the kernel
//   warp                          32 threads in the order of threadIdx; in a …_sync function those lanes meet that the
//                                 mask names and that have not returned; one that is not there reads as POISON
//   __shared__ T s[n]             static storage, which the next block finds as the last one left it
//   extern __shared__ T s[]       exactly the launch's bytes, filled with POISON before every block. C++ has no such
//                                 array: build.py makes each declaration a DYNAMIC_SHARED
//   global memory, __constant__   memory
//   atomics                       relaxed atomics
//   cp.async                      copy_async, which leaves POISON there until wait_for_copies
//   __trap, a failed assert       an exception that ends the launch
//
// __CUDA_ARCH__ is not defined: code for one architecture, a whole kernel or a part, belongs in an #if of it. There is
// one launch at a time. Some functions take more types than CUDA's do, which NVRTC then refuses.
#pragma once

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

// ---- words of the language ------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static
#define __forceinline__
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// ---- vectors, with CUDA's alignment ---------------------------------------------------------------------------------

#define VECTOR_TYPES(name, T)                                                                \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                       \
    struct name##3 { T x, y, z; };                                                           \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };       \
    constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                            \
    constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                    \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

VECTOR_TYPES(char, signed char)
VECTOR_TYPES(uchar, unsigned char)
VECTOR_TYPES(short, short)
VECTOR_TYPES(ushort, unsigned short)
VECTOR_TYPES(int, int)
VECTOR_TYPES(uint, unsigned)
VECTOR_TYPES(longlong, long long)
VECTOR_TYPES(ulonglong, unsigned long long)
VECTOR_TYPES(float, float)
VECTOR_TYPES(double, double)
#undef VECTOR_TYPES

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// ---- built-in variables ---------------------------------------------------------------------------------------------

static thread_local uint3 threadIdx, blockIdx;
static thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- how threads run ------------------------------------------------------------------------------------------------

namespace cuda_on_host {

constexpr int POISON = 0xA5;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t STACK_BYTES = 1 << 20;
#else
constexpr size_t STACK_BYTES = 256 << 10;
#endif
constexpr size_t SHARED_ALIGNMENT = 1024;

static char* dynamic_shared;

// What ends a launch.
struct Trap {
    std::string message;
};

// Waiting for an atomic to change. std::atomic's own counts who waits in a table that unrelated atomics share:
// ThreadSanitizer would take that for an order between their threads, and miss races of warps.
inline void wait_while(const std::atomic<unsigned>& value, unsigned old) {
#ifdef __linux__
    while (value == old) syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
    value.wait(old);
#endif
}

inline void wake_all(std::atomic<unsigned>& value) {
#ifdef __linux__
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    value.notify_all();
#endif
}

// Where threads wait for each other; one that has left is waited for no more.
class Barrier {
public:
    explicit Barrier(std::function<void()> before_opening = [] {}) : before_opening(before_opening) {}

    void reset(unsigned threads) { running = missing = threads; }

    // Returns how many of those that met here gave a vote.
    unsigned wait(bool vote = false) {
        const unsigned now = phase;
        if (vote) ++votes;
        if (--missing == 0)
            open();
        else
            wait_while(phase, now);
        return counted;
    }

    void leave() {
        --running;
        if (--missing == 0) open();
    }

private:
    void open() {
        before_opening();
        counted = votes.exchange(0);
        missing = running.load();
        ++phase;
        wake_all(phase);
    }

    std::function<void()> before_opening;
    std::atomic<unsigned> running = 0, missing = 0, votes = 0, phase = 0;
    unsigned counted = 0;
};

// Where the lanes of a warp hand each other values.
class Warp {
public:
    struct Round {
        unsigned lanes = 0;
        uint64_t values[warpSize] = {};
    };

    void reset(unsigned lanes) { running = lanes == warpSize ? ~0u : (1u << lanes) - 1; }

    // Returns what the lanes of `mask` hand in, once they all have; it stands until this lane calls again.
    const Round& meet(unsigned mask, unsigned lane, uint64_t value) {
        if (!(mask >> lane & 1)) throw Trap{"a lane calls a …_sync function with a mask that does not name it"};
        std::unique_lock lock(mutex);
        Meeting& meeting = meetings[mask];
        const unsigned now = meeting.phase;
        meeting.arrived |= 1u << lane;
        meeting.rounds[now % 2].values[lane] = value;
        open_if_complete(mask, meeting);
        lock.unlock();
        wait_while(meeting.phase, now);
        return meeting.rounds[now % 2];
    }

    void leave(unsigned lane) {
        const std::lock_guard lock(mutex);
        running &= ~(1u << lane);
        for (auto& [mask, meeting] : meetings) open_if_complete(mask, meeting);
    }

private:
    struct Meeting {
        unsigned arrived = 0;
        std::atomic<unsigned> phase = 0;
        Round rounds[2];  // alternating: a lane may come to the next while others still read the last
    };

    void open_if_complete(unsigned mask, Meeting& meeting) {
        if (meeting.arrived == 0 || meeting.arrived != (mask & running)) return;
        meeting.rounds[meeting.phase % 2].lanes = meeting.arrived;
        meeting.arrived = 0;
        ++meeting.phase;
        wake_all(meeting.phase);
    }

    std::mutex mutex;
    unsigned running = 0;
    std::map<unsigned, Meeting> meetings;  // by mask
};

// What Python and the driver hand over.
struct Geometry {
    unsigned grid[3], block[3], shared;
};

// An asynchronous copy.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

static thread_local Warp* warp;
static thread_local unsigned lane;
static thread_local std::vector<Copy> copies;  // that have not been waited for
static Barrier block_barrier;

inline std::string text(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

class Launch {
public:
    Launch(const Geometry& geometry, std::function<void()> kernel)
        : geometry(geometry), threads(geometry.block[0] * geometry.block[1] * geometry.block[2]), kernel(kernel),
          warps((threads + warpSize - 1) / warpSize) {}

    // Throws the first trap.
    void run() {
        void* shared = nullptr;
        if (posix_memalign(&shared, SHARED_ALIGNMENT, geometry.shared)) throw Trap{"no memory for the shared memory"};
        dynamic_shared = static_cast<char*>(shared);
        between_blocks.reset(threads);
        const std::vector<pthread_t> started = start();
        for (pthread_t thread : started) pthread_join(thread, nullptr);
        free(shared);
        if (trapped) throw trap;
    }

private:
    struct Start {
        Launch* launch;
        unsigned index;
    };

    std::vector<pthread_t> start() {
        std::vector<pthread_t> started;
        starts.resize(threads);
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        const auto body = [](void* start) -> void* {
            static_cast<Start*>(start)->launch->walk(static_cast<Start*>(start)->index);
            return nullptr;
        };
        int error = 0;
        for (unsigned index = 0; index < threads && error == 0; ++index) {
            starts[index] = {this, index};
            pthread_t thread;
            error = pthread_create(&thread, &attributes, body, &starts[index]);
            if (error == 0) started.push_back(thread);
        }
        if (error != 0) {
            fail("thread " + std::to_string(started.size()) + " of a block did not start: " + strerror(error));
            for (size_t missing = threads - started.size(); missing > 0; --missing) between_blocks.leave();
        }
        pthread_attr_destroy(&attributes);
        return started;
    }

    // A thread's way through the grid.
    void walk(unsigned index) {
        const auto [x, y, z] = geometry.block;
        threadIdx = {index % x, index / x % y, index / x / y};
        blockDim = {x, y, z};
        gridDim = {geometry.grid[0], geometry.grid[1], geometry.grid[2]};
        lane = index % warpSize;
        warp = &warps[index / warpSize];
        between_blocks.wait();
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                    if (stopped) return;
                    run_thread();
                    between_blocks.wait();
                }
    }

    void run_thread() {
        try {
            kernel();
        } catch (const Trap& what) {
            fail("block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + what.message);
        }
        copies.clear();
        block_barrier.leave();
        warp->leave(lane);
    }

    void prepare_block() {
        stopped = trapped;
        block_barrier.reset(threads);
        for (size_t w = 0; w < warps.size(); ++w) warps[w].reset(std::min(threads - unsigned(w) * warpSize, 32u));
        memset(dynamic_shared, POISON, geometry.shared);
    }

    void fail(const std::string& message) {
        const std::lock_guard lock(mutex);
        if (!trapped) trap.message = message;
        trapped = true;
    }

    const Geometry geometry;
    const unsigned threads;
    const std::function<void()> kernel;
    std::vector<Warp> warps;
    std::vector<Start> starts;
    Barrier between_blocks{[this] { prepare_block(); }};
    bool stopped = false;
    std::mutex mutex;
    std::atomic<bool> trapped = false;
    Trap trap;
};

template <typename T>
T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

// `arguments` are the addresses of the kernel's, as for cuLaunchKernel.
template <typename... T>
void launch(void (*kernel)(T...), const Geometry& geometry, const void* const* arguments) {
    const auto values = [&]<size_t... i>(std::index_sequence<i...>) {
        return std::tuple<T...>(load<T>(arguments[i])...);
    }(std::index_sequence_for<T...>());
    Launch(geometry, [&] { std::apply(kernel, values); }).run();
}

// A parameter's kind (p pointer, i integer, f floating point, s struct) and size.
template <typename T>
std::string describe() {
    constexpr bool number = std::is_arithmetic_v<T>;
    const char kind = std::is_pointer_v<T> ? 'p' : !number ? 's' : std::is_integral_v<T> ? 'i' : 'f';
    return kind + std::to_string(sizeof(T));
}

template <typename... T>
std::string signature(void (*)(T...)) {
    std::string all;
    ((all += (all.empty() ? "" : " ") + describe<T>()), ...);
    return all;
}

using Entry = void (*)(const Geometry&, const void* const*);

template <auto kernel>
void entry(const Geometry& geometry, const void* const* arguments) {
    launch(kernel, geometry, arguments);
}

struct Kernel {
    std::string signature;
    Entry entry;
};

static std::map<std::string, Kernel> kernels;

// Stands for a kernel that an #if leaves out.
struct Absent {};

// Lists a kernel, unless it is an Absent.
template <auto kernel>
bool list(const char* name) {
    if constexpr (std::is_pointer_v<decltype(kernel)>) kernels[name] = {signature(kernel), entry<kernel>};
    return true;
}

enum Outcome { DONE, TRAPPED, WRONG_ARGUMENTS, ABSENT };

}  // namespace cuda_on_host

// ---- synchronisation ------------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::block_barrier.wait(); }
inline int __syncthreads_count(int predicate) { return cuda_on_host::block_barrier.wait(predicate); }
inline int __syncthreads_or(int predicate) { return cuda_on_host::block_barrier.wait(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return cuda_on_host::block_barrier.wait(!predicate) == 0; }
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ---- warps ----------------------------------------------------------------------------------------------------------

namespace cuda_on_host {

inline const Warp::Round& meet(unsigned mask, uint64_t value) { return warp->meet(mask, lane, value); }

inline unsigned ballot(unsigned mask, bool predicate) {
    const Warp::Round& round = meet(mask, predicate);
    unsigned votes = 0;
    for (int l = 0; l < warpSize; ++l) votes |= (round.lanes >> l & 1 & round.values[l]) << l;
    return votes;
}

// The value of lane `source`.
template <typename T>
T shuffle(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0, poison;
    memcpy(&bits, &value, sizeof(T));
    memset(&poison, POISON, sizeof(poison));
    const Warp::Round& round = meet(mask, bits);
    return load<T>(round.lanes >> source & 1 ? &round.values[source] : &poison);
}

inline int first_lane(int width) { return int(lane) & -width; }

}  // namespace cuda_on_host

namespace cuda_on_host {

// Sums of products wrap; the operands lie in words, little end first.
template <typename A, typename B>
unsigned dot(uint64_t a, uint64_t b, unsigned sum, int count) {
    for (int i = 0; i < count; ++i)
        sum += unsigned(A(a >> 8 * sizeof(A) * i) * B(b >> 8 * sizeof(B) * i));
    return sum;
}

// mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 for every pair of fragments: c[i][j] += a[i]·b[j]. Of the matrices
// a thread, g = lane / 4 and t = lane % 4, has of a rows g and g + 8 at depths 4t … 4t+3, then both at 16 more; of b
// column g at these depths; of c columns 2t and 2t + 1 of row g, then of row g + 8.
template <int ROWS, int COLUMNS>
void mma_m16n8k32(int (&c)[ROWS][COLUMNS][4], const unsigned (&a)[ROWS][4], const unsigned (&b)[COLUMNS][2]) {
    struct Operands {
        const unsigned (*a)[4], (*b)[2];
    };
    const Operands mine = {a, b};
    Operands of[warpSize];
    const Warp::Round& round = meet(~0u, reinterpret_cast<uintptr_t>(&mine));
    if (round.lanes != ~0u) throw Trap{"an mma needs all 32 lanes of its warp"};
    for (int l = 0; l < warpSize; ++l) of[l] = *reinterpret_cast<const Operands*>(round.values[l]);
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j)
            for (int at = 0; at < 4; ++at)
                for (int depth = 0; depth < 8; ++depth) {
                    const unsigned row = lane / 4 * 4 + depth % 4, column = (lane % 4 * 2 + at % 2) * 4 + depth % 4;
                    c[i][j][at] = dot<int8_t, uint8_t>(of[row].a[i][at / 2 + depth / 4 * 2],
                                                       of[column].b[j][depth / 4], c[i][j][at], 4);
                }
    meet(~0u, 0);  // the others have read what is mine
}

// cp.async: until it is waited for nobody knows what is there.
template <size_t BYTES>
void copy_async(void* to, const void* from) {
    if ((uintptr_t(to) | uintptr_t(from)) % BYTES) throw Trap{"a cp.async needs addresses aligned to its size"};
    memset(to, POISON, BYTES);
    copies.push_back({to, from, BYTES});
}

// cp.async.wait_all
inline void wait_for_copies() {
    for (const Copy& copy : copies) memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
}

}  // namespace cuda_on_host

inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::meet(mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return cuda_on_host::ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return cuda_on_host::ballot(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return cuda_on_host::ballot(mask, !predicate) == 0; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    return cuda_on_host::shuffle(mask, value, cuda_on_host::first_lane(width) + (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const int lane = cuda_on_host::lane, source = lane - int(delta % warpSize);
    return cuda_on_host::shuffle(mask, value, source >= cuda_on_host::first_lane(width) ? source : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    const int lane = cuda_on_host::lane, source = lane + int(delta % warpSize);
    return cuda_on_host::shuffle(mask, value, source < cuda_on_host::first_lane(width) + width ? source : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
    const int lane = cuda_on_host::lane, source = lane ^ bits % warpSize;
    return cuda_on_host::shuffle(mask, value, source < cuda_on_host::first_lane(width) + width ? source : lane);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldca(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T> T __ldcs(const T* from) { return *from; }
template <typename T> T __ldcv(const T* from) { return *from; }
template <typename T> T __ldlu(const T* from) { return *from; }
template <typename T> void __stcg(T* to, std::type_identity_t<T> value) { *to = value; }
template <typename T> void __stcs(T* to, std::type_identity_t<T> value) { *to = value; }
template <typename T> void __stwb(T* to, std::type_identity_t<T> value) { *to = value; }
template <typename T> void __stwt(T* to, std::type_identity_t<T> value) { *to = value; }

namespace cuda_on_host {

template <typename T, typename Change>
T atomically(T* at, Change change) {
    const std::atomic_ref<T> cell(*at);
    T old = cell.load(std::memory_order_relaxed);
    while (!cell.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {}
    return old;
}

}  // namespace cuda_on_host

// Each returns what was there before.
template <typename T> T atomicAdd(T* at, std::type_identity_t<T> v) {
    return std::atomic_ref(*at).fetch_add(v, std::memory_order_relaxed);
}
template <typename T> T atomicSub(T* at, std::type_identity_t<T> v) {
    return std::atomic_ref(*at).fetch_sub(v, std::memory_order_relaxed);
}
template <typename T> T atomicExch(T* at, std::type_identity_t<T> v) {
    return std::atomic_ref(*at).exchange(v, std::memory_order_relaxed);
}
template <typename T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    std::atomic_ref(*at).compare_exchange_strong(expected, v, std::memory_order_relaxed);
    return expected;
}
template <typename T> T atomicMax(T* at, std::type_identity_t<T> v) {
    return cuda_on_host::atomically(at, [v](T old) { return std::max(old, v); });
}
template <typename T> T atomicMin(T* at, std::type_identity_t<T> v) {
    return cuda_on_host::atomically(at, [v](T old) { return std::min(old, v); });
}
template <typename T> T atomicAnd(T* at, std::type_identity_t<T> v) {
    return cuda_on_host::atomically(at, [v](T old) { return old & v; });
}
template <typename T> T atomicOr(T* at, std::type_identity_t<T> v) {
    return cuda_on_host::atomically(at, [v](T old) { return old | v; });
}
template <typename T> T atomicXor(T* at, std::type_identity_t<T> v) {
    return cuda_on_host::atomically(at, [v](T old) { return old ^ v; });
}

// ---- integers -------------------------------------------------------------------------------------------------------

namespace cuda_on_host {

template <typename T>
unsigned word(T four_bytes) { return std::bit_cast<unsigned>(four_bytes); }

template <typename T>
T reversed(T value) {
    T result = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= (value >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}

inline uint64_t joined(unsigned low, unsigned high) { return uint64_t(high) << 32 | low; }

}  // namespace cuda_on_host

inline int __dp4a(int a, int b, int c) { return cuda_on_host::dot<int8_t, int8_t>(a, b, c, 4); }
inline int __dp4a(char4 a, char4 b, int c) { return __dp4a(int(cuda_on_host::word(a)), int(cuda_on_host::word(b)), c); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return cuda_on_host::dot<uint8_t, uint8_t>(a, b, c, 4); }
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
    return __dp4a(cuda_on_host::word(a), cuda_on_host::word(b), c);
}

inline int __dp2a_lo(int a, int b, int c) { return cuda_on_host::dot<int16_t, int8_t>(a, b, c, 2); }
inline int __dp2a_lo(short2 a, char4 b, int c) {
    return __dp2a_lo(int(cuda_on_host::word(a)), int(cuda_on_host::word(b)), c);
}
inline unsigned __dp2a_lo(unsigned a, unsigned b, unsigned c) {
    return cuda_on_host::dot<uint16_t, uint8_t>(a, b, c, 2);
}
inline unsigned __dp2a_lo(ushort2 a, uchar4 b, unsigned c) {
    return __dp2a_lo(cuda_on_host::word(a), cuda_on_host::word(b), c);
}
inline int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
inline int __dp2a_hi(short2 a, char4 b, int c) {
    return __dp2a_hi(int(cuda_on_host::word(a)), int(cuda_on_host::word(b)), c);
}
inline unsigned __dp2a_hi(unsigned a, unsigned b, unsigned c) { return __dp2a_lo(a, b >> 16, c); }
inline unsigned __dp2a_hi(ushort2 a, uchar4 b, unsigned c) {
    return __dp2a_hi(cuda_on_host::word(a), cuda_on_host::word(b), c);
}

// Byte n of the result is the byte of y:x that digit n of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned result = 0;
    for (int n = 0; n < 4; ++n)
        result |= unsigned(cuda_on_host::joined(x, y) >> 8 * (selector >> 4 * n & 7) & 0xFF) << 8 * n;
    return result;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) { return cuda_on_host::reversed(x); }
inline unsigned long long __brevll(unsigned long long x) { return cuda_on_host::reversed(x); }
inline int __mulhi(int x, int y) { return (long long)x * y >> 32; }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }
inline long long __mul64hi(long long x, long long y) { return (__int128)x * y >> 64; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned __int128)x * y >> 64;
}
inline unsigned __umul24(unsigned x, unsigned y) { return (x & 0xFFFFFF) * (y & 0xFFFFFF); }
inline int __mul24(int x, int y) { return unsigned(x << 8 >> 8) * unsigned(y << 8 >> 8); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return cuda_on_host::joined(low, high) << shift % 32 >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return cuda_on_host::joined(low, high) >> shift % 32;
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return cuda_on_host::joined(low, high) << std::min(shift, 32u) >> 32;
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return cuda_on_host::joined(low, high) >> std::min(shift, 32u);
}

// In the type that C's arithmetic has for the two.
template <typename A, typename B>
constexpr auto min(A a, B b) -> decltype(a + b) {
    using T = decltype(a + b);
    if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
    else return std::min(T(a), T(b));
}
template <typename A, typename B>
constexpr auto max(A a, B b) -> decltype(a + b) {
    using T = decltype(a + b);
    if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
    else return std::max(T(a), T(b));
}

// ---- floating point -------------------------------------------------------------------------------------------------

namespace cuda_on_host {

// Of a value that has been rounded: what does not fit saturates, NaN is 0.
template <typename T>
T saturated(float rounded) {
    using Limits = std::numeric_limits<T>;
    return isnan(rounded) ? 0 : T(std::clamp(double(rounded), double(Limits::min()), double(Limits::max())));
}

}  // namespace cuda_on_host

inline int __float2int_rn(float x) { return cuda_on_host::saturated<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return cuda_on_host::saturated<int>(truncf(x)); }
inline int __float2int_ru(float x) { return cuda_on_host::saturated<int>(ceilf(x)); }
inline int __float2int_rd(float x) { return cuda_on_host::saturated<int>(floorf(x)); }
inline unsigned __float2uint_rn(float x) { return cuda_on_host::saturated<unsigned>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return cuda_on_host::saturated<unsigned>(truncf(x)); }
inline unsigned __float2uint_ru(float x) { return cuda_on_host::saturated<unsigned>(ceilf(x)); }
inline unsigned __float2uint_rd(float x) { return cuda_on_host::saturated<unsigned>(floorf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }

// ---- traps and time -------------------------------------------------------------------------------------------------

[[noreturn]] inline void __trap() { throw cuda_on_host::Trap{"__trap()"}; }

namespace cuda_on_host {

[[noreturn]] inline void assertion_failed(const char* condition, const char* file, int line) {
    throw Trap{std::string(file) + ":" + std::to_string(line) + ": assertion `" + condition + "` failed"};
}

}  // namespace cuda_on_host

#undef assert
#define assert(condition) ((condition) ? void() : cuda_on_host::assertion_failed(#condition, __FILE__, __LINE__))

inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline void __nanosleep(unsigned) { sched_yield(); }

// ---- what build.py writes, and what it calls ------------------------------------------------------------------------

// Stands for `extern __shared__ T name[]`; T[] comes last because T may hold commas.
#define DYNAMIC_SHARED(name, ...)           \
    std::decay_t<__VA_ARGS__> const& name = \
        reinterpret_cast<std::decay_t<__VA_ARGS__> const&>(cuda_on_host::dynamic_shared)

// Lists a kernel of the global namespace. A name found there hides one that a using-directive brings.
#define HOST_KERNEL(name)                                             \
    namespace absent_kernels { constexpr cuda_on_host::Absent name; } \
    using namespace absent_kernels;                                   \
    static const bool name##_is_listed = cuda_on_host::list<::name>(#name);

// Runs a kernel whose arguments, of the kinds and sizes that `signature` says, lie at `arguments`. Returns an Outcome;
// `text` is then why the launch was trapped, or the signature that the kernel has.
extern "C" __attribute__((visibility("default"))) int run_kernel(
    const char* name, const char* signature, const unsigned (&geometry)[7], const void* const* arguments, char* text,
    size_t text_size) {
    using namespace cuda_on_host;
    if (!kernels.contains(name)) return ABSENT;
    const Kernel& kernel = kernels[name];
    if (kernel.signature != signature) {
        snprintf(text, text_size, "%s", kernel.signature.c_str());
        return WRONG_ARGUMENTS;
    }
    Outcome outcome = DONE;
    try {
        kernel.entry(load<Geometry>(geometry), arguments);
    } catch (const Trap& trap) {
        snprintf(text, text_size, "%s", trap.message.c_str());
        outcome = TRAPPED;
    }
    fflush(stdout);
    return outcome;
}

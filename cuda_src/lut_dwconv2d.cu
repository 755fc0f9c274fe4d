// Depthwise 2-D convolution by look-up table, int32, any channel multiplier:
//
//   out[b, o, i, j] = Σ_{r,s} table[w[o, r, s]][x[b, o / multiplier, i·step_h − pad_h + r·dil_h, j·step_w − pad_w + s·dil_w]]
//
// A block computes one filter o for some tiles of the output: for each it brings the codes of x that the tile sees, with
// their padding, into shared memory, and a thread computes STRIP output rows of one column. Beforehand it builds in shared
// memory, for each kernel column s and each TAPS kernel rows, the products of every code, so that one read serves the TAPS
// output rows that a code takes part in:
//
//   slot:   products of TAPS = 4 kernel rows with one code: table[w[o, 4q..4q+3, s]][a]; rows past the last one hold zeros
//   tables: [kernel column s][q][code a][copy] of slots. Threads read the copy of their number modulo `copies`, so that
//           random codes seldom meet in one bank: with 8 copies a warp's read of 4 products each takes 4 wavefronts
//           instead of about 6, where looking one product up takes about 3.
//
// Strides of 1 and 2 without vertical dilation go this way; any others look single products up in the same slots.
// Kernels whose tables do not fit shared memory go through the plain gather (gather.cuh), one group a channel.

#include "gather.cuh"

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int STRIP = 8;  // output rows a thread
constexpr int TAPS = 4;   // kernel rows a slot

// For the host, which plans by them.
[[maybe_unused]] constexpr int COPIES_INT16 = 8;    // most copies of a slot: 64 bytes, whatever the entry
[[maybe_unused]] constexpr int COPIES_INT32 = 4;
[[maybe_unused]] constexpr int TILE_COLUMNS = 128;  // most output columns a tile
[[maybe_unused]] constexpr int TILE_BYTES = 16384;  // of codes of x, about

// How the output of a filter is cut: a tile is `rows` output rows by `cols` columns of `images` images, more than one image
// only where it has all their rows. A filter's tiles are shared out over `parts` blocks.
struct Tiling {
    int rows, cols, images, row_tiles, col_tiles, image_tiles, parts, copies;
};

template <typename Entry>
struct Slot;
template <>
struct Slot<short> {
    typedef short4 type;
};
template <>
struct Slot<int> {
    typedef int4 type;
};

// Add a slot's products to the sums of the output rows, STEP input rows apart, that its code at input row j takes part in.
template <int STEP, typename Products>
__device__ void scatter(int (&sums)[STRIP], int j, Products p) {
    const int products[TAPS] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int t = 0; t < TAPS; ++t)
        if ((j - t) % STEP == 0 && j >= t && (j - t) / STEP < STRIP) sums[(j - t) / STEP] += products[t];
}

template <int STEP, typename Entry>
__device__ void strip(int (&sums)[STRIP], const typename Slot<Entry>::type* tables, const code* tile, int pitch,
                      const Geometry& g, int copies) {
    const int chunks = ceil_div(g.kernel_h, TAPS);
    for (int s = 0; s < g.kernel_w; ++s)
        for (int q = 0; q < chunks; ++q) {
            const typename Slot<Entry>::type* slots = tables + (s * chunks + q) * CODES * copies;
            const code* column = tile + q * TAPS * pitch + s * g.dil_w;
#pragma unroll
            for (int j = 0; j < (STRIP - 1) * STEP + TAPS; ++j) scatter<STEP>(sums, j, slots[column[j * pitch] * copies]);
        }
}

template <typename Entry>
__device__ void strip_of_any(int (&sums)[STRIP], const typename Slot<Entry>::type* tables, const code* tile, int pitch,
                             const Geometry& g, int copies) {
    const int chunks = ceil_div(g.kernel_h, TAPS);
    for (int s = 0; s < g.kernel_w; ++s)
        for (int r = 0; r < g.kernel_h; ++r) {
            const typename Slot<Entry>::type* slots = tables + (s * chunks + r / TAPS) * CODES * copies;
            const code* column = tile + r * g.dil_h * pitch + s * g.dil_w;
#pragma unroll
            for (int i = 0; i < STRIP; ++i) {
                const Entry* slot = reinterpret_cast<const Entry*>(slots + column[i * g.step_h * pitch] * copies);
                sums[i] += slot[r % TAPS];
            }
        }
}

template <typename Entry>
__device__ void dwconv2d(const code* x, const code* w, const Entry* table, int* out, const Geometry& g,
                         const Tiling& t) {
    typedef typename Slot<Entry>::type SlotOf;
    extern __shared__ __align__(16) char shared[];
    SlotOf* tables = reinterpret_cast<SlotOf*>(shared);
    const int chunks = ceil_div(g.kernel_h, TAPS), filter = blockIdx.x / t.parts, part = blockIdx.x % t.parts;
    const int channel = filter / g.lanes, lane = filter % g.lanes;
    x += channel * g.x_group;
    w += channel * g.w_group + lane * g.w_lane;
    out += channel * g.out_group + lane * g.out_lane;
    code* tile = reinterpret_cast<code*>(tables + g.kernel_w * chunks * CODES * t.copies);

    for (int at = threadIdx.x; at < g.kernel_w * chunks * CODES; at += blockDim.x) {
        const int a = at % CODES, q = at / CODES % chunks, s = at / (CODES * chunks);
        Entry entries[TAPS];
        for (int i = 0; i < TAPS; ++i) {
            const int r = q * TAPS + i;
            entries[i] = r < g.kernel_h ? table[w[r * g.w_row + s * g.w_col] * CODES + a] : Entry(0);
        }
        const SlotOf slot = {entries[0], entries[1], entries[2], entries[3]};
        // Neighbours begin with different copies, else they would meet in one bank.
        for (int i = 0; i < t.copies; ++i) tables[at * t.copies + (i + threadIdx.x / 2) % t.copies] = slot;
    }
    const SlotOf* own = tables + threadIdx.x % t.copies;

    const int strips = ceil_div(t.rows, STRIP), pitch = (t.cols - 1) * g.step_w + (g.kernel_w - 1) * g.dil_w + 1;
    // Rows that the last strip and the last slot read beyond what they need are there too.
    const int height = (strips * STRIP - 1) * g.step_h + max((g.kernel_h - 1) * g.dil_h, chunks * TAPS - 1) + 1;
    const int tiles = t.row_tiles * t.col_tiles * t.image_tiles;
    for (int at = part; at < tiles; at += t.parts) {
        const int first_col = at % t.col_tiles * t.cols, first_row = at / t.col_tiles % t.row_tiles * t.rows;
        const int first_image = at / (t.col_tiles * t.row_tiles) * t.images;
        const int images = min(t.images, g.images - first_image);
        const int top = first_row * g.step_h - g.pad_h, left = first_col * g.step_w - g.pad_w;
        __syncthreads();
        for (int line = threadIdx.x / WARP; line < images * height; line += blockDim.x / WARP) {
            const int row = top + line % height;
            const bool inside = row >= 0 && row < g.height;
            const code* from = x + (first_image + line / height) * g.x_image + (inside ? row * g.x_row : 0);
            for (int i = threadIdx.x % WARP; i < pitch; i += WARP) {
                const int col = left + i;
                tile[line * pitch + i] = inside && col >= 0 && col < g.width ? from[col * g.x_col] : code(g.pad_code);
            }
        }
        __syncthreads();
        const int cols = min(t.cols, g.out_w - first_col), rows = min(t.rows, g.out_h - first_row);
        for (int i = threadIdx.x; i < images * strips * cols; i += blockDim.x) {
            const int col = i % cols, first = i / cols % strips * STRIP, image = i / (cols * strips);
            const code* tile_at = tile + (image * height + first * g.step_h) * pitch + col * g.step_w;
            int sums[STRIP];
#pragma unroll
            for (int k = 0; k < STRIP; ++k) sums[k] = g.bias;
            if (g.step_h == 1 && g.dil_h == 1)
                strip<1, Entry>(sums, own, tile_at, pitch, g, t.copies);
            else if (g.step_h == 2 && g.dil_h == 1)
                strip<2, Entry>(sums, own, tile_at, pitch, g, t.copies);
            else
                strip_of_any<Entry>(sums, own, tile_at, pitch, g, t.copies);
            int* to = out + (first_image + image) * g.out_image +
                      (int64(first_row + first) * g.out_w + first_col + col) * g.out_pixel;
#pragma unroll
            for (int k = 0; k < STRIP; ++k)
                if (first + k < rows) to[k * g.out_w * g.out_pixel] = sums[k];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    lut_dwconv2d_int16(const code* x, const code* w, const short* table, int* out, const Geometry g, const Tiling t) {
    dwconv2d(x, w, table, out, g, t);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    lut_dwconv2d_int32(const code* x, const code* w, const int* table, int* out, const Geometry g, const Tiling t) {
    dwconv2d(x, w, table, out, g, t);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_dwconv2d_gather_int16(const code* x, const code* w, const short* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

extern "C" __global__ void __launch_bounds__(GATHER_ROWS* GATHER_PARTS)
    lut_dwconv2d_gather_int32(const code* x, const code* w, const int* table, int* out, const Geometry g) {
    gather(x, w, table, out, g);
}

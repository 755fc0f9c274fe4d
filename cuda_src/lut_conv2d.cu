// Grouped 2-D convolution by look-up table, plain gather; a matrix product is the case of a 1×1 kernel.
//
//   out[b, g, l, i, j] = bias + Σ_{c,r,s} table[w[g, l, c, r, s]][x[b, g, c, i·step_h − pad_h + r·dil_h, …]]
//
// A thread computes LANES output channels of one output pixel: it reads each code of x once for all of them, and the
// codes of w, the same for the whole warp, by broadcast. `table` is 256×256 by weight code, so that a warp's lookups
// fall into one row of 512 bytes, which stays in L1. A block covers THREADS pixels of the batch (grid.x) and one lane
// tile of one group (grid.y); both dimensions of the grid may be smaller than the work, which is then strided over.
// Positions outside x hold pad_code. x and w have any strides, out those given. No shared memory, no atomics.
// `geometry` lies in global memory and is read once a thread.

constexpr int THREADS = 256;
constexpr int LANES = 8;

typedef long long int64;
typedef unsigned char code;

struct Geometry {
    int64 pixels, groups, lanes, channels, height, width, out_h, out_w, kernel_h, kernel_w;
    int64 step_h, step_w, pad_h, pad_w, dil_h, dil_w;
    int64 x_image, x_group, x_channel, x_row, x_col;
    int64 w_group, w_lane, w_channel, w_row, w_col;
    int64 out_image, out_group, out_lane, out_pixel;
};

template <typename Entry>
__device__ void lut_conv2d(const code* x, const code* w, const Entry* table, int* out, const Geometry* geometry,
                           int bias, code pad_code) {
    const Geometry g = *geometry;
    const int64 tiles = (g.lanes + LANES - 1) / LANES;
    for (int64 job = blockIdx.y; job < g.groups * tiles; job += gridDim.y) {
        const int64 group = job / tiles, first = job % tiles * LANES;
        for (int64 pixel = int64(blockIdx.x) * THREADS + threadIdx.x; pixel < g.pixels;
             pixel += int64(gridDim.x) * THREADS) {
            const int64 image = pixel / (g.out_h * g.out_w), place = pixel % (g.out_h * g.out_w);
            const int64 top = place / g.out_w * g.step_h - g.pad_h, left = place % g.out_w * g.step_w - g.pad_w;
            const code* x_at = x + image * g.x_image + group * g.x_group;
            const code* w_at = w + group * g.w_group;
            int sums[LANES];
            for (int l = 0; l < LANES; ++l) sums[l] = bias;
            for (int64 c = 0; c < g.channels; ++c)
                for (int64 r = 0; r < g.kernel_h; ++r)
                    for (int64 s = 0; s < g.kernel_w; ++s) {
                        const int64 row = top + r * g.dil_h, col = left + s * g.dil_w;
                        const bool inside = row >= 0 && row < g.height && col >= 0 && col < g.width;
                        const code a = inside ? x_at[c * g.x_channel + row * g.x_row + col * g.x_col] : pad_code;
                        const code* w_tap = w_at + c * g.w_channel + r * g.w_row + s * g.w_col;
                        for (int l = 0; l < LANES; ++l)
                            if (first + l < g.lanes)
                                sums[l] += table[int(w_tap[(first + l) * g.w_lane]) * 256 + a];
                    }
            int* to = out + image * g.out_image + group * g.out_group + place * g.out_pixel;
            for (int l = 0; l < LANES; ++l)
                if (first + l < g.lanes) to[(first + l) * g.out_lane] = sums[l];
        }
    }
}

extern "C" __global__ void lut_conv2d_int16(const code* x, const code* w, const short* table, int* out,
                                            const Geometry* geometry, int bias, code pad_code) {
    lut_conv2d(x, w, table, out, geometry, bias, pad_code);
}

extern "C" __global__ void lut_conv2d_int32(const code* x, const code* w, const int* table, int* out,
                                            const Geometry* geometry, int bias, code pad_code) {
    lut_conv2d(x, w, table, out, geometry, bias, pad_code);
}

// Packed activations, and the order of the k's.
//
//   x as [group][channel / 8][padded pixel][8 channels]
//
// with its padding filled in: a thread's 8 codes of one tap are one aligned load, and consecutive threads' loads are
// consecutive. A stage of an octet's 8 k's is one tap of it; a k is (channel / 8, kernel row, kernel column, channel % 8).
// Channels that fill up the last octet hold the pad code; whoever reads them masks them.
#pragma once

#include "lut.cuh"

constexpr int OCTET = 8;  // channels packed together
constexpr int PACK_THREADS = 256;

// Sizes of the packed operands.
struct Packed {
    int height, width;  // of a padded image
    int octets;         // channels / 8, rounded up
    int plane;          // bytes of one octet: images·height·width·8
    int stages;         // octets·taps
    int tiles;          // lane tiles a group

    __device__ Packed(const Geometry& g, int lanes)
        : height((g.out_h - 1) * g.step_h + (g.kernel_h - 1) * g.dil_h + 1),
          width((g.out_w - 1) * g.step_w + (g.kernel_w - 1) * g.dil_w + 1),
          octets(ceil_div(g.channels, OCTET)),
          plane(g.images * height * width * OCTET),
          stages(octets * g.taps()),
          tiles(ceil_div(g.lanes, lanes)) {}
    // Bytes from an octet's first code to that of an output pixel's first tap.
    __device__ int row_at(const Geometry& g, int pixel) const {
        const int image = pixel / (g.out_h * g.out_w), row = pixel / g.out_w % g.out_h, col = pixel % g.out_w;
        return ((image * height + row * g.step_h) * width + col * g.step_w) * OCTET;
    }
};

// A stage's place in the order of the k's.
struct Walk {
    const Geometry& g;
    const Packed& packed;
    int octet, r, s;

    __device__ Walk(const Geometry& g, const Packed& packed, int stage)
        : g(g), packed(packed), octet(stage / g.taps()), r(stage % g.taps() / g.kernel_w), s(stage % g.kernel_w) {}
    // Bytes from a row's first tap to its codes of this stage.
    __device__ int shift() const { return octet * packed.plane + (r * g.dil_h * packed.width + s * g.dil_w) * OCTET; }
    __device__ int channels_left() const { return g.channels - octet * OCTET; }
    // Go to the next stage; by how many bytes the shift grows.
    __device__ int next() {
        const int tap = g.dil_w * OCTET, row = g.dil_h * packed.width * OCTET;
        if (++s < g.kernel_w) return tap;
        s = 0;
        const int back = (1 - g.kernel_w) * tap;
        if (++r < g.kernel_h) return row + back;
        r = 0;
        ++octet;
        return packed.plane + (1 - g.kernel_h) * row + back;
    }
};

// The codes of one octet at one padded pixel; `job` is their index in the packed x.
__device__ inline uint2 packed_octet(const code* x, const Geometry& g, const Packed& packed, int job) {
    const int col = job % packed.width - g.pad_w, row = job / packed.width % packed.height - g.pad_h;
    const int image = job / (packed.width * packed.height) % g.images;
    const int octet = job / (packed.plane / OCTET) % packed.octets;
    const int group = job / (packed.plane / OCTET) / packed.octets;
    const bool inside = row >= 0 && row < g.height && col >= 0 && col < g.width;
    const code* from = x + group * g.x_group + octet * OCTET * g.x_channel;
    from += inside ? image * g.x_image + row * g.x_row + col * g.x_col : 0;
    if (inside && g.x_channel == 1 && octet * OCTET + OCTET <= g.channels && size_t(from) % sizeof(uint2) == 0)
        return *reinterpret_cast<const uint2*>(from);
    unsigned words[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < OCTET; ++c) {
        const bool real = inside && octet * OCTET + c < g.channels;
        const unsigned value = real ? from[c * g.x_channel] : g.pad_code;
        words[c / 4] |= value << c % 4 * 8;
    }
    return make_uint2(words[0], words[1]);
}

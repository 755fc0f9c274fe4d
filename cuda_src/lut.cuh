// Types and layouts that all kernels share.
//
// A code is an operand's bit pattern in a byte. Tables come as 256×256 entries *by weight code*, table[w][a], so that the
// entries a fixed weight needs are one contiguous row. Entries are int16 with the table's offset taken out (the host adds
// it back as `bias`, once a sum), or int32 where a table spans more than 16 bits.
#pragma once

typedef long long int64;
typedef unsigned char code;

constexpr int CODES = 256;

// Arrays of the operands' natural order, as a grouped convolution with any strides; a matrix product is the case of a
// 1×1 kernel on an image of one column. Counts of pixels and channels of one launch fit 31 bits, strides are 64-bit.
struct Geometry {
    int64 x_image, x_group, x_channel, x_row, x_col;
    int64 w_group, w_lane, w_channel, w_row, w_col;
    int64 out_image, out_group, out_lane, out_pixel, out_split;
    int images, groups, lanes, channels, height, width, out_h, out_w, kernel_h, kernel_w;
    int step_h, step_w, pad_h, pad_w, dil_h, dil_w;
    int bias, pad_code;

    __device__ int pixels() const { return images * out_h * out_w; }
    __device__ int taps() const { return kernel_h * kernel_w; }
    __device__ int64 out_at(int pixel) const {
        const int plane = out_h * out_w;
        return pixel / plane * out_image + pixel % plane * out_pixel;
    }
};

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

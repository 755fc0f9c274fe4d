// Enough of CUDA C++ to run a kernel without barriers on the CPU, one thread after the other.
#pragma once

struct Dim3 {
    unsigned x, y, z;
};

static thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__

template <typename Kernel, typename... Arguments>
void run_grid(Kernel kernel, const unsigned* grid, const unsigned* block, Arguments... arguments) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
                for (threadIdx.z = 0; threadIdx.z < block[2]; ++threadIdx.z)
                    for (threadIdx.y = 0; threadIdx.y < block[1]; ++threadIdx.y)
                        for (threadIdx.x = 0; threadIdx.x < block[0]; ++threadIdx.x) kernel(arguments...);
}

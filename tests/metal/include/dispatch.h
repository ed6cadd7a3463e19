// Runs a kernel's threads, one after the other. A threadgroup that the grid cuts short is short, as in
// Metal's dispatchThreads, which MLX uses. `backwards` runs the threads in the opposite order: what
// depends on the order was a race.
//
// To emulate simdgroup functions or barriers, replace the innermost loop: give each of a simdgroup's 32
// threads (a threadgroup's, for barriers) a fiber, and let such a function hand over its operand, switch
// to the next fiber, and go on when all have arrived. The rest of the harness stays as it is, but for
// MEETINGS in source.py, which refuses them until then.
#pragma once

struct Thread {  // members have the names and types of Metal's attributes
    uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    uint3 threads_per_grid, threadgroups_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint threads_per_simdgroup, simdgroups_per_threadgroup;
};

extern "C" volatile uint running[3];  // read by guarded.py when a thread dies
volatile uint running[3];

inline uint3 unravel(uint index, uint3 extent) {
    return uint3{index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

template <class Kernel>
void dispatch(const uint* grid_size, const uint* group_size, bool backwards, Kernel kernel) {
    const uint3 grid{grid_size[0], grid_size[1], grid_size[2]};
    const uint3 group{group_size[0], group_size[1], group_size[2]};
    const uint3 groups = (grid + group - 1u) / group;
    const uint group_count = groups.x * groups.y * groups.z;
    for (uint g = 0; g < group_count; ++g) {
        const uint3 group_at = unravel(backwards ? group_count - 1 - g : g, groups), start = group_at * group;
        const uint3 inside = __builtin_elementwise_min(group, grid - start);
        const uint threads = inside.x * inside.y * inside.z;
        for (uint t = 0; t < threads; ++t) {
            const uint index = backwards ? threads - 1 - t : t;
            const uint3 at = unravel(index, inside), in_grid = start + at;
            running[0] = in_grid.x, running[1] = in_grid.y, running[2] = in_grid.z;
            kernel(Thread{in_grid, at, group_at, grid, groups, inside, group,
                          index, index % 32, index / 32, 32, (threads + 31) / 32});
        }
    }
}

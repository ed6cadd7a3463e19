// Runs a kernel's threads, one simdgroup after the other, its lanes one after the other. A
// threadgroup that the grid cuts short is short, as in Metal's dispatchThreads, which MLX uses.
// `backwards` runs simdgroups and lanes in the opposite order: what depends on order was a race.
//
// With SIMDGROUPS_MEET every lane is a fiber of its own: a simdgroup function hands over its
// operand, lets the other lanes come to the same call, and goes on when all have. A lane that
// ended, or came to another function, is a trap: Metal leaves that undefined. Barriers and
// threadgroup memory are refused before (MEETINGS in source.py).
#pragma once

struct Thread {  // members have the names and types of Metal's attributes
    uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    uint3 threads_per_grid, threadgroups_per_grid, threads_per_threadgroup;
    uint3 dispatch_threads_per_threadgroup;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint threads_per_simdgroup, simdgroups_per_threadgroup;
};

extern "C" volatile uint running[3];  // read by guarded.py when a thread dies
volatile uint running[3];

inline void announce(const Thread& at) {
    running[0] = at.thread_position_in_grid.x, running[1] = at.thread_position_in_grid.y;
    running[2] = at.thread_position_in_grid.z;
}

inline uint3 unravel(uint index, uint3 extent) {
    return uint3{index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

#ifdef SIMDGROUPS_MEET
template <class Kernel>
void run_lanes(Thread* threads, uint count, bool backwards, Kernel kernel) {
    fibers::run(count, backwards, [&](uint lane) { kernel(threads[lane]); },
                [&](uint lane) { announce(threads[lane]); });
}
#else
template <class Kernel>
void run_lanes(Thread* threads, uint count, bool backwards, Kernel kernel) {
    for (uint i = 0; i < count; ++i) {
        const uint lane = backwards ? count - 1 - i : i;
        announce(threads[lane]);
        kernel(threads[lane]);
    }
}
#endif

template <class Kernel>
void dispatch(const uint* grid_size, const uint* group_size, bool backwards, Kernel kernel) {
    const uint3 grid{grid_size[0], grid_size[1], grid_size[2]};
    const uint3 group{group_size[0], group_size[1], group_size[2]};
    const uint3 groups = (grid + group - 1u) / group;
    const uint group_count = groups.x * groups.y * groups.z;
    for (uint g = 0; g < group_count; ++g) {
        const uint3 group_at = unravel(backwards ? group_count - 1 - g : g, groups);
        const uint3 start = group_at * group;
        const uint3 inside = __builtin_elementwise_min(group, grid - start);
        const uint threads = inside.x * inside.y * inside.z, simdgroups = (threads + 31) / 32;
        for (uint s = 0; s < simdgroups; ++s) {
            const uint simdgroup = backwards ? simdgroups - 1 - s : s;
            const uint lanes = __builtin_elementwise_min(32u, threads - 32 * simdgroup);
            Thread members[32];
            for (uint lane = 0; lane < lanes; ++lane) {
                const uint index = 32 * simdgroup + lane;
                const uint3 at = unravel(index, inside);
                members[lane] = Thread{start + at, at, group_at, grid, groups, inside, group,
                                       index, lane, simdgroup, 32, simdgroups};
            }
            run_lanes(members, lanes, backwards, kernel);
        }
    }
}
